"""What a command line shows or reads, kept apart from what imports torch."""

import re
from dataclasses import dataclass

#: What uniform bits are called, such as W4A4.
UNIFORM = re.compile(r"W(\d)A(\d)")
MIN_BITS, MAX_BITS = 2, 8
#: Batches of the short fine-tuning that tells what maps with high rewards are worth once finished.
CONFIRMING_STEPS = 96
#: Batches of the fine-tuning that ends a first result, within minutes.
FIRST_STEPS = 48
#: Of a report every so many-th test image is certified, so that a difference of half a percent can be shown.
REPORT_EVERY = 2


@dataclass(frozen=True)
class TestSettings:
    """A certificate for reporting: Cohen's certifier at its published alpha.

    :param every: take every so many-th test image
    :param offset: index of the first of them
    """

    __test__ = False  # not a test class, whatever pytest thinks of its name

    every: int = 20
    offset: int = 0
    n0: int = 100
    n: int = 1_000
    alpha: float = 0.001
    seed: int = 0
