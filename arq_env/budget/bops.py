"""Bit operations."""

import math
from typing import TYPE_CHECKING, Any, Self

from arq_env.bitwidths import Bits, BitWidthMap, bops, free_layers
from arq_env.budget.base import BudgetSpec, OneBudget, is_number
from arq_env.layers import Layer, kept_macs, total_macs
from arq_env.support.errors import ArqError, shown

if TYPE_CHECKING:
    from arq_env.problem import Problem


class BopsBudget(OneBudget):
    """A limit on bit operations (MACs x weight bits x activation bits).

    :param fraction: the limit as a fraction of FP32's BOPs (32 x 32 a MAC), in (0, 1], as
        :func:`arq_env.bitwidths.bops_fraction` reports it of a map
    """

    name, unit = "bops", "of FP32's bit operations"

    def __init__(self, layers: tuple[Layer, ...], fraction: float):
        macs = [layer.macs for layer in free_layers(layers)]
        #: MACs of the free layers from each step on, and 0 after the last.
        self.macs_from = [sum(macs[step:]) for step in range(len(macs) + 1)]
        super().__init__(layers, fraction, units=1024 * total_macs(layers), constant=1024 * kept_macs(layers))

    @classmethod
    def of(cls, problem: "Problem", value: Any, layers: tuple[Layer, ...]) -> Self:
        return cls(layers, value)

    def checked(self, value: Any) -> float:
        if not (is_number(value) and 0 < value <= 1):
            raise ArqError(f"the budget is {shown(value)}: give a fraction of FP32's bit operations in (0, 1], such as 0.015625")
        return float(value)

    def layer_cost(self, layer: Layer, weight: int, activation: int) -> int:
        return layer.macs * weight * activation

    @property
    def spec(self) -> BudgetSpec:
        return self.value

    def even_share(self, chosen: BitWidthMap) -> float:
        """Weight bits x activation bits that every MAC of the layers to come can have, as if all had the same."""
        left = self.limit - bops(self.with_rest(chosen, Bits(0, 0)), self.layers)
        return left / self.macs_from[len(chosen)]

    def even_bits(self, chosen: BitWidthMap) -> tuple[float, float]:
        """In closed form, since the cost is their square."""
        even = min(math.sqrt(self.even_share(chosen)), float(self.widths[-1]))
        return even, even

    def __str__(self) -> str:
        return f"{self.value:.3%} {self.unit}"
