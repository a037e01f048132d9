"""What every certification method is asked, and what it says."""

import bisect
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import numpy as np

from arq_env.certification.inputs import MOST_N
from arq_env.certification.sampling import DRAW, Sampler
from arq_env.support.errors import ArqError

#: What a method says of [images]: the class that was bounded, its bound (at most 1/2: abstain), the noise samples that were drawn
#: after the selection, and the uniform draw of a randomized bound (NaN without one).
Bounded = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Request:
    """What is asked of every method; the fields are :func:`arq_env.certification.certify`'s arguments."""

    sigma: float
    n0: int
    n: int
    alpha: float
    seed: int


@dataclass(frozen=True)
class Method(ABC):
    """How noise samples become a bound: a frozen dataclass each, whose fields are its options, checked when it is made.

    :cvar name: what logs and ``certify(method=)`` call it
    """

    name: ClassVar[str]

    @abstractmethod
    def bound(self, sampler: Sampler, labels: np.ndarray, request: Request) -> Bounded:
        """Choose each image's class and bound its probability: for each by itself, P(bound > P(f(x + e) = class)) <= alpha.

        :param sampler: of a few images: asks the classifier about noisy copies of them (``select``, ``count``, ``predict``)
        :param labels: int64 [images], -1 where unknown
        """

    @abstractmethod
    def highest(self, request: Request) -> float:
        """The bound of an image of which every sample says the same."""

    def can_certify(self, request: Request) -> bool:
        """Whether such an image is certified: if not, every image is abstained on."""
        return self.highest(request) > 0.5

    def most(self) -> int:
        """The largest n there may be."""
        return MOST_N

    def check(self, request: Request) -> None:
        """Raise an ArqError where every image would be abstained on, whatever the classifier."""

        def enough(n: int) -> bool:
            return self.can_certify(replace(request, n=n))

        if not enough(request.n):
            most = self.most()
            least = bisect.bisect_left(range(most + 1), True, lo=1, key=enough)
            cure = f"give an n of at least {least}" if least <= most else "no n is enough, so change radius, alpha or cache"
            raise ArqError(
                f"n is {request.n} and alpha {request.alpha:g}: even an image that is always classified alike would be abstained "
                f"on: {cure}"
            )

    def identity(self) -> dict:
        """What certificates by this method depend on, as plain data: what a log belongs to."""
        return {"method": self.name, "cache": None} | {field.name: getattr(self, field.name) for field in fields(self)}

    def for_images(self, images: np.ndarray) -> "Method":
        """The method as it is sent to where these images are done: without what other images need."""
        return self


def hopeful(selected, labels) -> np.ndarray:
    """Indices of the images whose selected class is not known to be wrong: only their radius can count."""
    return np.flatnonzero((selected == labels) | (labels < 0))


def uniform_draws(sampler, rows, request: Request) -> np.ndarray:
    """Uniform draws of randomized bounds, raised to 2 alpha where below.

    There k = n would prove pA = 1 and an infinite radius; a larger draw only lowers the bound.
    """
    return np.clip([sampler.stream(DRAW, row).random() for row in rows], min(2 * request.alpha, 1), 1)


def nothing_drawn(labels) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bound, samples and draw of images that get no sample."""
    return np.zeros(len(labels)), np.zeros(len(labels), np.int64), np.full(len(labels), np.nan)
