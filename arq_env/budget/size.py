"""Bytes of the packed model."""

import math
from typing import TYPE_CHECKING, Any, Self

from arq_env.bitwidths import END_BITS
from arq_env.budget.base import OneBudget, positive
from arq_env.layers import Layer
from arq_env.quantization.files import bytes_beside, packed_bytes

if TYPE_CHECKING:
    from arq_env.problem import Problem


class BytesBudget(OneBudget):
    """A limit on the size of the packed model, as :func:`arq_env.quantization.model_bytes` counts it; activation bits cost nothing.

    :param most: bytes, positive
    :param beside: of them what is no quantized layer's, in float32 (:func:`arq_env.quantization.files.bytes_beside`)
    """

    name, unit = "bytes", "bytes"

    def __init__(self, layers: tuple[Layer, ...], most: float, end_bits: int = END_BITS, *, beside: int = 0):
        most = positive(most, "bytes")
        super().__init__(layers, most, end_bits, limit=math.floor(most), constant=beside)

    @classmethod
    def of(cls, problem: "Problem", value: Any, end_bits: int) -> Self:
        return cls(problem.layers, value, end_bits, beside=bytes_beside(problem.network, problem.layers))

    def layer_cost(self, layer: Layer, weight: int, activation: int) -> int:
        return packed_bytes(layer, weight)

    def in_value(self, cost: int) -> float:
        return cost

    def at(self, value: Any) -> Self:
        return type(self)(self.layers, value, self.end_bits, beside=self.constant)
