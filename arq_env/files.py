"""Files that are either whole or not there."""

import contextlib
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path

from arq_env.errors import ArqError

try:
    import fcntl
except ImportError:  # Windows, where two processes in one folder go unnoticed
    fcntl = None

#: A partial file older than this was left by a killed process, in seconds.
STALE = 3_600


@contextlib.contextmanager
def atomic_file(path: Path):
    """Yield a binary file that becomes ``path`` when the block ends, and leaves nothing when it fails.

    What a SIGKILL leaves, a hidden ``.part`` file, is removed by the next write to the same path an hour later or more.

    :raises ArqError: when the folder cannot be written (no space, no permission).
    """
    path, partial = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{path.name}.*.part"):
            with contextlib.suppress(FileNotFoundError):  # another process has just finished it
                if time.time() - left.stat().st_mtime > STALE:
                    left.unlink()
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".part", delete=False) as file:
            partial = Path(file.name)
            yield file.file
        partial.chmod(0o644)
        os.replace(partial, path)
    except OSError as error:
        raise ArqError(
            f"cannot write {path} ({error.strerror or error}): free some space there, or choose another folder "
            "(ARQ_DATA for data sets, --output for runs)"
        ) from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def write_json(path: Path, document: dict) -> None:
    """Write ``document`` as indented JSON, whole or not at all."""
    with atomic_file(path) as file:
        file.write((json.dumps(document, indent=2) + "\n").encode())


def lock(path: Path):
    """Keep other processes from writing a file; return what holds the lock until it is closed, or this process ends.

    :raises ArqError: when another process holds it
    """
    file = open(path, "a")  # noqa: SIM115 (whoever holds the lock closes it)
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ArqError(f"another process is writing {path}: wait until it has ended, or choose another --output") from error
    return file


def drop_partial_line(path: Path) -> None:
    """Cut off a last line without its end, which a kill left."""
    if path.exists():
        data = path.read_bytes()
        if not data.endswith(b"\n"):
            with atomic_file(path) as file:
                file.write(data[: data.rfind(b"\n") + 1])


def sha256(data) -> str:
    """SHA-256 of a buffer (bytes or a C-contiguous array), as hex."""
    return hashlib.sha256(data).hexdigest()
