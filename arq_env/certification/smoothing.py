"""Randomized smoothing: certificates for any classifier, by any of the methods."""

import functools
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from arq_env.certification.bounds import smoothing_radius
from arq_env.certification.certificates import ABSTAINED, CertificateLog, Certificates
from arq_env.certification.chunks import checked_run, no_progress, run_in_chunks
from arq_env.certification.digest import classifier_digest
from arq_env.certification.grid import GridNoise
from arq_env.certification.inputs import (
    MOST_N,
    MOST_N0,
    checked_alpha,
    checked_labels,
    checked_name,
    checked_pixels,
    whole,
)
from arq_env.certification.method import Method, Request
from arq_env.certification.methods import checked_method, refuse_options
from arq_env.certification.replaying import Incremental, Paired
from arq_env.support.errors import ArqError, shown
from arq_env.support.files import checked_path, sha256


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
    method: Method | str = "cohen",
    noise: GridNoise | None = None,
    batch_size: int | None = None,
    map: Callable = map,
    progress: Callable = no_progress,
    log: Path | None = None,
    name: str = "",
    **options,
) -> Certificates:
    """Certify the smoothed classifier g(x) = argmax_c P(f(x + e) = c), e ~ N(0, sigma^2 I), at each image.

    With probability at least 1 - alpha over the noise, and for each image by itself: g is constant, and equal to the
    prediction, within the radius around the image. The noise of an image follows from ``seed`` and the image's own
    pixels, so neither batch size nor the order of the images nor ``map`` changes what the classifier is asked; only where a
    classifier itself rounds differently in another batch can a near-tie between logits fall the other way. As everywhere in the
    field, the statement is about exact Gaussian noise, and this noise is float32; ``noise`` closes that gap.

    Methods, as objects that hold their own options, or by name where the default options will do:

    - :class:`Cohen` as published (Cohen et al. 2019): what to report.
    - :class:`Randomized`: the same samples, a bound that spends alpha to the last (Voracek 2024).
    - :class:`Sequential`: each image gets the samples it is worth, up to n; or samples until one radius is decided.
    - :class:`Incremental` (IRS, Ugare et al. 2024) and :class:`Paired`, never worse on the same samples: for a network that
      differs little from one whose predictions are in a cache.

    :param classifier: f, from a batch [b, ...] of noisy images to logits [b, classes] or labels [b]. A torch module gets
        float32 tensors on its own device, channels-last in memory where its convolutions are; any other function gets what
        ``images`` is, arrays or tensors.
    :param images: [n, c, h, w] in [0, 1], before normalisation: floating-point NumPy array or tensor; up to 1e-6 outside is clipped
    :param labels: [n] whole numbers, -1 where unknown
    :param sigma: standard deviation of the noise, in the units of the pixels, from 1e-6 to 1e6
    :param n0: noise samples that select the class, up to a million
    :param n: fresh noise samples that count it, up to a billion; at most so many by ``Sequential``, replayed ones by
        ``Incremental``
    :param alpha: probability that an image's certificate fails, whatever the method
    :param method: one of the above: ``"cohen"``, ``"randomized"``, ``"sequential"``, or an object such as
        ``Sequential(price=0.2)`` or ``Paired(cache)``
    :param noise: None for float32 noise, or :class:`GridNoise`, with which the statement holds for what is computed: of 8-bit
        images, by a classifier that gives an image the same class in any batch (docs/certifier.md). Not for ``Incremental`` and
        ``Paired``
    :param batch_size: noisy images a forward pass; by default 32 on a CPU, whose caches larger batches overflow, else 1,024
    :param map: anything with the built-in ``map``'s calling sequence; calls run the classifier on a few images, and their results
        may come in any order. For worker processes, Dask or Ray take the ``map`` of
        :func:`arq_env.support.engines.engine`: where a worker process is killed it fails at once, while
        ``imap`` of a pool of multiprocessing waits for ever. An engine that returns a list, such as a pool's own ``map``, has done
        all images before the first is logged
    :param progress: called as ``progress(iterable, total=chunks)``, such as ``tqdm``
    :param log: TSV file to which images are appended as they are done, every 16, fewer for n above 256, each for n above
        2,048; a second call with the same arguments goes on there. Two processes must not share one
    :param name: for a plain function with a ``log``: what tells it from another, unless an attribute ``digest`` does; a torch
        module is known by its :func:`arq_env.certification.network_digest`
    :raises ArqError: for arguments out of range, for a method's option given beside it, for an n with which everything is abstained
        on, for output that is no logits or labels, for NaN or infinite logits, for a ``map`` that does not give each result once,
        for another call's log or cache, and for a log that cannot be written
    """
    refuse_options(options)
    run = checked_run(classifier, images, sigma=sigma, n0=n0, n=n, seed=seed, batch_size=batch_size, map=map, progress=progress)
    labels, method = checked_labels(labels, len(run.pixels)), checked_method(method)
    if noise is not None:
        if not isinstance(noise, GridNoise):
            raise ArqError(f"noise is {shown(noise)}: give a GridNoise, or None for float32 noise")
        if isinstance(method, (Incremental, Paired)):
            raise ArqError(
                f"a cache holds predictions on float32 noise: leave noise out for {type(method).__name__}, or choose another method"
            )
        run = replace(run, pixels=noise.on_grid(run.pixels), grid=noise.table(run.sigma))
    request = Request(run.sigma, run.n0, run.n, checked_alpha(alpha), run.seed)
    method.check(request)
    identity = functools.partial(_identity, run, checked_name(name), labels, request, method, noise)
    table = CertificateLog(None if log is None else checked_path("log", log), labels, identity)
    todo = np.setdiff1d(np.arange(len(run.pixels)), table.done)
    # what draws of all pixels together may be away from the exact noise, as a probability
    error = 0.0 if run.grid is None else run.grid.error * run.pixels[0].size
    task, beside = functools.partial(_certify, labels, request, error), functools.partial(_for_images, method, run.pixels)
    for done in run_in_chunks(task, run, todo, beside):
        prediction, radius, drawn, draw = done.result
        table.append(done.rows, labels[done.rows], prediction, radius, drawn, draw, np.full(len(done.rows), done.seconds))
    return table.certificates()


def _certify(labels, request: Request, error: float, sampler, rows, method: Method):
    """One chunk: its columns prediction, radius, n and draw."""
    selected, lower, n, draw = method.bound(sampler, labels[rows], request)
    if error:
        lower = lower - error  # the bound is on the noise that is drawn
    # the last step of CERTIFY: a class whose probability may be 1/2 or less is not the only one that can be the most likely
    prediction = np.where(lower > 0.5, selected, ABSTAINED)
    return prediction, smoothing_radius(request.sigma, lower), n, draw


def _for_images(method: Method, pixels, rows) -> Method:
    """The method as it is sent with some of the images."""
    return method.for_images(pixels[rows])


def _identity(run, name, labels, request: Request, method: Method, noise: GridNoise | None) -> dict:
    """What a log belongs to."""
    return asdict(request) | {
        "images": sha256(np.ascontiguousarray(run.pixels)),
        "labels": sha256(labels),
        "classifier": classifier_digest(run.classifier, name),
        **method.identity(),
        **({} if noise is None else {"grid": noise.steps}),  # as in the logs that were written before there was a grid
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
