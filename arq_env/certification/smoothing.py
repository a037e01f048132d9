"""Randomized smoothing: certificates for any classifier, by any of the methods."""

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from arq_env.certification.bounds import smoothing_radius
from arq_env.certification.cache import PredictionCache
from arq_env.certification.certificates import ABSTAINED, CertificateLog, Certificates
from arq_env.certification.chunks import checked_images, classifier_digest, no_progress, on_cpu, run_in_chunks
from arq_env.certification.methods import METHODS, SKIPPING, Request
from arq_env.errors import ArqError
from arq_env.files import sha256

_OWN_ARGUMENTS = {"sequential": ("radius", "price"), "incremental": ("gamma",), "paired": ("gamma",)}


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
    skip_wrong: bool = False,
    batch_size: int | None = None,
    map: Callable = map,
    progress: Callable = no_progress,
    log: Path | None = None,
    name: str = "",
) -> Certificates:
    """Certify the smoothed classifier g(x) = argmax_c P(f(x + e) = c), e ~ N(0, sigma^2 I), at each image.

    With probability at least 1 - alpha over the noise, and for each image by itself: g is constant, and equal to the
    prediction, within the radius around the image. The noise of an image follows from ``seed`` and the image's own
    pixels, so neither batch size nor the order of the images nor ``map`` changes what the classifier is asked; only where a
    classifier itself rounds differently in another batch can a near-tie between logits fall the other way. As everywhere in the
    field, the statement is about exact Gaussian noise; this noise is float32.

    Methods:

    - ``cohen`` as published (Cohen et al. 2019): what to report.
    - ``randomized``: the same samples, a bound that spends alpha to the last (Voracek 2024). Radii are a little larger and
      depend on one uniform draw an image, which is recorded.
    - ``sequential``: each image gets the samples it is worth, up to n, counted by ``randomized``'s bound, and images whose
      first n0 samples point to a wrong class get none: they abstain, where ``cohen`` would name that class. With ``radius``,
      samples until it is clear whether that radius holds; other images abstain.
    - ``incremental`` (IRS, Ugare et al. 2024) and ``paired``, never worse on the same samples: for a network that
      differs little from one whose predictions are in ``cache``.

    :param classifier: f, from a batch [b, ...] of noisy images to logits [b, classes] or labels [b]. A torch module gets
        float32 tensors on its own device, channels-last in memory where its convolutions are; any other function gets what
        ``images`` is, arrays or tensors.
    :param images: [n, c, h, w] in [0, 1], before normalisation: NumPy array or tensor
    :param labels: [n] whole numbers, -1 where unknown
    :param sigma: standard deviation of the noise, in the units of the pixels
    :param n0: noise samples that select the class
    :param n: fresh noise samples that count it; at most so many for ``sequential``, replayed ones for ``incremental``
    :param alpha: probability that an image's certificate fails, whatever the method
    :param method: one of the above
    :param radius: for ``sequential``: the one radius to decide, in the units of the pixels
    :param price: for ``sequential``: the radius, in units of sigma, that n samples must gain to be worth drawing; a lower price
        buys more samples (``experiments/benchmark_methods.py`` shows what for)
    :param cache: for ``incremental`` and ``paired``: made by :func:`arq_env.certification.cache_predictions`
    :param gamma: for ``incremental`` and ``paired``: count afresh where the cached pA is at least this
    :param skip_wrong: for ``cohen`` and ``randomized``: draw none of the n samples of images whose first n0 point to a wrong
        class, and abstain there. ACR and every accuracy stay exactly as they are, a wrong prediction's radius is not known
    :param batch_size: noisy images a forward pass; by default 32 on a CPU, whose caches larger batches overflow, else 1,024
    :param map: anything with the built-in ``map``'s calling sequence, such as a pool's; calls run the classifier on a few images
    :param progress: called as ``progress(iterable, total=chunks)``, such as ``tqdm``
    :param log: TSV file to which images are appended as they are done, every 16 or, for n above 8,192, each; a second call
        with the same arguments goes on there. Two processes must not share one
    :param name: for a plain function with a ``log``: what tells it from another; a torch module is known by its weights
    :raises ArqError: for arguments out of range, for NaN or infinite logits, and for another call's log or cache
    """
    _check_method(method, sigma, n, alpha, seed, radius, price, cache, gamma, skip_wrong)
    pixels, device = checked_images(classifier, images, sigma=sigma, n0=n0, n=n, seed=seed, batch_size=batch_size)
    labels = _checked_labels(labels, len(pixels))
    target = None if radius is None else float(radius)
    request = Request(float(sigma), int(n0), int(n), float(alpha), target, price, gamma, skip_wrong)
    table = CertificateLog(log, functools.partial(_identity, classifier, name, pixels, labels, request, method, int(seed), cache))
    chunks = run_in_chunks(
        functools.partial(_certify, METHODS[method], labels, request),
        classifier,
        pixels,
        device,
        np.setdiff1d(np.arange(len(pixels)), table.done),
        sigma=request.sigma,
        seed=int(seed),
        n=request.n,
        batch_size=batch_size,
        map=map,
        progress=progress,
        beside=functools.partial(_cached_rows, cache, pixels),
    )
    for rows, columns, seconds in chunks:
        table.append(rows, labels[rows], *columns, np.full(len(rows), seconds))
    return table.certificates()


def _certify(method, labels, request, sampler, rows, cached):
    """One chunk: its columns prediction, radius, n and draw."""
    selected, lower, n, draw = method(sampler, labels[rows], replace(request, cached=cached))
    prediction = np.where(lower > 0.5, selected, ABSTAINED)
    return prediction, smoothing_radius(request.sigma, lower), n, draw


def _cached_rows(cache, pixels, rows):
    """The cache's entries for some of the images."""
    return cache and cache.rows([sha256(np.ascontiguousarray(pixels[row])) for row in rows])


def _identity(classifier, name, pixels, labels, request, method, seed, cache) -> dict:
    """What a log belongs to."""
    used = ("sigma", "n0", "n", "alpha", *_OWN_ARGUMENTS.get(method, ()), *(("skip_wrong",) if request.skip_wrong else ()))
    return {field: getattr(request, field) for field in used} | {
        "method": method,
        "seed": seed,
        "images": sha256(np.ascontiguousarray(pixels)),
        "labels": sha256(labels),
        "classifier": classifier_digest(classifier, name),
        "cache": cache and sha256(np.ascontiguousarray(cache.predictions)),
    }


def estimate_seconds(
    classifier: Callable, images, *, n0: int = 100, n: int = 10_000, batch_size: int | None = None, map: Callable = map
) -> float:
    """How long ``certify`` by ``cohen`` would take on these images in one process, from about a second of it.

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


def _checked_labels(labels, count: int) -> np.ndarray:
    """Labels as int64, or an ArqError."""
    labels = np.asarray(on_cpu(labels))
    if labels.shape != (count,):
        raise ArqError(f"there are {count} images and labels of shape {labels.shape}: give one label an image")
    if not ((labels >= -1) & (labels == np.floor(labels))).all():
        raise ArqError("labels must be whole numbers from 0, or -1 where unknown")
    return labels.astype(np.int64)


def _check_method(method, sigma, n, alpha, seed, radius, price, cache, gamma, skip_wrong):
    """Raise an ArqError unless the method is there and its own arguments can be used."""
    if method not in METHODS:
        raise ArqError(f"there is no certification method {method!r}: choose one of {', '.join(METHODS)}")
    if not 0 < alpha < 1:
        raise ArqError(f"alpha is {alpha}: give the probability of failure, in (0, 1)")
    if radius is not None and not (method == "sequential" and np.isfinite(radius) and radius >= 0):
        raise ArqError(f"radius is {radius} for {method}: give one that is not negative, and only to method='sequential'")
    if not price > 0:
        raise ArqError(f"price is {price}: give a positive number of sigmas")
    if not 0.5 <= gamma <= 1:
        raise ArqError(f"gamma is {gamma}: give a probability from 0.5 to 1")
    if skip_wrong and method not in SKIPPING:
        raise ArqError(f"skip_wrong is for {' and '.join(map(repr, SKIPPING))}, not {method!r}: leave it out")
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
