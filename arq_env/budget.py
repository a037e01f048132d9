"""How many bit operations are left, and which bits keep the rest of the network affordable."""

import math
import numbers
from fractions import Fraction

from arq_env.bitwidths import END_BITS, MAX_BITS, MIN_BITS, Bits, BitWidthMap, bops, complete, free_layers
from arq_env.layers import Layer, total_macs
from arq_env.support.errors import ArqError


class BopsBudget:
    """A limit on bit operations (MACs x weight bits x activation bits), spent layer by layer.

    The methods take the bits chosen so far, of the first few free layers.

    :param layers: all layers of the network, in order
    :param fraction: the limit as a fraction of FP32's BOPs (32 x 32 a MAC), in (0, 1]
    :param end_bits: weight and activation bits of the first and the last layer, 2 to 8
    :raises ArqError: when even the smallest bits cost more, saying how much

    ``limit`` is the largest number of BOPs whose fraction, as a float, is no more than ``fraction``: every map fits the budget that
    :func:`arq_env.bitwidths.bops_fraction` reports of it.
    """

    def __init__(self, layers: tuple[Layer, ...], fraction: float, end_bits: int = END_BITS):
        if isinstance(fraction, bool) or not (isinstance(fraction, numbers.Real) and 0 < fraction <= 1):
            raise ArqError(f"the budget is {fraction!r}: give a fraction of FP32's bit operations in (0, 1], such as 0.015625")
        if not (isinstance(end_bits, numbers.Integral) and MIN_BITS <= end_bits <= MAX_BITS):
            raise ArqError(f"end_bits is {end_bits!r}: give a whole number from {MIN_BITS} to {MAX_BITS}")
        self.layers, self.free, self.end_bits = layers, free_layers(layers), int(end_bits)
        fp32 = 1024 * total_macs(layers)
        self.fraction = float(fraction)
        self.limit = math.floor(Fraction(self.fraction) * fp32)
        while (self.limit + 1) / fp32 <= self.fraction:  # what rounds to this fraction counts to it
            self.limit += 1
        macs = [layer.macs for layer in self.free]
        #: MACs of the free layers from each step on, and 0 after the last.
        self.macs_from = [sum(macs[step:]) for step in range(len(macs) + 1)]
        if (least := self.least({})) > self.limit:
            raise ArqError(
                f"a budget of {fraction:.6g} of FP32's bit operations cannot be met: the least reachable is "
                f"{-(-least * 10**6 // fp32) / 1e6:.6f} ({MIN_BITS} bits everywhere, {end_bits} in the first and last layer)"
            )

    def least(self, chosen: BitWidthMap) -> int:
        """BOPs of the cheapest map that has these bits."""
        return self._bops(chosen, Bits(MIN_BITS, MIN_BITS))

    def even_share(self, chosen: BitWidthMap) -> float:
        """Weight bits x activation bits that every MAC of the layers to come can have, as if all had the same."""
        return (self.limit - self._bops(chosen, Bits(0, 0))) / self.macs_from[len(chosen)]

    def fit(self, bits: Bits, chosen: BitWidthMap) -> Bits:
        """Take bits off the next layer's, from the larger of the two first, until the layers after it can still have 2/2.

        A layer that reads the same tensor as an earlier one gets that one's activation bits.
        """
        layer = self.free[len(chosen)]
        weight, activation = (min(max(value, MIN_BITS), MAX_BITS) for value in bits)
        if layer.tied_to is not None:
            activation = complete(chosen, self.layers, self.end_bits)[layer.tied_to].activation
        while self.least(chosen | {layer.name: Bits(weight, activation)}) > self.limit:
            if weight >= activation or layer.tied_to is not None:
                weight -= 1
            else:
                activation -= 1
        return Bits(weight, activation)

    def _bops(self, chosen: BitWidthMap, to_come: Bits) -> int:
        """BOPs when each free layer that is not chosen yet gets these bits."""
        rest = dict.fromkeys((layer.name for layer in self.free[len(chosen) :]), to_come)
        return bops(complete(rest | chosen, self.layers, self.end_bits), self.layers)
