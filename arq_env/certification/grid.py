"""Noise on a grid, drawn as whole numbers: certificates that no rounding of noise or pixels stands outside of.

The idea is that of Voracek and Hein, Sound Randomized Smoothing in Floating-Point Arithmetics (ICLR 2023).
"""

import functools
from dataclasses import dataclass

import mpmath
import numpy as np

from arq_env.certification.inputs import ROUNDING, whole
from arq_env.support.errors import ArqError

#: Whole numbers that 8-bit pixels are.
LEVELS = 255
#: Most steps of noise to either side of 0, which a table holds: some 20 s to make.
MOST_REACH = 2**16
#: In a table's first level: look further.
_FURTHER = np.iinfo(np.int32).min


@dataclass(frozen=True)
class GridNoise:
    """Gaussian noise rounded to multiples of 1 / (255 steps), on 8-bit pixels: for ``certify(noise=)``.

    The rounding counts as the classifier's first layer, so it costs no radius; docs/certifier.md has the theorem.

    :param steps: of the grid from one pixel value to the next, from 1 (noise in whole pixel values) to 256
    :raises ArqError: for anything else
    """

    steps: int = 1

    def __post_init__(self):
        object.__setattr__(self, "steps", whole("steps", self.steps, 1, 256))

    def on_grid(self, pixels: np.ndarray) -> np.ndarray:
        """The pixels k / 255, correctly rounded to float32.

        :param pixels: float32 in [0, 1]
        :raises ArqError: where one is no k / 255, up to 1e-6
        """
        codes = np.rint(pixels * np.float32(LEVELS))
        exact = codes / np.float32(LEVELS)
        if not (away := np.abs(exact - pixels)).max() <= ROUNDING:
            raise ArqError(
                f"a pixel is {pixels.flat[away.argmax()]:.9g}, which is no k / {LEVELS}: give 8-bit images divided by "
                f"{LEVELS}, which noise on a grid is for, or leave noise out"
            )
        return exact

    def table(self, sigma: float) -> "GridTable":
        """What draws the noise of one sigma.

        :raises ArqError: where it would be too large
        """
        return _table(self.steps, sigma)


@dataclass(frozen=True, eq=False)
class GridTable:
    """Draws whole numbers of grid steps by inverting a table of the distribution function with 64 random bits.

    P(k) is Phi((k + 1/2) h / sigma) - Phi((k - 1/2) h / sigma), h = 1 / (255 steps), up to ``error``.

    :param thresholds: uint64 [2 reach], ascending: of 2^64 equally likely numbers so many lie below -reach + 1/2, ...
    :param first: int32 [2^16], what the leading 16 bits say alone, or that the others are needed
    """

    steps: int
    reach: int
    thresholds: np.ndarray
    first: np.ndarray

    @property
    def error(self) -> float:
        """Bound on the total variation distance of one draw from the exact distribution.

        Each of the 2 reach thresholds is off by half of 2^-64 at most and bounds two numbers' probabilities, whose differences
        count half; beyond the reach less than 2^-64 is left out at either end; a last 2^-64 is for the 128-bit arithmetic.
        """
        return (self.reach + 3) * 2.0**-64

    def draw(self, generator: np.random.Generator, shape) -> np.ndarray:
        """Independent draws, int32, each of 64 bits of the generator in order."""
        bits = generator.integers(0, 2**64, size=shape, dtype=np.uint64).ravel()
        drawn = self.first[bits >> np.uint64(48)]
        further = np.flatnonzero(drawn == _FURTHER)
        drawn[further] = np.searchsorted(self.thresholds, bits[further], side="right") - self.reach
        return drawn.reshape(shape)

    def noisy(self, pixels: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Pixels k / 255 with so many steps of noise: z / (255 steps), one correctly rounded quotient of whole numbers a value."""
        codes = np.rint(pixels * np.float32(LEVELS)) * np.float32(self.steps)
        codes += noise  # below 2^24: exact
        codes /= np.float32(LEVELS * self.steps)
        return codes


@functools.lru_cache(8)
def _table(steps: int, sigma: float) -> GridTable:
    if 9.3 * sigma * LEVELS * steps > MOST_REACH:  # Phi(-9.3) is below 2^-64
        raise ArqError(
            f"noise of sigma {sigma:g} reaches over more than {MOST_REACH:,} steps of 1 / {LEVELS * steps}: give a GridNoise of "
            "fewer steps, or a smaller sigma"
        )
    tails: list[int] = []
    with mpmath.workprec(128):
        step = 1 / (LEVELS * steps * mpmath.mpf(sigma))
        while (tail := mpmath.ncdf(-(len(tails) + mpmath.mpf(0.5)) * step)) * 2**64 >= 1:
            tails.append(int(mpmath.nint(tail * 2**64)))
    thresholds = np.array([*reversed(tails), *(2**64 - tail for tail in tails)], np.uint64)
    starts = np.arange(2**16, dtype=np.uint64) << np.uint64(48)
    least, most = (np.searchsorted(thresholds, ends, side="right") for ends in (starts, starts + np.uint64(2**48 - 1)))
    first = np.where(least == most, least - len(tails), _FURTHER).astype(np.int32)
    return GridTable(steps, len(tails), thresholds, first)
