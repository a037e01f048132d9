"""The one folder that data sets are kept in."""

import os
import zipfile
from pathlib import Path

import numpy as np
import platformdirs

from arq_env.support.errors import ArqError
from arq_env.support.files import atomic_file

Arrays = dict[str, tuple[np.ndarray, np.ndarray]]


def cache_folder() -> Path:
    """``$ARQ_DATA`` if it is set, ``~`` in it expanded, else the user's cache folder for ``arq-env``."""
    return Path(os.environ.get("ARQ_DATA") or platformdirs.user_cache_dir("arq-env")).expanduser()


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Write ``{"train": (images, labels), "test": (images, labels)}``, whole or not at all."""
    flat = {f"{split}_{kind}": array for split, pair in arrays.items() for kind, array in zip(_KINDS, pair, strict=True)}
    with atomic_file(path) as file:
        np.savez(file, **flat)  # type: ignore[arg-type]  # mypy takes an array for allow_pickle


def read_arrays(path: Path) -> Arrays:
    """Read what :func:`write_arrays` wrote.

    :raises ArqError: when the file is damaged
    """
    try:
        with open(path, "rb") as stream, np.load(stream) as file:
            return {split: tuple(file[f"{split}_{kind}"] for kind in _KINDS) for split in ("train", "test")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ArqError(f"{path} cannot be read ({error}): delete it and run again") from error


_KINDS = ("images", "labels")
