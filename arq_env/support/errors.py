"""The one exception whose message is meant for the user, in one sentence."""

import difflib
from pathlib import Path


class ArqError(ValueError):
    """Something the user can put right; scripts print the message alone and exit with code 2.

    :param message: put on one line, since what it quotes, such as an array, may have several
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def reason(error: BaseException) -> str:
    """What an exception says, on one line and not a long one, for the parentheses of an :class:`ArqError`."""
    said = " ".join(str(error).split())[:300]
    if isinstance(error, FileNotFoundError) and isinstance(error.filename, str):
        said += _nearest(Path(error.filename))
    return f"there is no {said}" if isinstance(error, KeyError) else said


def did_you_mean(name: str, names) -> str:
    """``, did you mean NAME?`` for the one of ``names`` that is nearest; nothing where none is near."""
    near = difflib.get_close_matches(name, [*names], 1)
    return f", did you mean {near[0]}?" if near else ""


def _nearest(path: Path) -> str:
    """The same for the part of a path that is the first to be missing."""
    try:
        missing = next(part for part in (*reversed(path.parents), path) if not part.exists())
        near = difflib.get_close_matches(missing.name, [there.name for there in missing.parent.iterdir()], 1)
    except (OSError, StopIteration, ValueError):  # unreadable, or there by now
        return ""
    return f", did you mean {missing.parent / near[0]}?" if near else ""


def shown(value) -> str:
    """A value as it can stand in an error message, in a few words."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # the value is someone else's, and so is what its repr raises
        text = f"of type {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
