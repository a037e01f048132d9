"""How many bit operations are left, and which bits keep the rest of the network affordable."""

import math
import numbers

from arq_env.bitwidths import END_BITS, MAX_BITS, MIN_BITS, Bits, free_layers
from arq_env.errors import ArqError
from arq_env.layers import Layer


class BopsBudget:
    """A limit on bit operations (MACs x weight bits x activation bits), spent layer by layer.

    :param layers: all layers of the network, in order
    :param fraction: the limit as a fraction of FP32's BOPs (32 x 32 a MAC), in (0, 1]
    :param end_bits: weight and activation bits of the first and the last layer, 2 to 8
    :raises ArqError: when even the smallest bits cost more, saying how much
    """

    def __init__(self, layers: tuple[Layer, ...], fraction: float, end_bits: int = END_BITS):
        if not (isinstance(fraction, numbers.Real) and 0 < fraction <= 1):
            raise ArqError(f"the budget is {fraction!r}: give a fraction of FP32's bit operations in (0, 1], such as 0.015625")
        if end_bits not in range(MIN_BITS, MAX_BITS + 1):
            raise ArqError(f"end_bits is {end_bits!r}: give a whole number from {MIN_BITS} to {MAX_BITS}")
        free = free_layers(layers)
        fp32 = 1024 * sum(layer.macs for layer in layers)
        ends = end_bits**2 * sum(layer.macs for layer in layers if layer not in free)
        macs = [layer.macs for layer in free]
        self.fraction = float(fraction)
        self.limit = math.floor(fraction * fp32) - ends
        #: MACs of the free layers from each step on, and 0 after the last.
        self.macs_from = [sum(macs[step:]) for step in range(len(macs) + 1)]
        least = ends + MIN_BITS**2 * self.macs_from[0]
        if least - ends > self.limit:
            raise ArqError(
                f"a budget of {fraction:.6g} of FP32's bit operations cannot be met: the least reachable is "
                f"{math.ceil(least / fp32 * 1e6) / 1e6:.6f} ({MIN_BITS} bits everywhere, {end_bits} in the first and last layer)"
            )

    def even_share(self, step: int, spent: int) -> float:
        """Weight bits x activation bits that every MAC from layer ``step`` on can have, as if all had the same."""
        return (self.limit - spent) / self.macs_from[step]

    def fit(self, bits: Bits, step: int, spent: int) -> Bits:
        """Take bits off, from the larger of the two first, until the layers after ``step`` can still have 2/2."""
        macs = self.macs_from[step] - self.macs_from[step + 1]
        affordable = (self.limit - spent - MIN_BITS**2 * self.macs_from[step + 1]) // macs
        weight, activation = (min(max(value, MIN_BITS), MAX_BITS) for value in bits)
        while weight * activation > affordable:
            if weight >= activation:
                weight -= 1
            else:
                activation -= 1
        return Bits(weight, activation)
