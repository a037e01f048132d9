"""From whole arrays to tasks of a few images, the same for every method: checks, devices, and any ``map``."""

import functools
import hashlib
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from arq_env.certification.sampling import Sampler
from arq_env.errors import ArqError

#: Most images, and most noise samples (about), of one task of ``map``; what a kill can lose.
CHUNK, CHUNK_SAMPLES = 16, 16_384


def run_in_chunks(
    task: Callable,
    classifier: Callable,
    pixels,
    device,
    rows,
    *,
    sigma,
    seed,
    n,
    batch_size,
    map,
    progress,
    beside=lambda rows: None,
) -> Iterator[tuple[np.ndarray, tuple, float]]:
    """Call ``task(sampler, rows, beside(rows))`` for a few images at a time; yield (rows, its result, seconds an image).

    :param pixels: the images as :func:`checked_images` gives them, and ``device`` as it gives it
    :param rows: indices of the images to do
    :param n: noise samples an image needs, about
    :param beside: called here, not in ``map``'s workers: what a task needs of something too large to send to each
    """
    if batch_size is None:
        batch_size = 32 if device is None or device.type == "cpu" else 1_024
    size = max(1, min(CHUNK, CHUNK_SAMPLES // n))
    parts = [part for part in np.split(rows, range(size, len(rows), size)) if len(part)]
    chunks = ((part, pixels[part], beside(part)) for part in parts)
    settings = {"sigma": sigma, "seed": seed, "batch_size": batch_size, "device": device}
    run = functools.partial(_run, task, classifier, settings)
    return progress(map(run, chunks), total=len(parts))


def _run(task, classifier, settings, chunk):
    rows, images, beside = chunk
    start = time.perf_counter()
    result = task(Sampler(classifier, images, rows, **settings), rows, beside)
    return rows, result, (time.perf_counter() - start) / len(rows)


def no_progress(iterable, total):
    """What ``progress`` is by default: the iterable, and nothing shown."""
    return iterable


def checked_images(classifier, images, *, sigma, n0, n, seed, batch_size) -> tuple[np.ndarray, torch.device | None]:
    """The images as a float32 array, and where their batches go as tensors (None when they stay NumPy arrays).

    :raises ArqError: unless the arguments that all methods share can be used
    """
    if isinstance(classifier, torch.nn.Module) and any(module.training for module in classifier.modules()):
        raise ArqError(
            "the classifier is in training mode, in which its output depends on the rest of the batch: call eval() first"
        )
    if not (np.isfinite(sigma) and sigma > 0):
        raise ArqError(f"sigma is {sigma}: give a positive standard deviation, in units of pixels in [0, 1]")
    for name, value, low in (
        ("n0", n0, 1),
        ("n", n, 1),
        ("batch_size", 1 if batch_size is None else batch_size, 1),
        ("seed", seed, 0),
    ):
        if value < low:
            raise ArqError(f"{name} is {value}: give at least {low}")
    pixels = np.asarray(on_cpu(images), np.float32)
    if len(pixels) == 0:
        raise ArqError("there are 0 images: give at least one image")
    if not (pixels.min() >= 0 and pixels.max() <= 1):  # also false for NaN
        raise ArqError(
            f"pixels range from {pixels.min():g} to {pixels.max():g}: give images in [0, 1] and let the classifier normalise"
        )
    if isinstance(classifier, torch.nn.Module):
        return pixels, next((parameter.device for parameter in classifier.parameters()), torch.device("cpu"))
    return pixels, images.device if isinstance(images, torch.Tensor) else None


def on_cpu(values):
    """What NumPy can read: a tensor's copy in main memory, anything else as it is."""
    return values.cpu() if isinstance(values, torch.Tensor) else values


def classifier_digest(classifier: Callable, name: str = "") -> str:
    """What a file of results belongs to: SHA-256 of a torch module's structure and state, or a plain function's name.

    :raises ArqError: for a function without a name, which cannot be told from another
    """
    if not isinstance(classifier, torch.nn.Module):
        if not name:
            raise ArqError(
                "a plain function cannot be told from another: give name=, such as its model file's digest, to keep its results"
            )
        return name
    digest = hashlib.sha256((name + repr(classifier)).encode())
    for key, value in classifier.state_dict().items():
        digest.update(key.encode())
        if isinstance(value, torch.Tensor) and not value.is_quantized:
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()
