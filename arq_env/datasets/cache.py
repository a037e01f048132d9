"""One cache folder for data sets, and files that are either whole or not there."""

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

import platformdirs

from arq_env.errors import ArqError


def cache_folder() -> Path:
    """``$ARQ_DATA`` if it is set, else the user's cache folder for ``arq-env``."""
    return Path(os.environ.get("ARQ_DATA") or platformdirs.user_cache_dir("arq-env"))


@contextlib.contextmanager
def atomic_file(path: Path):
    """Yield a binary file that becomes ``path`` when the block ends, and leaves nothing when it fails.

    :raises ArqError: when the folder cannot be written (no space, no permission).
    """
    path, partial = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
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


def sha256(data) -> str:
    """SHA-256 of a buffer (bytes or a C-contiguous array), as hex."""
    return hashlib.sha256(data).hexdigest()
