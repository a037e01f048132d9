"""Randomized smoothing: certificates for any classifier, by any of the methods."""

import functools
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from arq_env.certification.bounds import smoothing_radius
from arq_env.certification.cache import PredictionCache
from arq_env.certification.certificates import ABSTAINED, CertificateLog, Certificates
from arq_env.certification.chunks import as_array, check_request, classifier_digest, no_progress, run_in_chunks
from arq_env.certification.methods import METHODS, Request
from arq_env.errors import ArqError
from arq_env.files import sha256


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
    radius: float | None = None,
    price: float = 0.3,
    cache: PredictionCache | None = None,
    gamma: float = 0.99,
    batch_size: int | None = None,
    map: Callable = map,
    progress: Callable = no_progress,
    log: Path | None = None,
) -> Certificates:
    """Certify the smoothed classifier g(x) = argmax_c P(f(x + e) = c), e ~ N(0, sigma^2 I), at each image.

    With probability at least 1 - alpha over the noise, and for each image by itself: g is constant, and equal to the
    prediction, within the radius around the image. The noise of an image follows from ``seed`` and the image's own
    pixels, so neither batch size nor the order of the images nor ``map`` changes what the classifier is asked; only where a
    classifier itself rounds differently in another batch can a near-tie between logits fall the other way.

    Methods:

    - ``cohen`` as published (Cohen et al. 2019): what to report.
    - ``randomized``: the same samples, a bound that spends alpha to the last (Voracek 2024). Radii are a little larger and
      depend on one uniform draw an image, which is recorded.
    - ``sequential``: each image gets the samples it is worth, up to n, and images whose first n0 samples point to a wrong
      class get none. With ``radius``, samples until it is clear whether that radius holds; other images abstain.
    - ``incremental`` (IRS, Ugare et al. 2024) and ``paired``, never worse on the same samples: for a network that
      differs little from one whose predictions are in ``cache``.

    :param classifier: f, from a batch [b, ...] of noisy images to logits [b, classes] or labels [b]. A torch module gets
        float32 tensors on its own device; any other function gets what ``images`` is, arrays or tensors.
    :param images: [n, c, h, w] in [0, 1], before normalisation: NumPy array or tensor
    :param labels: [n] integers
    :param sigma: standard deviation of the noise, in the units of the pixels
    :param n0: noise samples that select the class
    :param n: fresh noise samples that count it; at most so many for ``sequential``, replayed ones for ``incremental``
    :param alpha: probability that an image's certificate fails, whatever the method
    :param method: one of the above
    :param radius: for ``sequential``: the one radius to decide, in the units of the pixels
    :param price: for ``sequential``: the radius, in units of sigma, that n samples must gain to be worth drawing. 0.3 keeps
        ACR within about 5% of all n, 0.1 within 2%
    :param cache: for ``incremental`` and ``paired``: made by :func:`arq_env.certification.cache_predictions`
    :param gamma: for ``incremental`` and ``paired``: count afresh where the cached pA is at least this
    :param batch_size: noisy images a forward pass; by default 32 on a CPU, whose caches larger batches overflow, else 1,024
    :param map: anything with the built-in ``map``'s calling sequence, such as a pool's; calls run the classifier on a few images
    :param progress: called as ``progress(iterable, total=chunks)``, such as ``tqdm``
    :param log: TSV file to which images are appended as they are done; a second call with the same arguments goes on there
    :raises ArqError: for arguments out of range, for NaN or infinite logits, and for another call's log or cache
    """
    _check(classifier, images, labels, sigma, n0, n, alpha, seed, method, radius, price, cache, gamma, batch_size)
    pixels = as_array(images)
    labels = np.asarray(labels.cpu() if isinstance(labels, torch.Tensor) else labels).astype(np.int64)
    request = Request(sigma, n0, n, alpha, radius, price, gamma, cache)
    table = CertificateLog(log, functools.partial(_identity, classifier, pixels, labels, request, method, seed))
    chunks = run_in_chunks(
        functools.partial(_certify, METHODS[method], labels, request),
        classifier,
        images,
        np.setdiff1d(np.arange(len(pixels)), table.done),
        sigma=sigma,
        seed=seed,
        n=n,
        batch_size=batch_size,
        map=map,
        progress=progress,
    )
    for rows, columns, seconds in chunks:
        table.append(rows, labels[rows], *columns, np.full(len(rows), seconds))
    return table.certificates()


def _certify(method, labels, request, sampler, rows):
    """One chunk: its columns prediction, radius, n and draw."""
    selected, lower, n, draw = method(sampler, labels[rows], request)
    prediction = np.where(lower > 0.5, selected, ABSTAINED)
    return prediction, smoothing_radius(request.sigma, lower), n, draw


def _identity(classifier, pixels, labels, request, method, seed) -> dict:
    """What a log belongs to."""
    fields = dict(vars(request))
    cache = fields.pop("cache")
    return fields | {
        "method": method,
        "seed": seed,
        "images": sha256(np.ascontiguousarray(pixels)),
        "labels": sha256(labels),
        "classifier": classifier_digest(classifier),
        "cache": cache and sha256(np.ascontiguousarray(cache.predictions)),
    }


def estimate_seconds(
    classifier: Callable, images, *, n0: int = 100, n: int = 10_000, batch_size: int | None = None, map: Callable = map
) -> float:
    """How long ``certify`` by ``cohen`` would take on these images, from about a second of it.

    :return: seconds for all the images
    """
    few, labels, samples = images[:2], np.zeros(min(2, len(images))), 15
    run = functools.partial(certify, classifier, few, labels, sigma=1e-3, n0=1, batch_size=batch_size, map=map)
    run(n=1)  # the first batch may compile, or wake a device
    while True:
        start = time.perf_counter()
        run(n=samples)
        elapsed = time.perf_counter() - start
        if elapsed > 0.5 or samples >= n:
            return elapsed / (len(few) * (samples + 1)) * len(images) * (n0 + n)
        samples *= 4


def _check(classifier, images, labels, sigma, n0, n, alpha, seed, method, radius, price, cache, gamma, batch_size):
    if method not in METHODS:
        raise ArqError(f"there is no certification method {method!r}: choose one of {', '.join(METHODS)}")
    if not 0 < alpha < 1:
        raise ArqError(f"alpha is {alpha}: give the probability of failure, in (0, 1)")
    check_request(classifier, images, sigma=sigma, n0=n0, n=n, seed=seed, batch_size=batch_size)
    shape = tuple(getattr(labels, "shape", (len(labels),)))
    if shape != (len(images),):
        raise ArqError(f"there are {len(images)} images and labels of shape {shape}: give one label an image")
    if radius is not None and not (method == "sequential" and np.isfinite(radius) and radius >= 0):
        raise ArqError(f"radius is {radius} for {method}: give one that is not negative, and only to method='sequential'")
    if not price > 0:
        raise ArqError(f"price is {price}: give a positive number of sigmas")
    if not 0.5 <= gamma <= 1:
        raise ArqError(f"gamma is {gamma}: give a probability from 0.5 to 1")
    if (cache is None) == (method in ("incremental", "paired")):
        raise ArqError(
            f"method {method!r} {'needs a' if cache is None else 'takes no'} cache: make one of the original network with "
            "cache_predictions for 'incremental' or 'paired', and for these only"
        )
    if cache is not None and (cache.sigma != sigma or cache.seed != seed or cache.n < n):
        raise ArqError(
            f"the cache was made with sigma {cache.sigma}, seed {cache.seed} and n {cache.n}, not sigma {sigma}, seed {seed} and "
            f"n of at least {n}: make it again with cache_predictions"
        )
