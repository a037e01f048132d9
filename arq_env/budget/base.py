"""Limits on what a map costs: what the environment and the searches know of them."""

import copy
import math
import numbers
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from arq_env.bitwidths import MAX_BITS, MIN_BITS, Bits, BitWidthMap, complete, free_layers, widths_of
from arq_env.layers import Layer
from arq_env.support.errors import ArqError, shown

if TYPE_CHECKING:
    from arq_env.problem import Problem

#: Bits that a layer's cost is told for.
WIDTHS = range(MIN_BITS, MAX_BITS + 1)
#: How a budget is asked for and written: a fraction of FP32's bit operations, or kinds of :data:`arq_env.budget.BUDGETS` and the
#: limit of each.
BudgetSpec = float | Mapping[str, Any]


class Budget(ABC):
    """Limits on what a map costs, spent layer by layer: all that the environment and the searches know of them.

    The methods take whole maps, or the bits chosen so far, which are those of the first few free layers. More bits never cost less.

    :param layers: all layers of the network, in order; they say which of them are fixed, and which bit-widths there are
    """

    def __init__(self, layers: tuple[Layer, ...]):
        self.layers, self.free, self.widths = layers, free_layers(layers), widths_of(layers)

    @property
    @abstractmethod
    def parts(self) -> "tuple[OneBudget, ...]":
        """The budgets that this one is made of; a budget of one kind is its own only part."""

    @property
    @abstractmethod
    def value(self) -> Any:
        """The limit as :meth:`at` takes it."""

    @property
    @abstractmethod
    def spec(self) -> BudgetSpec:
        """The budget as :func:`arq_env.budget.make_budget` takes it, and as files hold it: JSON."""

    @abstractmethod
    def at(self, value: Any) -> Self:
        """The same kind of budget with another limit.

        :raises ArqError: when it is no limit of this kind, or even the smallest bits cost more
        """

    @abstractmethod
    def excess(self, bit_widths: BitWidthMap) -> float:
        """By how much a map is over its limits; 0 or less for a map within them."""

    @abstractmethod
    def even_bits(self, chosen: BitWidthMap) -> tuple[float, float]:
        """Weight and activation bits, at most the most there are, that all layers to come could have alike; these of a kind that
        costs nothing.
        """

    @abstractmethod
    def share_from(self, step: int) -> float:
        """Share of the cost of 8 bits in all free layers that those from this step on have, in [0, 1]."""

    def within(self, bit_widths: BitWidthMap) -> bool:
        """Whether a map costs no more than it may."""
        return self.excess(bit_widths) <= 0

    @cached_property
    def priced(self) -> tuple[str, ...]:
        """Of "weight" and "activation" those whose bits cost anything."""
        return tuple(kind for kind in Bits._fields if any(kind in part.priced for part in self.parts))

    def level(self, bits: int) -> Bits:
        """So many bits for weights and activations, but the most there are for the kind that costs nothing."""
        return Bits(*(bits if kind in self.priced else self.widths[-1] for kind in Bits._fields))

    @property
    def fewest(self) -> Bits:
        """The bits of the cheapest map."""
        return Bits(self.widths[0], self.widths[0])

    def with_rest(self, chosen: BitWidthMap, to_come: Bits) -> BitWidthMap:
        """The map in which each free layer that is not chosen yet gets these bits."""
        rest = dict.fromkeys((layer.name for layer in self.free[len(chosen) :]), to_come)
        return complete(rest | chosen, self.layers)

    def fit(self, bits: Bits, chosen: BitWidthMap) -> Bits:
        """Take bits off the next layer's, from the larger of the two first, until the layers after it can still have the fewest.

        They are the next fewer of those there are.

        Bits whose loss would save nothing of what is missing stay. A layer that reads the same tensor as an earlier one gets that
        one's activation bits.
        """
        layer = self.free[len(chosen)]
        least = self.widths[0]
        fitting = Bits(*(max((width for width in self.widths if width <= value), default=least) for value in bits))
        if layer.tied_to is not None:
            shared = complete(chosen, self.layers)[layer.tied_to].activation
            fitting = fitting._replace(activation=shared)

        def over(tried: Bits) -> float:
            return self.excess(self.with_rest(chosen | {layer.name: tried}, self.fewest))

        while (excess := over(fitting)) > 0:
            kinds = [kind for kind in Bits._fields if kind == "weight" or layer.tied_to is None]
            kinds = [kind for kind in kinds if getattr(fitting, kind) > least]
            saving = [kind for kind in kinds if over(fitting._replace(**{kind: least})) < excess]
            larger = max(saving or kinds, key=lambda kind: getattr(fitting, kind))
            fitting = fitting._replace(**{larger: max(width for width in self.widths if width < getattr(fitting, larger))})
        return fitting


class OneBudget(Budget):
    """A limit on one cost that adds up over the layers, in whole units; a subclass says what a layer costs.

    ``limit`` is the most units whose value, as a float, is no more than the budget's: a map fits the budget of its :meth:`amount`.

    :param value: the limit
    :param units: of cost in a value of 1
    :param constant: units that every map costs beside its layers
    :raises ArqError: when even the smallest bits cost more, saying how much
    """

    #: What :data:`arq_env.budget.BUDGETS` calls it, and what its value counts.
    name: ClassVar[str]
    unit: ClassVar[str]

    def __init__(self, layers: tuple[Layer, ...], value: float, *, units: int, constant: int):
        super().__init__(layers)
        self.units, self.constant = units, constant
        #: Layer name to its cost in units, [7, 7] for 2 to 8 weight and activation bits.
        self.costs: dict[str, np.ndarray] = {
            layer.name: np.array([[self.layer_cost(layer, w, a) for a in WIDTHS] for w in WIDTHS], np.int64) for layer in layers
        }
        self._table: dict[str, list[list[int]]] = {name: costs.tolist() for name, costs in self.costs.items()}
        most = [self._table[layer.name][-1][-1] for layer in self.free]
        self._most_from = [sum(most[step:]) for step in range(len(most) + 1)]
        self._set(value)

    def _set(self, value: Any) -> None:
        self._value = self.checked(value)
        self.limit = math.floor(Fraction(self._value) * self.units)
        while self.limit < 2**53 and (self.limit + 1) / self.units <= self._value:  # beyond, floats round by whole units
            self.limit += 1
        if (least := self.least({})) > self.limit:
            raise ArqError(
                f"a budget of {self._value:.10g} {self.unit} cannot be met: the least reachable is "
                f"{math.ceil(Fraction(least / self.units) * 10**6) / 1e6:.15g} ({self.widths[0]} bits wherever "
                "they are not fixed)"
            )

    @classmethod
    @abstractmethod
    def of(cls, problem: "Problem", value: Any, layers: tuple[Layer, ...]) -> Self:
        """The budget for a problem's network, where :data:`arq_env.budget.BUDGETS` has this kind.

        :param layers: the problem's, perhaps with other choices
        :raises ArqError: as :meth:`at`
        """

    @abstractmethod
    def checked(self, value: Any) -> float:
        """The value as a number.

        :raises ArqError: when it is no limit of this kind
        """

    @abstractmethod
    def layer_cost(self, layer: Layer, weight: int, activation: int) -> int:
        """Units that a layer costs at these bits; never less for more bits."""

    def at(self, value: Any) -> Self:
        other = copy.copy(self)
        other._set(value)
        return other

    @property
    def parts(self) -> "tuple[OneBudget, ...]":
        return (self,)

    @property
    def value(self) -> float:
        return self._value

    @property
    def spec(self) -> BudgetSpec:
        return {self.name: self.value}

    @cached_property
    def priced(self) -> tuple[str, ...]:
        axes = zip(Bits._fields, (0, 1), strict=True)
        return tuple(kind for kind, axis in axes if any(np.diff(costs, axis=axis).any() for costs in self.costs.values()))

    def cost(self, bit_widths: BitWidthMap) -> int:
        """Units that a map costs."""
        table = self._table
        return self.constant + sum(table[name][w - MIN_BITS][a - MIN_BITS] for name, (w, a) in bit_widths.items())

    def amount(self, bit_widths: BitWidthMap) -> float:
        """The value of the budget that a map just fits."""
        return self.cost(bit_widths) / self.units

    def excess(self, bit_widths: BitWidthMap) -> int:
        return self.cost(bit_widths) - self.limit

    def least(self, chosen: BitWidthMap) -> int:
        """Units of the cheapest map that has these bits."""
        return self.cost(self.with_rest(chosen, self.fewest))

    def even_bits(self, chosen: BitWidthMap) -> tuple[float, float]:
        """By linear interpolation between the bit-widths there are."""
        costs = [self.cost(self.with_rest(chosen, self.level(bits))) for bits in self.widths]
        fits = max((i for i, cost in enumerate(costs) if cost <= self.limit), default=0)
        even = float(self.widths[fits])
        if even < self.widths[-1]:
            gap = self.widths[fits + 1] - self.widths[fits]
            even += gap * ((self.limit - costs[fits]) / (costs[fits + 1] - costs[fits]))
        weight, activation = (even if kind in self.priced else float(self.widths[-1]) for kind in Bits._fields)
        return weight, activation

    def share_from(self, step: int) -> float:
        return self._most_from[step] / max(self._most_from[0], 1)

    def __str__(self) -> str:
        return f"{self.value:.10g} {self.unit}"


class AllOf(Budget):
    """Several budgets at once: a map is within it when it is within each.

    :param parts: for the same layers
    """

    def __init__(self, parts: Sequence[OneBudget]):
        super().__init__(parts[0].layers)
        self._parts = tuple(parts)

    @property
    def parts(self) -> tuple[OneBudget, ...]:
        return self._parts

    @property
    def value(self) -> dict[str, Any]:
        return {part.name: part.value for part in self.parts}

    @property
    def spec(self) -> BudgetSpec:
        return {part.name: spec[part.name] if isinstance(spec := part.spec, Mapping) else spec for part in self.parts}

    def at(self, value: Any) -> Self:
        names = [part.name for part in self.parts]
        if not isinstance(value, Mapping) or set(value) != set(names):
            raise ArqError(f"the budget is {shown(value)}: give a dictionary with a limit for each of {', '.join(names)}")
        return type(self)([part.at(value[part.name]) for part in self.parts])

    def excess(self, bit_widths: BitWidthMap) -> float:
        """As shares of the limits, added up over those that are exceeded."""
        return sum(max(part.excess(bit_widths), 0) / part.limit for part in self.parts)

    def even_bits(self, chosen: BitWidthMap) -> tuple[float, float]:
        """The fewest that any part leaves."""
        weight, activation = map(min, zip(*(part.even_bits(chosen) for part in self.parts), strict=True))
        return weight, activation

    def share_from(self, step: int) -> float:
        """The mean over the parts."""
        return sum(part.share_from(step) for part in self.parts) / len(self.parts)

    def __str__(self) -> str:
        return " and ".join(map(str, self.parts))


def positive(value: Any, unit: str) -> float:
    """``value`` as a number above 0, whole where it was.

    :raises ArqError: for anything else
    """
    value = value.item() if isinstance(value, np.generic) else value  # a float32 has no such limits
    if not (is_number(value) and 0 < value <= sys.float_info.max):
        raise ArqError(f"the budget is {shown(value)}: give a positive number of {unit}")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def is_number(value: Any) -> bool:
    """Whether it is a real number of Python or NumPy, a bool not being one."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
