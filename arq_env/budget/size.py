"""Bytes of the packed model."""

from typing import TYPE_CHECKING, Any, Self

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

    def __init__(self, layers: tuple[Layer, ...], most: float, *, beside: int = 0):
        super().__init__(layers, most, units=1, constant=beside)

    @classmethod
    def of(cls, problem: "Problem", value: Any, layers: tuple[Layer, ...]) -> Self:
        return cls(layers, value, beside=bytes_beside(problem.network, layers))

    def checked(self, value: Any) -> float:
        return positive(value, self.unit)

    def layer_cost(self, layer: Layer, weight: int, activation: int) -> int:
        return packed_bytes(layer, weight)
