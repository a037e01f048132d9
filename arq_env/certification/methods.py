"""The certification methods: each bounds from below the probability of a class, for a few images at a time.

A method is a function ``(sampler, labels, request) -> (prediction, lower, n, draw)`` of [images] arrays: the class that was
bounded, its bound (at most 1/2: abstain), the noise samples that were drawn after the selection, and the uniform draw of
a randomized bound (NaN without one). For each image by itself, P(lower > P(f(x + e) = prediction)) <= alpha.
"""

import functools
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

from arq_env.certification.bounds import (
    betting_lower,
    clopper_pearson_lower,
    clopper_pearson_upper,
    randomized_clopper_pearson_lower,
    smoothing_radius,
)
from arq_env.certification.cache import CachedRows
from arq_env.certification.sampling import DRAW, ESTIMATION, FRESH, Sampler


@dataclass(frozen=True)
class Request:
    """What is asked of a method; the fields are :func:`arq_env.certification.certify`'s arguments.

    :param cached: the images' part of the prediction cache
    """

    sigma: float
    n0: int
    n: int
    alpha: float
    radius: float | None
    price: float
    gamma: float
    skip_wrong: bool = False
    cached: CachedRows | None = None


def cohen(sampler: Sampler, labels, request: Request):
    """CERTIFY (Cohen et al. 2019, section 3.2.2): select with n0 samples, count in n fresh ones, Clopper-Pearson."""
    n, alpha = request.n, request.alpha
    return _count_all(sampler, labels, request, _no_draw(labels), lambda counts, _: clopper_pearson_lower(counts, n, alpha))


def randomized(sampler: Sampler, labels, request: Request):
    """CERTIFY with the randomized Clopper-Pearson bound (Voracek, NeurIPS 2024)."""
    n, alpha, draws = request.n, request.alpha, _draws(sampler, range(len(sampler)), request)
    return _count_all(sampler, labels, request, draws, lambda counts, w: randomized_clopper_pearson_lower(counts, n, w, alpha))


def _count_all(sampler, labels, request, draws, bound):
    """n fresh samples of each image, of those the selection gets right only if wrong ones are to be skipped."""
    selected, _ = sampler.select(request.n0)
    rows = _hopeful(selected, labels) if request.skip_wrong else np.arange(len(labels))
    lower, n, used = np.zeros(len(labels)), np.zeros(len(labels), np.int64), _no_draw(labels)
    if len(rows):
        counts = sampler.count(ESTIMATION, request.n, selected[rows], rows)
        lower[rows], n[rows], used[rows] = bound(counts, draws[rows]), request.n, draws[rows]
    return selected, lower, n, used


def sequential(sampler: Sampler, labels, request: Request):
    """Fewer samples: the n0 samples of the selection are a pilot that decides how many fresh ones an image is worth.

    Images that the pilot finds wrong are given up: abstaining costs their radius, which would not count, nothing else.
    Without a label (-1) none is wrong.
    """
    selected, votes = sampler.select(request.n0)
    hopeful = _hopeful(selected, labels)
    decide = _count_planned if request.radius is None else _bet_until_decided
    lower, n, draws = np.zeros(len(labels)), np.zeros(len(labels), np.int64), _no_draw(labels)
    if len(hopeful):
        lower[hopeful], n[hopeful], draws[hopeful] = decide(sampler, hopeful, selected[hopeful], votes[hopeful], request)
    return selected, lower, n, draws


def _count_planned(sampler, rows, selected, votes, request):
    """The randomized bound on as many samples as planned: valid, since the plan knows only the pilot, which is not counted."""
    n = planned_samples(request.n0, request.n, request.alpha, request.price)[votes]
    lower, draws = np.zeros(len(rows)), _draws(sampler, rows, request)
    for size in np.unique(n[n > 0]):
        at = n == size
        counts = sampler.count(ESTIMATION, size, selected[at], rows[at])
        lower[at] = randomized_clopper_pearson_lower(counts, size, draws[at], request.alpha)
    return lower, n, np.where(n > 0, draws, np.nan)


@functools.lru_cache(16)
def planned_samples(n0: int, n: int, alpha: float, price: float) -> np.ndarray:
    """For each count in a pilot of n0, the number of fresh samples that is worth most: int64 [n0 + 1].

    Worth is Clopper-Pearson's radius, in sigma, expected over the pilot's posterior (Jeffreys prior), less ``price`` times the
    share of n that is spent.
    """
    sizes = np.unique(np.append(0, np.round(np.geomspace(max(1, n // 100), n, 25)).astype(int)))
    votes = np.arange(n0 + 1)[:, None]
    quantiles = (np.arange(32) + 0.5) / 32
    posterior = stats.beta.ppf(quantiles, votes + 0.5, n0 - votes + 0.5)
    worth = np.zeros((n0 + 1, len(sizes)))
    for column, size in enumerate(sizes[1:], start=1):
        expected = smoothing_radius(1.0, clopper_pearson_lower(np.round(posterior * size), size, alpha)).mean(1)
        worth[:, column] = expected - price * size / n
    return sizes[worth.argmax(1)]


def _bet_until_decided(sampler, rows, selected, votes, request):
    """Sample until ``radius`` is proved, is out of reach, or n samples are spent; the pilot is the bettor's prior.

    Stopping is free under a confidence sequence, so the rule for giving up can be as bold as it likes.
    """
    target = stats.norm.cdf(request.radius / request.sigma)
    prior = votes + 0.5, request.n0 - votes + 0.5
    successes, n, lower = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64), np.zeros(len(rows))
    active = np.arange(len(rows))
    drawn = 0
    while drawn < request.n and len(active):
        step = min(max(32, drawn // 8), request.n - drawn)
        drawn += step
        successes[active] += sampler.count(ESTIMATION, step, selected[active], rows[active])
        n[active] = drawn
        lower[active] = betting_lower(successes[active], drawn, request.alpha, tuple(p[active] for p in prior))
        total = request.n0 + drawn
        share = (votes[active] + successes[active] + 0.5) / (total + 1)
        hope = np.minimum(share + 2 * np.sqrt(share * (1 - share) / total), 1)
        # log wealth grows by KL(share || target) a sample; even at the hopeful end it must get to log(1 / alpha) in time
        growth = special.rel_entr(hope, target) + special.rel_entr(1 - hope, 1 - target)
        reachable = (hope > target) & (growth * request.n > np.log(1 / request.alpha))
        active = active[(lower[active] < target) & reachable]
    return np.where(lower >= target, lower, 0.0), n, _no_draw(rows)


def incremental(sampler: Sampler, labels, request: Request):
    """IRS (Ugare et al., ICLR 2024, algorithm 2): the cached pA less a bound on the disagreement with the cached network.

    The class is the cache's. Its pA is bounded at alpha / 2 and the disagreement at alpha / 2. Where that bound L is at least
    gamma the class is counted afresh, at alpha / 2 too. Together they fail with at most alpha, although the cached counts
    choose between them: for pA < gamma a fresh count happens only when L > pA, so every failure needs L > pA or too small
    a disagreement bound; for pA >= gamma a replay fails only by the disagreement bound, so every failure needs that or a
    failing fresh count.
    """
    return _replay(sampler, labels, request, lambda cached, now, top: cached != now)


def paired(sampler: Sampler, labels, request: Request):
    """As IRS, but only harmful disagreement counts: P(f' = c) >= P(f = c) - P(f = c and f' != c), each at alpha / 2.

    At least IRS's bound on the same samples, since the second term counts some of IRS's disagreements only.
    """
    return _replay(sampler, labels, request, lambda cached, now, top: (cached == top) & (now != top))


def _replay(sampler, labels, request, harm):
    cached = request.cached
    lower = clopper_pearson_lower(cached.counts, cached.predictions.shape[1], request.alpha / 2)
    afresh = lower >= request.gamma
    replayed, counted = np.flatnonzero(~afresh), np.flatnonzero(afresh)
    if len(replayed):
        losses = np.zeros(len(replayed), np.int64)
        for before in cached.blocks(replayed, request.n):
            now = sampler.predict(ESTIMATION, before.shape[1], replayed)
            losses += harm(before, now, cached.classes[replayed, None]).sum(1)
        lower[replayed] -= clopper_pearson_upper(losses, request.n, request.alpha / 2)
    if len(counted):
        counts = sampler.count(FRESH, request.n, cached.classes[counted], counted)
        lower[counted] = clopper_pearson_lower(counts, request.n, request.alpha / 2)
    return cached.classes, lower, _all(labels, request.n), _no_draw(labels)


def can_certify(method: str, request: Request, cached: int | None) -> bool:
    """Whether an image of which every sample says the same is certified: if not, every image is abstained on.

    :param cached: the cache's n, for the methods that have one
    """
    n, alpha = request.n, request.alpha
    target = 0.0 if request.radius is None else stats.norm.cdf(request.radius / request.sigma)
    if method == "randomized":
        lower = (alpha / min(2 * alpha, 1)) ** (1 / n)  # with the least draw that there is
    elif request.radius is not None:
        lower = betting_lower(n, n, alpha, (request.n0 + 0.5, 0.5))
    elif cached is not None:
        before, now = (alpha / 2) ** (1 / cached), (alpha / 2) ** (1 / n)
        lower = now if before >= request.gamma else before + now - 1
    else:
        lower = alpha ** (1 / n)
    return bool(lower > 0.5 and lower >= target)


def _hopeful(selected, labels) -> np.ndarray:
    """Indices of the images whose selected class is not known to be wrong: only their radius can count."""
    return np.flatnonzero((selected == labels) | (labels < 0))


def _draws(sampler, rows, request) -> np.ndarray:
    """Uniform draws of randomized bounds, raised to 2 alpha where below.

    There k = n would prove pA = 1 and an infinite radius; a larger draw only lowers the bound.
    """
    return np.clip([sampler.stream(DRAW, row).random() for row in rows], min(2 * request.alpha, 1), 1)


def _all(labels, n) -> np.ndarray:
    return np.full(len(labels), n)


def _no_draw(labels) -> np.ndarray:
    return np.full(len(labels), np.nan)


#: Those that can leave out images whose selected class is wrong; "sequential" always does.
SKIPPING = ("cohen", "randomized")
METHODS = {f.__name__: f for f in (cohen, randomized, sequential, incremental, paired)}
