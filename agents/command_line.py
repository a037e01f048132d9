"""What every script shares: its parser's look, ``--config``, errors in one line, and Ctrl-C at any time.

A script imports this first, then parses (:func:`start`), then imports what takes seconds, then works (:func:`run`). So nothing is
imported here, before a call, but what Python itself brings.
"""

import argparse
import errno
import os
import re
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

#: Of errors in writing that are the user's to mend, wherever they come from (TensorBoard writes in a thread of its own).
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)

Result = TypeVar("Result")


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        """Show a default only where there is one."""
        return action.help if action.default is None else super()._get_help_string(action)


class OneLineParser(argparse.ArgumentParser):
    """argparse's, with mistakes in one line."""

    #: Whether ``--network`` asks for ``--sigma``: another noise than a network's own makes numbers that mean nothing.
    sigma_of_own = False

    def error(self, message: str) -> NoReturn:
        """One line, as for every other mistake, with what may have been meant."""
        from arq_env.support.errors import did_you_mean

        near = ""
        if choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            near = did_you_mean(choice[1], re.findall(r"[^\s',]+", choice[2]))
        elif option := re.search(r"unrecognized arguments: (--[^\s=]+)", message):
            near = did_you_mean(option[1], self._option_string_actions)
        self.exit(2, f"error: {message}{near} (see --help)\n")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse does; the options of ``--config`` come first, so that those given after them count."""
        given = sys.argv[1:] if args is None else [*args]
        first = OneLineParser(add_help=False, allow_abbrev=False)
        first.add_argument("--config", type=Path)
        first.add_argument("--quiet", action="store_true")
        known, rest = first.parse_known_args(given)
        if known.quiet:
            os.environ["TQDM_DISABLE"] = "1"
        if known.config:
            given = _without(_recorded(known.config), rest) + rest
            if args is None:
                sys.argv[1:] = given  # what the results say that they were made with
        options = super().parse_args(given, namespace)
        said = any(part.partition("=")[0] == "--sigma" for part in given)
        if self.sigma_of_own and getattr(options, "network", None) is not None and not said:
            self.error("--network needs --sigma, the noise that the network was trained under")
        return options


def parser(description: str) -> OneLineParser:
    """A parser that shows the script's docstring and every default."""
    from arq_env.support.provenance import program

    new = OneLineParser(prog=" ".join(program()), description=description, formatter_class=_Defaults, allow_abbrev=False)
    new.add_argument(
        "--config",
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="a run's config.json, or another result: take the options that it was made with; those given here count",
    )
    new.add_argument("--quiet", action="store_true", default=argparse.SUPPRESS, help="no progress bars")
    return new


def _without(recorded: list[str], given: list[str]) -> list[str]:
    """Recorded options, and their values, but those that are given again."""
    options = {part.partition("=")[0] for part in given if part.startswith("--")}
    options |= {"--processes", "--engine"} if options & {"--processes", "--engine"} else set()
    kept, keep = [], True
    for part in recorded:
        if part.startswith("--"):
            keep = part.partition("=")[0] not in options
        if keep:
            kept.append(part)
    return kept


def _recorded(path: Path) -> list[str]:
    """The options of the command line that a file of results says it was made with.

    :raises ArqError: when it says none
    """
    from arq_env.support.errors import ArqError, reason
    from arq_env.support.files import read_json

    try:
        command = shlex.split(read_json(path / "config.json" if path.is_dir() else path)["provenance"]["command"])
        return command[2:]  # without what was called
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArqError(
            f"{path} does not say how it was made ({reason(error)}): give the config.json of a run folder of this version"
        ) from error


def start(name: str, parse: Callable[..., argparse.Namespace], *arguments: Any) -> argparse.Namespace | None:
    """What ``parse(*arguments)`` returns; from here to :func:`run`, while imports take seconds, Ctrl-C ends the process.

    At once and in one line, and not by an exception: what is being imported may turn that into another, or print it.

    :param name: the script's ``__name__``; where it is imported nothing is parsed, and in a worker process Ctrl-C is left to the
        main one
    """
    if name == "__mp_main__":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if name != "__main__":
        return None
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as nohup and & have it
        signal.signal(signal.SIGINT, _end)
    return _guarded(parse, *arguments)


def run(main: Callable[..., None], *arguments: Any, resumes: bool = True) -> None:
    """Call ``main(*arguments)``; end with one line and exit code 2 for a mistake of the user's, 130 for Ctrl-C.

    :param resumes: whether the same command goes on where an interrupted one stopped
    """
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    threading.excepthook, sys.unraisablehook = _in_thread, _in_callback
    try:
        if signal.getsignal(signal.SIGINT) is _end:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        _guarded(main, *arguments)
    except KeyboardInterrupt:
        print(f"interrupted: the same command {'goes on where this one stopped' if resumes else 'starts over'}", file=sys.stderr)
        sys.exit(130)


def _guarded(call: Callable[..., Result], *arguments: Any) -> Result:
    """Call it; exit code 2 and one line for what the user can mend."""
    try:
        return call(*arguments)
    except Exception as error:
        from gymnasium.error import Error

        from arq_env.support.errors import ArqError

        if isinstance(error, ArqError | Error):
            said = str(error)
        elif isinstance(error, OSError) and error.errno in _UNWRITABLE:
            where = f" {error.filename}" if error.filename else ""
            said = f"cannot write{where} ({error.strerror}): free some space there, or choose another --output"
        else:
            raise
        print(f"error: {said}", file=sys.stderr)
        sys.exit(2)


def _end(*_: object) -> None:
    """Ctrl-C before there is anything to keep."""
    os.write(2, b"interrupted: nothing had begun\n")
    os._exit(130)


def _in_callback(ended: "sys.UnraisableHookArgs") -> None:
    """Ctrl-C while a destructor or a weak reference's callback ran, which let no exception out, counts as pressed again."""
    if ended.exc_type is KeyboardInterrupt:
        main = threading.main_thread().ident
        threading.Timer(0.01, signal.pthread_kill, (main, signal.SIGINT)).start()  # in here it would be ignored again
    else:
        sys.__unraisablehook__(ended)


def _in_thread(ended: threading.ExceptHookArgs) -> None:
    """No traceback of a thread that could not write: whoever started it meets the error again."""
    if getattr(ended.exc_value, "errno", None) not in _UNWRITABLE:
        threading.__excepthook__(ended)
