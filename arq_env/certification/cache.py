"""What incremental certification remembers of the original network: per image its class, its counts, its predictions."""

import functools
import math
import os
import tempfile
import tokenize
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from arq_env.certification.chunks import checked_run, no_progress, run_in_chunks
from arq_env.certification.digest import classifier_digest
from arq_env.certification.inputs import checked_name
from arq_env.certification.sampling import BLOCK, ESTIMATION
from arq_env.support.errors import ArqError, reason
from arq_env.support.files import atomic_file, checked_path, sha256

#: Most predictions of a cache, of a byte each where there are at most 256 classes.
MOST_PREDICTIONS = 10**10


@dataclass(frozen=True, eq=False)  # two are equal where they are one: arrays compare entry by entry
class PredictionCache:
    """Predictions of one network on noisy copies of some images (Ugare et al., ICLR 2024, section 3.1).

    Their noise is not stored: it follows from ``seed`` and each image.

    :param classes: int64 [images], selected with n0 samples
    :param counts: int64 [images], how many of the n samples got that class
    :param predictions: [images, n], the smallest unsigned integers that hold the classes
    :param digests: SHA-256 of each image
    :param network: digest of the network, empty for a cache without a file
    """

    classes: np.ndarray
    counts: np.ndarray
    predictions: np.ndarray
    digests: list[str]
    sigma: float
    seed: int
    n0: int
    network: str

    @property
    def n(self) -> int:
        """Noise samples an image."""
        return self.predictions.shape[1]

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        return {digest: place for place, digest in enumerate(self.digests)}

    def rows(self, digests: list[str]) -> "PredictionCache":
        """The cache of some of its images.

        :raises ArqError: when one is not among the cached ones
        """
        try:
            places = [self._places[digest] for digest in digests]
        except KeyError:
            raise ArqError("the cache was made for other images: make it for these, with cache_predictions") from None
        kept = self.classes[places], self.counts[places], self.predictions[places]
        return PredictionCache(*kept, digests, self.sigma, self.seed, self.n0, self.network)

    def blocks(self, rows: np.ndarray, n: int) -> Iterator[np.ndarray]:
        """The first n predictions of the images ``rows``, a block of samples at a time."""
        for start in range(0, n, BLOCK):
            yield self.predictions[rows, start : min(start + BLOCK, n)]

    def save(self, path: Path) -> None:
        """Write everything to one ``.npz`` file."""
        with atomic_file(path) as file:
            np.savez(file, **{name: getattr(self, name) for name in self.__dataclass_fields__})

    @classmethod
    def load(cls, path: Path) -> "PredictionCache":
        """Read such a file.

        :raises ArqError: when it is missing or not such a file
        """
        path = checked_path("path", path)
        try:
            with open(path, "rb") as file:
                fields: dict[str, Any] = dict(_stored(file, cls.__dataclass_fields__))
            kinds = {name: array.dtype.kind + str(array.ndim) for name, array in fields.items()}
            if kinds.pop("predictions") != "u2" or kinds != _KINDS:
                raise ValueError("its arrays are of other kinds")
            fields["digests"] = fields["digests"].tolist()
            cache = cls(**{name: value.item() if getattr(value, "ndim", 1) == 0 else value for name, value in fields.items()})
            images, n = cache.predictions.shape
            if not cache.classes.shape == cache.counts.shape == (images,) or len(cache.digests) != images or images * n == 0:
                raise ValueError("its arrays do not belong together")
            if not (0 < cache.sigma < np.inf and cache.seed >= 0 and cache.n0 >= 1 and (cache.classes >= 0).all()):
                raise ValueError("its sigma, seed, n0 or classes are out of range")
            if not (cache.counts == (cache.predictions == cache.classes[:, None]).sum(1)).all():
                raise ValueError("its counts are not those of its predictions")
            return cache
        except (*_DAMAGED, OSError, ValueError, KeyError, RuntimeError) as error:
            raise ArqError(f"{path} is not a prediction cache ({reason(error)}): make it again with cache_predictions") from error


#: Kind and number of dimensions of the arrays in a file, but for the predictions'.
_KINDS = {"classes": "i1", "counts": "i1", "digests": "U1", "sigma": "f0", "seed": "i0", "n0": "i0", "network": "U0"}


#: What Python raises, beside what is usual, where a file of arrays is none.
_DAMAGED = (EOFError, SyntaxError, tokenize.TokenError, zipfile.BadZipFile)


def _stored(file: BinaryIO, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """The named arrays of an uncompressed ``.npz`` file; nothing is allocated that the file's size does not pay for.

    :raises ValueError: for another kind of file, and where an array says that it is larger than its part of the file
    """
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        for name in names:
            part = archive.getinfo(f"{name}.npy")
            if part.compress_type != zipfile.ZIP_STORED or part.file_size > size:
                raise ValueError(f"its {name} are compressed, or larger than the file")
            with archive.open(part) as content:
                if np.lib.format.read_magic(content) != (1, 0):
                    raise ValueError(f"its {name} are of another version")
                shape, _, kind = np.lib.format.read_array_header_1_0(content)
                if kind.hasobject or min(shape, default=0) < 0 or math.prod(shape) * kind.itemsize > part.file_size:
                    raise ValueError(f"its {name} are not what they say")
            with archive.open(part) as content:
                yield name, np.lib.format.read_array(content, allow_pickle=False)


def cache_predictions(
    classifier: Callable,
    images,
    *,
    sigma: float,
    n0: int = 100,
    n: int = 10_000,
    seed: int = 0,
    path: Path | None = None,
    name: str = "",
    batch_size: int | None = None,
    map: Callable = map,
    progress: Callable = no_progress,
) -> PredictionCache:
    """Run the original network once, for :func:`certify` by :class:`Incremental` or :class:`Paired` on its variants.

    The arguments are those of ``certify``; n x images bytes are kept. It is written when it is whole: a killed call starts again.

    :param path: file to keep the cache in; one that is there is read instead of made again
    :param name: for a plain function with a ``path``: what tells it from another
    :raises ArqError: for arguments out of range, for a ``map`` that does not give each result once, and for a file made with
        another network, sigma, seed, n0, n or images
    """
    run = checked_run(classifier, images, sigma=sigma, n0=n0, n=n, seed=seed, batch_size=batch_size, map=map, progress=progress)
    if len(run.pixels) * run.n > MOST_PREDICTIONS:
        raise ArqError(
            f"n is {run.n:,} for {len(run.pixels):,} images: a cache keeps at most {MOST_PREDICTIONS:,} predictions in all, so "
            "give a smaller n or fewer images"
        )
    path = None if path is None else checked_path("path", path)
    tied_to: dict[str, Any] = {
        "digests": [sha256(np.ascontiguousarray(image)) for image in run.pixels],
        "sigma": run.sigma,
        "seed": run.seed,
        "n0": run.n0,
        "network": "" if path is None else classifier_digest(classifier, checked_name(name)),
    }
    if path is not None and os.path.lexists(path):
        cache = PredictionCache.load(path)
        for field, value in (tied_to | {"n": run.n}).items():
            if getattr(cache, field) != value:
                what = "other images" if field == "digests" else f"another {field}"
                raise ArqError(f"{path} was made with {what}: choose another file for this cache")
        return cache
    if path is not None:
        _check_writable(path)  # before the work instead of after it
    chunks = run_in_chunks(functools.partial(_predict, n0=run.n0, n=run.n), run, np.arange(len(run.pixels)))
    parts = [done.result for done in sorted(chunks, key=lambda done: done.rows[0])]  # map may be unordered
    classes, predictions = (np.concatenate(column) for column in zip(*parts, strict=True))
    counts = (predictions == classes[:, None]).sum(1)
    cache = PredictionCache(classes, counts, predictions, **tied_to)
    if path is not None:
        cache.save(path)
    return cache


def _check_writable(path: Path) -> None:
    """Raise an ArqError unless a file can be made beside this one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ArqError(f"cannot write {path} ({error.strerror or error}): choose another file for the cache") from error


def _predict(sampler, rows, beside, *, n0, n):
    classes, _ = sampler.select(n0)
    blocks = [sampler.predict(ESTIMATION, min(BLOCK, n - start)) for start in range(0, n, BLOCK)]
    return classes, np.concatenate([block.astype(np.min_scalar_type(int(block.max()))) for block in blocks], axis=1)
