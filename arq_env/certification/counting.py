"""CERTIFY as published, and with a sharper bound: one number of noise samples for every image."""

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from arq_env.certification.bounds import clopper_pearson_lower, randomized_clopper_pearson_lower
from arq_env.certification.inputs import flag
from arq_env.certification.method import Bounded, Method, Request, hopeful, nothing_drawn, uniform_draws
from arq_env.certification.sampling import ESTIMATION, Sampler


@dataclass(frozen=True)
class _FixedSize(Method):
    """n fresh samples of each image."""

    skip_wrong: bool = False

    def __post_init__(self):
        object.__setattr__(self, "skip_wrong", flag("skip_wrong", self.skip_wrong))

    def bound(self, sampler: Sampler, labels: np.ndarray, request: Request) -> Bounded:
        # 1. take the class that n0 samples get most often
        selected, _ = sampler.select(request.n0)
        rows = hopeful(selected, labels) if self.skip_wrong else np.arange(len(labels))
        lower, n, draws = nothing_drawn(labels)
        if len(rows):
            # 2. count it in n fresh samples
            draws[rows] = self._draws(sampler, rows, request)
            counts = sampler.count(ESTIMATION, request.n, selected[rows], rows)
            # 3. bound its probability from below; radius or abstention follow from that
            lower[rows], n[rows] = self._lower(counts, draws[rows], request), request.n
        return selected, lower, n, draws

    @abstractmethod
    def _lower(self, counts, draws, request: Request) -> np.ndarray:
        """The bound of each image."""

    def _draws(self, sampler, rows, request: Request) -> np.ndarray:
        """What the bound draws itself."""
        return np.full(len(rows), np.nan)

    def identity(self) -> dict:
        identity = super().identity()
        if not self.skip_wrong:
            del identity["skip_wrong"]  # as in the logs that were written before there was such an option
        return identity


@dataclass(frozen=True)
class Cohen(_FixedSize):
    """CERTIFY (Cohen et al. 2019, section 3.2.2): select with n0 samples, count in n fresh ones, Clopper-Pearson.

    :param skip_wrong: draw none of the n samples of images whose first n0 point to a wrong class, and abstain there. ACR and every
        accuracy stay exactly as they are, a wrong prediction's radius is not known
    :raises ArqError: for anything but True or False
    """

    name = "cohen"

    def _lower(self, counts, draws, request):
        return clopper_pearson_lower(counts, request.n, request.alpha)

    def highest(self, request: Request) -> float:
        return request.alpha ** (1 / request.n)


@dataclass(frozen=True)
class Randomized(_FixedSize):
    """CERTIFY with a bound that spends alpha to the last (Voracek, NeurIPS 2024).

    Radii are a little larger than :class:`Cohen`'s and depend on one uniform draw an image, which is recorded.

    :param skip_wrong: as for :class:`Cohen`
    :raises ArqError: for anything but True or False
    """

    name = "randomized"

    def _lower(self, counts, draws, request):
        return randomized_clopper_pearson_lower(counts, request.n, draws, request.alpha)

    def _draws(self, sampler, rows, request):
        return uniform_draws(sampler, rows, request)

    def highest(self, request: Request) -> float:
        return (request.alpha / min(2 * request.alpha, 1)) ** (1 / request.n)  # with the least draw that there is
