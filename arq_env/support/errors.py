"""The one exception whose message is meant for the user, in one sentence."""


class ArqError(ValueError):
    """Something the user can put right; scripts print the message alone and exit with code 2.

    :param message: put on one line, since what it quotes, such as an array, may have several
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def reason(error: BaseException) -> str:
    """What an exception says, on one line and not a long one, for the parentheses of an :class:`ArqError`."""
    said = " ".join(str(error).split())[:300]
    return f"there is no {said}" if isinstance(error, KeyError) else said


def shown(value) -> str:
    """A value as it can stand in an error message, in a few words."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # the value is someone else's, and so is what its repr raises
        text = f"of type {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
