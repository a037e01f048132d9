"""From whole arrays to tasks of a few images, the same for every method: checks, devices, and any ``map``."""

import concurrent.futures
import functools
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from arq_env.certification.grid import GridTable
from arq_env.certification.inputs import (
    MOST_N,
    MOST_N0,
    MOST_SEED,
    checked_classifier,
    checked_pixels,
    checked_sigma,
    device_of,
    first_line,
    function,
    shown,
    whole,
)
from arq_env.certification.sampling import Sampler
from arq_env.support.errors import ArqError

#: Most images, and most noise samples (about), of one task of ``map``: what a kill can lose, and what workers wait for.
CHUNK, CHUNK_SAMPLES = 16, 4_096


def no_progress(iterable, total):
    """What ``progress`` is by default: the iterable, and nothing shown."""
    return iterable


@dataclass(frozen=True)
class Run:
    """What ``certify`` and ``cache_predictions`` are both asked for, checked.

    :param pixels: float32 [n, ...] in [0, 1]
    :param device: where batches go as tensors; None when they stay NumPy arrays
    :param grid: draws the noise; None for float32 noise
    """

    classifier: Callable
    pixels: np.ndarray
    device: torch.device | None
    sigma: float
    n0: int
    n: int
    seed: int
    batch_size: int
    map: Callable
    progress: Callable
    grid: GridTable | None = None


def checked_run(classifier, images, *, sigma, n0, n, seed, batch_size, map, progress) -> Run:
    """The arguments that both have, in one form.

    :raises ArqError: unless they can be used; it names the argument
    """
    checked_classifier(classifier)
    sigma = checked_sigma(sigma)
    n0, n, seed = whole("n0", n0, 1, MOST_N0), whole("n", n, 1, MOST_N), whole("seed", seed, 0, MOST_SEED)
    pixels = checked_pixels(images)
    device: torch.device | None = None
    if isinstance(classifier, torch.nn.Module):
        device = device_of(classifier)
    elif isinstance(images, torch.Tensor):
        device = images.device
    default = 32 if device is None or device.type == "cpu" else 1_024
    batch_size = default if batch_size is None else whole("batch_size", batch_size, 1, 2**31 - 1)
    function("map", map, "task", "chunks")
    function("progress", progress, "iterable", total="total")
    return Run(classifier, pixels, device, sigma, n0, n, seed, batch_size, map, progress)


@dataclass(frozen=True)
class Done:
    """A task's result.

    :param rows: indices of its images
    :param result: arrays of one entry (or row) an image
    :param seconds: an image took
    """

    rows: np.ndarray
    result: tuple
    seconds: float


class _Chunks(Sequence):
    """What ``map`` is given: a sequence, since not every engine takes an iterator; each part is made when it is asked for."""

    def __init__(self, parts: list[np.ndarray], pixels, beside: Callable):
        self.parts, self._pixels, self._beside = parts, pixels, beside

    def __len__(self):
        return len(self.parts)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return _Chunks(self.parts[index], self._pixels, self._beside)
        part = self.parts[index]
        return part, self._pixels[part], self._beside(part)


def nothing(rows) -> None:
    """What goes beside some images by default: nothing."""


def run_in_chunks(task: Callable, run: Run, rows: np.ndarray, beside: Callable = nothing) -> Iterator[Done]:
    """Call ``task(sampler, rows, beside(rows))`` for a few images at a time; yield what is done as ``map`` gives it.

    :param rows: indices of the images to do
    :param beside: called here, not in ``map``'s workers: what a task needs of something too large to send to each
    :raises ArqError: when ``map`` does not give one result for each task, or the classifier or a worker does not live through it
    """
    size = max(1, min(CHUNK, CHUNK_SAMPLES // run.n))
    chunks = _Chunks([part for part in np.split(rows, range(size, len(rows), size)) if len(part)], run.pixels, beside)
    settings = {"sigma": run.sigma, "seed": run.seed, "batch_size": run.batch_size, "device": run.device, "grid": run.grid}
    work, left = functools.partial(_work, task, run.classifier, settings), {part[0]: part for part in chunks.parts}
    for done in _results(run, work, chunks):
        if not isinstance(done, Done):
            raise ArqError(f"map gave {shown(done)} where a task's result was due: give a map that returns results, as map() does")
        if not np.array_equal(left.pop(done.rows[0], np.empty(0)), done.rows):
            raise ArqError(f"map gave the result for image {done.rows[0]} twice: give a map that calls the function once a task")
        yield done
    if left:
        missing = np.concatenate(list(left.values()))
        raise ArqError(
            f"map or progress gave no result for {len(missing)} of {len(rows)} images, the first of them {missing[0]}: give "
            "functions that pass on every result"
        )


def _results(run: Run, work: Callable, chunks: _Chunks):
    """Whatever ``map`` and ``progress`` give, with the errors of their workers in one sentence."""
    try:
        results = run.progress(run.map(work, chunks), total=len(chunks))
        if not hasattr(results, "__iter__"):
            raise ArqError(f"map or progress gave {shown(results)}: give functions that return what can be iterated over")
        yield from results
    except concurrent.futures.BrokenExecutor as error:
        raise ArqError(
            f"a worker process ended before its task ({first_line(error)}): see whether it was killed, ran out of memory or could "
            "not import the classifier; with a log, the same call goes on"
        ) from error
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        if "pickle" not in str(error):
            raise
        raise ArqError(
            f"map sends tasks to other processes, and the classifier cannot be sent ({first_line(error)}): give a torch module, or "
            "a function that a module defines by its name"
        ) from None


def _work(task, classifier, settings, chunk) -> Done:
    rows, images, beside = chunk
    start = time.perf_counter()
    result = task(Sampler(classifier, images, rows, **settings), rows, beside)
    return Done(rows, result, (time.perf_counter() - start) / len(rows))
