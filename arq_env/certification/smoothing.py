"""Randomized smoothing: the certificate of Cohen et al. 2019."""

import functools
import time
from collections.abc import Callable

import numpy as np
import torch

from arq_env.certification.bounds import clopper_pearson_lower, smoothing_radius
from arq_env.certification.certificates import ABSTAINED, Certificates
from arq_env.errors import ArqError
from arq_env.files import sha256

#: Images handed to one task of ``map``.
CHUNK = 16
METHODS = ("cohen",)
_SELECTION, _ESTIMATION = 0, 1  # the two independent noise streams of an image


def certify(
    classifier: Callable,
    images,
    labels,
    *,
    sigma: float,
    n0: int = 100,
    n: int = 10_000,
    alpha: float = 0.001,
    seed: int = 0,
    method: str = "cohen",
    batch_size: int | None = None,
    map: Callable = map,
    progress: Callable = iter,
) -> Certificates:
    """Certify the smoothed classifier g(x) = argmax_c P(f(x + e) = c), e ~ N(0, sigma^2 I), at each image.

    With probability at least 1 - alpha over the noise, and for each image by itself: g is constant, and equal to the
    prediction, within the radius around the image. The noise of an image follows from ``seed`` and the image's own
    pixels, so neither batch size nor the order of the images nor ``map`` changes what the classifier is asked; only where a
    classifier itself rounds differently in another batch can a near-tie between logits fall the other way.

    :param classifier: f, from a batch [b, ...] of noisy images to logits [b, classes] or labels [b]. A torch module gets
        float32 tensors on its own device; any other function gets what ``images`` is, arrays or tensors.
    :param images: [n, c, h, w] in [0, 1], before normalisation: NumPy array or tensor
    :param labels: [n] integers
    :param sigma: standard deviation of the noise, in the units of the pixels
    :param n0: noise samples that select the class
    :param n: fresh noise samples that count it
    :param alpha: probability that a certificate fails; all of it is spent on the bound of the count
    :param method: "cohen" (CERTIFY, Cohen et al. 2019, section 3.2.2)
    :param batch_size: noisy images a forward pass; by default 32 on a CPU, whose caches larger batches overflow, else 1,024
    :param map: anything with the built-in ``map``'s calling sequence; calls run the classifier on chunks of 16 images
    :param progress: wraps the iterable of finished chunks, such as ``tqdm``
    :raises ArqError: for arguments out of range, and for NaN or infinite logits
    """
    device = _device(classifier, images)
    if batch_size is None:
        batch_size = 32 if device is None or device.type == "cpu" else 1_024
    images, labels = _checked(classifier, images, labels, sigma, n0, n, alpha, method, batch_size, seed)
    task = functools.partial(
        _certify_chunk, classifier, device, sigma=sigma, n0=n0, n=n, alpha=alpha, seed=seed, batch_size=batch_size
    )
    starts = range(0, len(images), CHUNK)
    chunks = [(start, images[start : start + CHUNK]) for start in starts]
    parts = list(progress(map(task, chunks)))
    prediction, radius, seconds = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Certificates(labels, prediction, radius, np.full(len(images), n), seconds)


def _certify_chunk(classifier, device, chunk, *, sigma, n0, n, alpha, seed, batch_size):
    """CERTIFY for a chunk of images: (prediction, radius, seconds), one entry an image."""
    first, images = chunk
    start = time.perf_counter()
    predict = functools.partial(_predict, classifier, device, images, first, sigma=sigma, batch_size=batch_size)
    selected = np.array([np.bincount(row).argmax() for row in predict(_streams(images, seed, _SELECTION), n0)])
    counts = (predict(_streams(images, seed, _ESTIMATION), n) == selected[:, None]).sum(axis=1)
    lower = clopper_pearson_lower(counts, n, alpha)
    prediction = np.where(lower > 0.5, selected, ABSTAINED)
    seconds = np.full(len(images), (time.perf_counter() - start) / len(images))
    return prediction, smoothing_radius(sigma, lower), seconds


def _streams(images, seed, purpose):
    """One noise generator an image, seeded by the image's bytes."""
    digests = (int(sha256(np.ascontiguousarray(image)), 16) for image in images)
    return [np.random.Generator(np.random.SFC64([seed, purpose, digest])) for digest in digests]


def _predict(classifier, device, images, first, streams, n, *, sigma, batch_size) -> np.ndarray:
    """Predicted classes of ``n`` noisy copies of each image, batches running on across images: int64 [images, n]."""
    predictions = np.empty(len(images) * n, np.int64)
    channels_last = images.ndim == 4
    images = np.ascontiguousarray(np.moveaxis(images, 1, -1)) if channels_last else images
    for start in range(0, len(predictions), batch_size):
        rows = np.arange(start, min(start + batch_size, len(predictions))) // n
        noisy = np.empty((len(rows), *images.shape[1:]), np.float32)
        for row in range(rows[0], rows[-1] + 1):
            here = slice(*np.searchsorted(rows, (row, row + 1)))
            streams[row].standard_normal(out=noisy[here], dtype=np.float32)
        noisy *= np.float32(sigma)
        noisy += images[rows]
        batch = np.moveaxis(noisy, -1, 1) if channels_last else noisy
        predictions[start : start + len(rows)] = _classes(classifier, device, batch, first + rows)
    return predictions.reshape(len(images), n)


@torch.inference_mode()
def _classes(classifier, device, batch: np.ndarray, rows) -> np.ndarray:
    """Run f on one batch: int64 [b]."""
    output = classifier(np.ascontiguousarray(batch) if device is None else torch.from_numpy(batch).to(device))
    if isinstance(output, torch.Tensor):
        output = output.float().cpu().numpy() if output.is_floating_point() else output.cpu().numpy()
    output = np.asarray(output)
    if output.ndim not in (1, 2) or len(output) != len(batch):
        raise ArqError(
            f"the classifier gave shape {output.shape} for {len(batch)} images: it must give [b, classes] logits or [b] labels"
        )
    if output.ndim == 1:
        return output.astype(np.int64)
    finite = np.isfinite(output).all(axis=1)
    if not finite.all():
        raise ArqError(
            f"the classifier gave NaN or infinite logits for noisy copies of image {rows[~finite][0]}: nothing is certified"
        )
    return output.argmax(axis=1)


def _checked(classifier, images, labels, sigma, n0, n, alpha, method, batch_size, seed):
    """Images as float32 and labels as int64 arrays, or an ArqError."""
    if isinstance(classifier, torch.nn.Module) and classifier.training:
        raise ArqError(
            "the classifier is in training mode, in which its output depends on the rest of the batch: call eval() first"
        )
    if method not in METHODS:
        raise ArqError(f"there is no certification method {method!r}: choose one of {', '.join(METHODS)}")
    if not (np.isfinite(sigma) and sigma > 0):
        raise ArqError(f"sigma is {sigma}: give a positive standard deviation, in units of pixels in [0, 1]")
    if not 0 < alpha < 1:
        raise ArqError(f"alpha is {alpha}: give the probability of failure, in (0, 1)")
    for name, value, low in (("n0", n0, 1), ("n", n, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
        if value < low:
            raise ArqError(f"{name} is {value}: give at least {low}")
    images = np.asarray(images.cpu() if isinstance(images, torch.Tensor) else images, np.float32)
    labels = np.asarray(labels.cpu() if isinstance(labels, torch.Tensor) else labels)
    if len(images) == 0 or labels.shape != (len(images),):
        raise ArqError(
            f"there are {len(images)} images and labels of shape {labels.shape}: give one label an image, and at least one image"
        )
    if not (images.min() >= 0 and images.max() <= 1):  # also false for NaN
        raise ArqError(
            f"pixels range from {images.min():g} to {images.max():g}: give images in [0, 1] and let the classifier normalise"
        )
    return images, labels.astype(np.int64)


def _device(classifier, images):
    """Where the batches go as tensors; None when they stay NumPy arrays."""
    if isinstance(classifier, torch.nn.Module):
        return next((parameter.device for parameter in classifier.parameters()), torch.device("cpu"))
    return images.device if isinstance(images, torch.Tensor) else None
