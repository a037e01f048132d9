"""Randomized smoothing: certificates for any classifier, by any of the methods."""

import bisect
import functools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from arq_env.certification.bounds import smoothing_radius
from arq_env.certification.cache import PredictionCache
from arq_env.certification.certificates import ABSTAINED, CertificateLog, Certificates
from arq_env.certification.chunks import checked_run, no_progress, run_in_chunks
from arq_env.certification.digest import classifier_digest
from arq_env.certification.inputs import (
    MOST_N,
    MOST_N0,
    checked_alpha,
    checked_labels,
    checked_name,
    checked_path,
    checked_pixels,
    real,
    shown,
    whole,
)
from arq_env.certification.methods import METHODS, SKIPPING, Request, can_certify, planned_samples
from arq_env.support.errors import ArqError
from arq_env.support.files import sha256

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
    :param images: [n, c, h, w] in [0, 1], before normalisation: floating-point NumPy array or tensor; up to 1e-6 outside is clipped
    :param labels: [n] whole numbers, -1 where unknown
    :param sigma: standard deviation of the noise, in the units of the pixels, from 1e-6 to 1e6
    :param n0: noise samples that select the class, up to a million
    :param n: fresh noise samples that count it, up to a billion; at most so many for ``sequential``, replayed ones for
        ``incremental``
    :param alpha: probability that an image's certificate fails, whatever the method
    :param method: one of the above
    :param radius: for ``sequential``: the one radius to decide, in the units of the pixels
    :param price: for ``sequential``: the radius, in units of sigma, that n samples must gain to be worth drawing; a lower price
        buys more samples (``experiments/benchmarks/methods.py`` shows what for)
    :param cache: for ``incremental`` and ``paired``: made by :func:`arq_env.certification.cache_predictions`
    :param gamma: for ``incremental`` and ``paired``: count afresh where the cached pA is at least this
    :param skip_wrong: for ``cohen`` and ``randomized``: draw none of the n samples of images whose first n0 point to a wrong
        class, and abstain there. ACR and every accuracy stay exactly as they are, a wrong prediction's radius is not known
    :param batch_size: noisy images a forward pass; by default 32 on a CPU, whose caches larger batches overflow, else 1,024
    :param map: anything with the built-in ``map``'s calling sequence; calls run the classifier on a few images, and their results
        may come in any order. For worker processes take ``concurrent.futures.ProcessPoolExecutor(2,
        multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)).map``: where a worker is killed it fails at once, while
        ``imap`` of a pool of multiprocessing waits for ever. An engine that returns a list, such as a pool's own ``map``, has done
        all images before the first is logged
    :param progress: called as ``progress(iterable, total=chunks)``, such as ``tqdm``
    :param log: TSV file to which images are appended as they are done, every 16 or, for n above 8,192, each; a second call
        with the same arguments goes on there. Two processes must not share one
    :param name: for a plain function with a ``log``: what tells it from another; a torch module is known by its
        :func:`arq_env.certification.network_digest`
    :raises ArqError: for arguments out of range, for an n with which everything is abstained on, for output that is no logits or
        labels, for NaN or infinite logits, for a ``map`` that does not give each result once, for another call's log or cache, and
        for a log that cannot be written
    """
    run = checked_run(classifier, images, sigma=sigma, n0=n0, n=n, seed=seed, batch_size=batch_size, map=map, progress=progress)
    labels = checked_labels(labels, len(run.pixels))
    request = _checked_request(run, method, alpha, radius, price, cache, gamma, skip_wrong)
    identity = functools.partial(_identity, run, checked_name(name), labels, request, method, cache)
    table = CertificateLog(None if log is None else checked_path("log", log), labels, identity)
    todo = np.setdiff1d(np.arange(len(run.pixels)), table.done)
    task, beside = functools.partial(_certify, METHODS[method], labels, request), functools.partial(_cached_rows, cache, run.pixels)
    for done in run_in_chunks(task, run, todo, beside):
        table.append(done.rows, labels[done.rows], *done.result, np.full(len(done.rows), done.seconds))
    return table.certificates()


def _certify(method, labels, request, sampler, rows, cached):
    """One chunk: its columns prediction, radius, n and draw."""
    selected, lower, n, draw = method(sampler, labels[rows], replace(request, cached=cached))
    prediction = np.where(lower > 0.5, selected, ABSTAINED)
    return prediction, smoothing_radius(request.sigma, lower), n, draw


def _cached_rows(cache, pixels, rows):
    """The cache's entries for some of the images."""
    return cache and cache.rows([sha256(np.ascontiguousarray(pixels[row])) for row in rows])


def _identity(run, name, labels, request, method, cache) -> dict:
    """What a log belongs to."""
    used = ("sigma", "n0", "n", "alpha", *_OWN_ARGUMENTS.get(method, ()), *(("skip_wrong",) if request.skip_wrong else ()))
    return {field: getattr(request, field) for field in used} | {
        "method": method,
        "seed": run.seed,
        "images": sha256(np.ascontiguousarray(run.pixels)),
        "labels": sha256(labels),
        "classifier": classifier_digest(run.classifier, name),
        "cache": cache and sha256(np.ascontiguousarray(cache.predictions)),
    }


def estimate_seconds(
    classifier: Callable, images, *, n0: int = 100, n: int = 10_000, batch_size: int | None = None, map: Callable = map
) -> float:
    """How long ``certify`` by ``cohen`` would take on these images in one process, from about a second of it.

    :return: seconds for all the images
    :raises ArqError: for arguments out of range
    """
    count, n0, n, samples = len(checked_pixels(images)), whole("n0", n0, 1, MOST_N0), whole("n", n, 1, MOST_N), 15
    few, labels = images[:2], np.zeros(min(2, count))
    run = functools.partial(certify, classifier, few, labels, sigma=1e-3, n0=1, alpha=0.9, batch_size=batch_size, map=map)
    run(n=1)  # the first batch may compile, or wake a device
    while True:
        start = time.perf_counter()
        run(n=samples)
        elapsed = time.perf_counter() - start
        if elapsed > 0.5 or samples >= n:
            return elapsed / (len(few) * (samples + 1)) * count * (n0 + n)
        samples *= 4


def _checked_request(run, method, alpha, radius, price, cache, gamma, skip_wrong) -> Request:
    """The method's own arguments in one form.

    :raises ArqError: unless there is such a method, its arguments can be used, and an image can be certified with them
    """
    if not (isinstance(method, str) and method in METHODS):
        raise ArqError(f"there is no certification method {shown(method)}: choose one of {', '.join(METHODS)}")
    alpha = checked_alpha(alpha)
    if radius is not None:
        wanted = "one that is not negative, and only to method='sequential'"
        radius = real(f"radius for {method}", radius, lambda value: method == "sequential" and value >= 0, wanted)
    price = real("price", price, lambda value: value > 0, "a positive number of sigmas")
    gamma = real("gamma", gamma, lambda value: 0.5 <= value <= 1, "a probability from 0.5 to 1")
    if not isinstance(skip_wrong, (bool, np.bool_)):
        raise ArqError(f"skip_wrong is {shown(skip_wrong)}: give True or False")
    if skip_wrong and method not in SKIPPING:
        raise ArqError(f"skip_wrong is for {' and '.join(map(repr, SKIPPING))}, not {method!r}: leave it out")
    if cache is not None and not isinstance(cache, PredictionCache):
        raise ArqError(f"cache is {shown(cache)}: give what cache_predictions returns")
    if (cache is None) == (method in ("incremental", "paired")):
        raise ArqError(
            f"method {method!r} {'needs a' if cache is None else 'takes no'} cache: make one of the original network with "
            "cache_predictions for 'incremental' or 'paired', and for these only"
        )
    if cache is not None and (cache.sigma != run.sigma or cache.seed != run.seed or cache.n < run.n):
        raise ArqError(
            f"the cache was made with sigma {cache.sigma}, seed {cache.seed} and n {cache.n}, not sigma {run.sigma}, seed "
            f"{run.seed} and n of at least {run.n}: make it again with cache_predictions"
        )
    request = Request(run.sigma, run.n0, run.n, alpha, radius, price, gamma, bool(skip_wrong))
    _check_reach(method, request, cache)
    return request


def _check_reach(method: str, request: Request, cache: PredictionCache | None) -> None:
    """Raise an ArqError where every image would be abstained on, whatever the classifier."""
    cached = None if cache is None else cache.n

    def enough(n: int) -> bool:
        return can_certify(method, replace(request, n=n), cached)

    if not enough(request.n):
        most = cached or MOST_N
        least = bisect.bisect_left(range(most + 1), True, lo=1, key=enough)
        cure = f"give an n of at least {least}" if least <= most else "no n is enough, so change radius, alpha or cache"
        raise ArqError(
            f"n is {request.n} and alpha {request.alpha:g}: even an image that is always classified alike would be abstained on: "
            + cure
        )
    planned = method == "sequential" and request.radius is None
    if planned and not planned_samples(request.n0, request.n, request.alpha, request.price).any():
        raise ArqError(
            f"price is {request.price:g}: at n of {request.n} no image is worth a sample, so give a lower price or a larger n"
        )
