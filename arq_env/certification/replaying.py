"""Certificates from the difference to a network that was asked before."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from arq_env.certification.bounds import clopper_pearson_lower, clopper_pearson_upper
from arq_env.certification.cache import PredictionCache
from arq_env.certification.inputs import real
from arq_env.certification.method import Bounded, Method, Request
from arq_env.certification.sampling import ESTIMATION, FRESH, Sampler
from arq_env.support.errors import ArqError, shown
from arq_env.support.files import sha256


@dataclass(frozen=True)
class _Replaying(Method):
    """For a network that differs little from the one whose predictions are in ``cache``."""

    cache: PredictionCache
    gamma: float = 0.99

    def __post_init__(self):
        if not isinstance(self.cache, PredictionCache):
            raise ArqError(f"cache is {shown(self.cache)}: give what cache_predictions returns for the original network")
        gamma = real("gamma", self.gamma, lambda value: 0.5 <= value <= 1, "a probability from 0.5 to 1")
        object.__setattr__(self, "gamma", gamma)

    def bound(self, sampler: Sampler, labels: np.ndarray, request: Request) -> Bounded:
        cache = self.cache
        # 1. bound the cached class's probability under the original network from its cached counts
        lower = clopper_pearson_lower(cache.counts, cache.n, request.alpha / 2)
        afresh = lower >= self.gamma
        replayed, counted = np.flatnonzero(~afresh), np.flatnonzero(afresh)
        if len(replayed):
            # 2. below gamma: ask this network about the first n of the same noisy images, and take off a bound on what it loses
            losses = np.zeros(len(replayed), np.int64)
            for before in cache.blocks(replayed, request.n):
                now = sampler.predict(ESTIMATION, before.shape[1], replayed)
                losses += self._loses(before, now, cache.classes[replayed, None]).sum(1)
            lower[replayed] -= clopper_pearson_upper(losses, request.n, request.alpha / 2)
        if len(counted):
            # 3. from gamma on, where little can be taken off: count the class in n fresh samples
            counts = sampler.count(FRESH, request.n, cache.classes[counted], counted)
            lower[counted] = clopper_pearson_lower(counts, request.n, request.alpha / 2)
        return cache.classes, lower, np.full(len(labels), request.n), np.full(len(labels), np.nan)

    @abstractmethod
    def _loses(self, before, now, top) -> np.ndarray:
        """Which of the replayed predictions take from the class's probability."""

    def highest(self, request: Request) -> float:
        before, now = (request.alpha / 2) ** (1 / self.cache.n), (request.alpha / 2) ** (1 / request.n)
        return now if before >= self.gamma else before + now - 1

    def most(self) -> int:
        return self.cache.n

    def check(self, request: Request) -> None:
        cache = self.cache
        if cache.sigma != request.sigma or cache.seed != request.seed or cache.n < request.n:
            raise ArqError(
                f"the cache was made with sigma {cache.sigma}, seed {cache.seed} and n {cache.n}, not sigma {request.sigma}, seed "
                f"{request.seed} and n of at least {request.n}: make it again with cache_predictions"
            )
        super().check(request)

    def identity(self) -> dict:
        return super().identity() | {"cache": sha256(np.ascontiguousarray(self.cache.predictions))}

    def for_images(self, images: np.ndarray) -> Self:
        return replace(self, cache=self.cache.rows([sha256(np.ascontiguousarray(image)) for image in images]))


@dataclass(frozen=True)
class Incremental(_Replaying):
    """IRS (Ugare et al., ICLR 2024, algorithm 2): the cached pA less a bound on the disagreement with the cached network.

    The class is the cache's. Its pA is bounded at alpha / 2 and the disagreement at alpha / 2. Where that bound L is at least
    gamma the class is counted afresh, at alpha / 2 too. Together they fail with at most alpha, although the cached counts
    choose between them: for pA < gamma a fresh count happens only when L > pA, so every failure needs L > pA or too small
    a disagreement bound; for pA >= gamma a replay fails only by the disagreement bound, so every failure needs that or a
    failing fresh count.

    :param cache: of the original network, made by :func:`arq_env.certification.cache_predictions` with the same sigma and seed,
        and an n that is not smaller
    :param gamma: count afresh where the cached pA is at least this, 0.5 to 1
    :raises ArqError: for anything but a cache, and for gamma out of range
    """

    name = "incremental"

    def _loses(self, before, now, top):
        return before != now


@dataclass(frozen=True)
class Paired(_Replaying):
    """As IRS, but only harmful disagreement counts: P(f' = c) >= P(f = c) - P(f = c and f' != c), each at alpha / 2.

    At least IRS's bound on the same samples, since the second term counts some of IRS's disagreements only.

    :param cache, gamma: as for :class:`Incremental`
    :raises ArqError: for anything but a cache, and for gamma out of range
    """

    name = "paired"

    def _loses(self, before, now, top):
        return (before == top) & (now != top)
