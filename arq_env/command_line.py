"""What every script shares: its parser's look, and errors in one line."""

import argparse
import sys
import warnings

import gymnasium

from arq_env.errors import ArqError


def parser(description: str) -> argparse.ArgumentParser:
    """A parser that shows the script's docstring and every default."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )


def run(main) -> None:
    """Call ``main()``; end with one line and exit code 2 for a mistake of the user's, 130 for Ctrl-C."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        main()
    except (ArqError, gymnasium.error.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where this one stopped", file=sys.stderr)
        sys.exit(130)
