"""Files that are either whole or not there."""

import contextlib
import errno
import glob
import hashlib
import json
import os
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

from arq_env.support.errors import ArqError, shown

try:
    import fcntl
except ImportError:  # Windows, where two processes in one folder go unnoticed
    fcntl = None  # type: ignore[assignment]

#: A partial file older than this was left by a killed process, in seconds.
STALE = 3_600


def checked_path(name: str, value) -> Path:
    """The argument as a path.

    :raises ArqError: for what no file can be called
    """
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise ArqError(f"{name} is {shown(value)}: give the path of a file")
    return Path(text)


@contextlib.contextmanager
def writing(path: Path):
    """Turn what the block raises when there is no space or no permission into one sentence about ``path``.

    :raises ArqError: for any OSError
    """
    try:
        yield
    except OSError as error:
        raise ArqError(
            f"cannot write {path} ({error.strerror or error}): free some space there, or choose another folder "
            "(ARQ_DATA for data sets, --output for runs)"
        ) from error


@contextlib.contextmanager
def atomic_file(path: Path):
    """Yield a binary file that becomes ``path`` when the block ends, and leaves nothing when it fails.

    It is on the disk before it has its name, so that a power cut leaves the old file or the new one. What a SIGKILL leaves, a
    hidden ``.part`` file, is removed by the next write to the same path an hour later or more.

    :raises ArqError: when the folder cannot be written (no space, no permission).
    """
    path, partial = Path(path), None
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
                with contextlib.suppress(FileNotFoundError):  # another process has just finished it
                    if time.time() - left.stat().st_mtime > STALE:
                        left.unlink()
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".part", delete=False) as file:
                partial = Path(file.name)
                yield file.file
                file.flush()
                os.fsync(file.fileno())
            partial.chmod(0o644)
            os.replace(partial, path)
            _sync_folder(path.parent)
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Put the names of a folder's files on the disk, where the system can."""
    with contextlib.suppress(OSError):  # Windows opens no folders, and some file systems sync none
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, document: dict | list) -> None:
    """Write ``document`` as indented JSON, whole or not at all."""
    with atomic_file(path) as file:
        file.write((json.dumps(document, indent=2) + "\n").encode())


def read_json(path: Path) -> dict:
    """The JSON object in a file; what reading raises is left to the caller, who knows what the file is.

    :raises OSError: when there is no such file
    :raises ValueError: as :func:`parse_json`
    """
    return parse_json(Path(path).read_bytes())


def parse_json(data: bytes) -> dict:
    """The JSON object that ``data`` is, in UTF-8; a byte-order mark is skipped.

    :raises ValueError: when it is something else, nests too deep, or gives an entry twice
    """
    try:
        document = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("it nests too deep") from error
    if not isinstance(document, dict):
        raise ValueError("it is not a JSON object")
    return document


def _object(pairs: list[tuple]) -> dict:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it gives {name!r} twice")
    return entries


def lock(path: Path):
    """Keep other processes from writing a file; return what holds the lock until it is closed, or this process ends.

    Where the file system has no locks this warns and goes on.

    :raises ArqError: when another process holds it, or the file cannot be written
    """
    with writing(path):
        file = open(path, "a")  # noqa: SIM115 (whoever holds the lock closes it)
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            file.close()
            raise ArqError(f"another process is writing {path}: wait until it has ended, or choose another --output") from error
        warnings.warn(
            f"the file system of {path} has no locks ({error.strerror or error}): take care that no other process writes there",
            stacklevel=2,
        )
    return file


def drop_partial_line(path: Path) -> None:
    """Cut off a last line without its end, which a kill left."""
    if path.exists():
        with writing(path):
            data = path.read_bytes()
        if not data.endswith(b"\n"):
            with atomic_file(path) as file:
                file.write(data[: data.rfind(b"\n") + 1])


def sha256(data) -> str:
    """SHA-256 of a buffer (bytes or a C-contiguous array), as hex."""
    return hashlib.sha256(data).hexdigest()
