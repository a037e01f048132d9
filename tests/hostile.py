"""What every test of hostile input asks: documented errors only, no hang, no large allocation, no file touched."""

import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from arq_env import ArqError

#: What one call may take: bytes of address space, of which torch's threads take most, and seconds on a busy machine.
BYTES, SECONDS = 2 * 2**30, 60


def hostile(test):
    """Decorates a property test of some dozens of examples; a thousand by ``pytest -m hostile --hypothesis-profile thorough``."""
    examples = 1_000 if settings.get_current_profile_name() == "thorough" else 25
    return pytest.mark.hostile(settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))(test))


def outcome_of(call: Callable, folder: Path | None = None, errors: type | tuple = ArqError):
    """What a call returns, and the one line it refuses with.

    :param folder: no file in it may change, unless the call returns ``folder`` itself, by which it says that it wrote there
    :param errors: those that are documented; any other fails the test, memory that is refused included
    """

    def hangs(*_):
        raise AssertionError(f"it takes more than {SECONDS} seconds")

    before = contents(folder)
    limits, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, hangs)
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + BYTES, limits[1]))
    signal.alarm(SECONDS)
    result, refused = None, None
    try:
        result = call()
    except errors as error:
        refused = str(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert refused is None or refused and "\n" not in refused and len(refused) < 20_000, refused
    if result is None or result is not folder:
        assert contents(folder) == before
    return result, refused


def contents(folder: Path | None) -> dict:
    """The bytes of every file below a folder."""
    return {path: path.read_bytes() for path in folder.glob("**/*") if path.is_file()} if folder else {}
