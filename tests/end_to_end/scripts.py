"""Running the scripts as a user does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def path_of(name: str) -> Path:
    """The script of that name, in whichever folder below experiments/ it lies."""
    (path,) = (ROOT / "experiments").glob(f"**/{name}.py")
    return path


def script(name, *arguments, **environment):
    """Run a script to its end."""
    command = [sys.executable, str(path_of(name)), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | environment)


def kill(name, *arguments, when):
    """Start a script and end it with SIGKILL as soon as ``when()`` is true."""
    command = [sys.executable, str(path_of(name)), *map(str, arguments)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not when():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()


def interruptible():
    """As ``preexec_fn``: Ctrl-C ends the script also where a shell has started the tests in the background, which ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def lines(path):
    """The ended lines of a file that may not be there yet; a kill may have cut the last one short."""
    return path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []


def assert_one_line_error(done, *parts):
    """Exit code 2, and a single line that says what to do."""
    assert done.returncode == 2, done
    said = done.stderr.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("error: "), done.stderr
    for part in parts:
        assert part in said[0]
