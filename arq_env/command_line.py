"""What every script shares: its parser's look, and errors in one line."""

import argparse
import errno
import sys
import threading
import warnings

import gymnasium

from arq_env.comparison import TestSettings
from arq_env.errors import ArqError

#: Of errors in writing that are the user's to mend, wherever they come from (TensorBoard writes in a thread of its own).
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        """Show a default only where there is one."""
        return action.help if action.default is None else super()._get_help_string(action)


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        """One line, as for every other mistake."""
        self.exit(2, f"error: {message} (see --help)\n")


def parser(description: str) -> argparse.ArgumentParser:
    """A parser that shows the script's docstring and every default."""
    return _OneLineParser(description=description, formatter_class=_Defaults, allow_abbrev=False)


def whole(least: int, most: int = 2**32 - 1):
    """The type of an option that takes a whole number from ``least`` to ``most``."""

    def convert(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"{value} is out of range: give a whole number from {least}" + (f" to {most}" if most < 2**31 else "")
            )
        return value

    convert.__name__ = "whole number"
    return convert


def add_test_settings(parser: argparse.ArgumentParser) -> None:
    """The options that make up a certificate on test images, named as in :class:`arq_env.comparison.TestSettings`."""
    for name, kind, what in (
        ("every", whole(1), "take every so many-th test image"),
        ("offset", whole(0), "index of the first of them"),
        ("n0", whole(1), "noise samples that select a class"),
        ("n", whole(1), "noise samples that count it"),
        ("alpha", float, "error probability of each certificate"),
        ("seed", whole(0), "of the certification noise"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=getattr(TestSettings, name), help=what)


def add_processes(parser: argparse.ArgumentParser, what: str, default: int = 1) -> None:
    """The option ``--processes``, with what each of them does one of at a time."""
    parser.add_argument("--processes", type=whole(1), default=default, help=f"{what} at a time, one thread each")


def _in_thread(ended) -> None:
    """No traceback of a thread that could not write: whoever started it meets the error again."""
    if getattr(ended.exc_value, "errno", None) not in _UNWRITABLE:
        threading.__excepthook__(ended)


def run(main, *, resumes: bool = True) -> None:
    """Call ``main()``; end with one line and exit code 2 for a mistake of the user's, 130 for Ctrl-C.

    :param resumes: whether the same command goes on where an interrupted one stopped
    """
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    threading.excepthook = _in_thread
    try:
        main()
    except (ArqError, gymnasium.error.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        where = f" {error.filename}" if error.filename else ""
        print(f"error: cannot write{where} ({error.strerror}): free some space there, or choose another --output", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"interrupted: the same command {'goes on where this one stopped' if resumes else 'starts over'}", file=sys.stderr)
        sys.exit(130)
