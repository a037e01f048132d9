"""As many noise samples as an image is worth."""

import functools
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

from arq_env.certification.bounds import (
    betting_lower,
    clopper_pearson_lower,
    randomized_clopper_pearson_lower,
    smoothing_radius,
)
from arq_env.certification.inputs import real
from arq_env.certification.method import Bounded, Method, Request, hopeful, nothing_drawn, uniform_draws
from arq_env.certification.sampling import ESTIMATION, Sampler
from arq_env.support.errors import ArqError


@dataclass(frozen=True)
class Sequential(Method):
    """Fewer samples: the n0 samples of the selection are a pilot that decides how many fresh ones, up to n, an image is worth.

    They are counted by :class:`Randomized`'s bound. Images that the pilot finds wrong are given up: they abstain, where
    :class:`Cohen` would name a wrong class. That costs their radius, which would not count, nothing else. Without a label (-1) none
    is wrong.

    :param radius: samples until it is clear whether this radius holds, in the units of the pixels; other images abstain
    :param price: the radius, in units of sigma, that n samples must gain to be worth drawing; a lower price buys more samples
        (``experiments/benchmarks/methods.py`` shows what for). Without effect where there is a ``radius``
    :raises ArqError: for a negative radius, and for a price that is not positive
    """

    radius: float | None = None
    price: float = 0.3

    name = "sequential"

    def __post_init__(self):
        if self.radius is not None:
            wanted = "one that is not negative, in the units of the pixels"
            object.__setattr__(self, "radius", real("radius", self.radius, lambda value: value >= 0, wanted))
        price = real("price", self.price, lambda value: value > 0, "a positive number of sigmas")
        object.__setattr__(self, "price", price)

    def bound(self, sampler: Sampler, labels: np.ndarray, request: Request) -> Bounded:
        selected, votes = sampler.select(request.n0)
        right = hopeful(selected, labels)
        decide = self._count_planned if self.radius is None else self._bet_until_decided
        lower, n, draws = nothing_drawn(labels)
        if len(right):
            lower[right], n[right], draws[right] = decide(sampler, right, selected[right], votes[right], request)
        return selected, lower, n, draws

    def _count_planned(self, sampler, rows, selected, votes, request):
        """The randomized bound on as many samples as planned: valid, since the plan knows only the pilot, which is not counted."""
        n = planned_samples(request.n0, request.n, request.alpha, self.price)[votes]
        lower, draws = np.zeros(len(rows)), uniform_draws(sampler, rows, request)
        for size in np.unique(n[n > 0]):
            at = n == size
            counts = sampler.count(ESTIMATION, size, selected[at], rows[at])
            lower[at] = randomized_clopper_pearson_lower(counts, size, draws[at], request.alpha)
        return lower, n, np.where(n > 0, draws, np.nan)

    def _bet_until_decided(self, sampler, rows, selected, votes, request):
        """Sample until ``radius`` is proved, is out of reach, or n samples are spent; the pilot is the bettor's prior.

        Stopping is free under a confidence sequence (Voracek, NeurIPS 2024, section 4), so the rule for giving up can be as bold as
        it likes.
        """
        # 1. the radius holds where the class has at least this probability
        target = self._target(request)
        prior = votes + 0.5, request.n0 - votes + 0.5
        successes, n, lower = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64), np.zeros(len(rows))
        active = np.arange(len(rows))
        drawn = 0
        while drawn < request.n and len(active):
            # 2. draw some more of each image that is undecided
            step = min(max(32, drawn // 8), request.n - drawn)
            drawn += step
            successes[active] += sampler.count(ESTIMATION, step, selected[active], rows[active])
            n[active] = drawn
            # 3. reject the probabilities at which the bettor is rich by now
            lower[active] = betting_lower(successes[active], drawn, request.alpha, tuple(p[active] for p in prior))
            # 4. give up where not even a lucky share of successes makes it rich in time
            total = request.n0 + drawn
            share = (votes[active] + successes[active] + 0.5) / (total + 1)
            hope = np.minimum(share + 2 * np.sqrt(share * (1 - share) / total), 1)
            # log wealth grows by KL(share || target) a sample; even at the hopeful end it must get to log(1 / alpha) in time
            growth = special.rel_entr(hope, target) + special.rel_entr(1 - hope, 1 - target)
            reachable = (hope > target) & (growth * request.n > np.log(1 / request.alpha))
            active = active[(lower[active] < target) & reachable]
        return np.where(lower >= target, lower, 0.0), n, np.full(len(rows), np.nan)

    def _target(self, request: Request) -> float:
        """The probability from which on ``radius`` holds; 0 without one."""
        return 0.0 if self.radius is None else float(stats.norm.cdf(self.radius / request.sigma))

    def highest(self, request: Request) -> float:
        if self.radius is None:
            return request.alpha ** (1 / request.n)
        return float(betting_lower(request.n, request.n, request.alpha, (request.n0 + 0.5, 0.5)))

    def can_certify(self, request: Request) -> bool:
        return super().can_certify(request) and self.highest(request) >= self._target(request)

    def check(self, request: Request) -> None:
        super().check(request)
        if self.radius is None and not planned_samples(request.n0, request.n, request.alpha, self.price).any():
            raise ArqError(
                f"price is {self.price:g}: at n of {request.n} no image is worth a sample, so give a lower price or a larger n"
            )


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
