"""Bit operations."""

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Self

from arq_env.bitwidths import END_BITS, MAX_BITS, Bits, BitWidthMap, bops, free_layers
from arq_env.budget.base import BudgetSpec, OneBudget, is_number
from arq_env.layers import Layer, kept_macs, total_macs
from arq_env.support.errors import ArqError

if TYPE_CHECKING:
    from arq_env.problem import Problem


class BopsBudget(OneBudget):
    """A limit on bit operations (MACs x weight bits x activation bits).

    :param fraction: the limit as a fraction of FP32's BOPs (32 x 32 a MAC), in (0, 1]

    ``limit`` is the largest number of BOPs whose fraction, as a float, is no more than ``fraction``: every map fits the budget that
    :func:`arq_env.bitwidths.bops_fraction` reports of it.
    """

    name, unit = "bops", "of FP32's bit operations"

    def __init__(self, layers: tuple[Layer, ...], fraction: float, end_bits: int = END_BITS):
        if not (is_number(fraction) and 0 < fraction <= 1):
            raise ArqError(f"the budget is {fraction!r}: give a fraction of FP32's bit operations in (0, 1], such as 0.015625")
        self._fp32, fraction = 1024 * total_macs(layers), float(fraction)
        limit = math.floor(Fraction(fraction) * self._fp32)
        while self.in_value(limit + 1) <= fraction:  # what rounds to this fraction counts to it
            limit += 1
        macs = [layer.macs for layer in free_layers(layers)]
        #: MACs of the free layers from each step on, and 0 after the last.
        self.macs_from = [sum(macs[step:]) for step in range(len(macs) + 1)]
        super().__init__(layers, fraction, end_bits, limit=limit, constant=1024 * kept_macs(layers))

    @classmethod
    def of(cls, problem: "Problem", value: Any, end_bits: int) -> Self:
        return cls(problem.layers, value, end_bits)

    def layer_cost(self, layer: Layer, weight: int, activation: int) -> int:
        return layer.macs * weight * activation

    def in_value(self, cost: int) -> float:
        return cost / self._fp32

    def at(self, value: Any) -> Self:
        return type(self)(self.layers, value, self.end_bits)

    @property
    def spec(self) -> BudgetSpec:
        return self.value

    def even_share(self, chosen: BitWidthMap) -> float:
        """Weight bits x activation bits that every MAC of the layers to come can have, as if all had the same."""
        left = self.limit - bops(self.with_rest(chosen, Bits(0, 0)), self.layers)
        return left / self.macs_from[len(chosen)]

    def even_bits(self, chosen: BitWidthMap) -> tuple[float, float]:
        """In closed form, since the cost is their square."""
        even = min(math.sqrt(self.even_share(chosen)), float(MAX_BITS))
        return even, even

    def __str__(self) -> str:
        return f"{self.value:.3%} {self.unit}"
