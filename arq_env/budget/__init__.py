"""What a map may cost, and which bits keep the rest of the network affordable: a module for each kind of budget."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from arq_env.budget.base import WIDTHS, AllOf, Budget, BudgetSpec, OneBudget
from arq_env.budget.bops import BopsBudget
from arq_env.budget.latency import LatencyBudget
from arq_env.budget.size import BytesBudget
from arq_env.layers import Layer
from arq_env.support.errors import ArqError, shown

if TYPE_CHECKING:
    from arq_env.problem import Problem

__all__ = [
    "BUDGETS",
    "WIDTHS",
    "AllOf",
    "BopsBudget",
    "Budget",
    "BudgetSpec",
    "BytesBudget",
    "LatencyBudget",
    "OneBudget",
    "make_budget",
]

#: The kinds by the name that a specification has for them.
BUDGETS: dict[str, type[OneBudget]] = {kind.name: kind for kind in (BopsBudget, BytesBudget, LatencyBudget)}


def make_budget(wanted: BudgetSpec, problem: "Problem", layers: tuple[Layer, ...] | None = None) -> Budget:
    """The budget that is asked for.

    :param wanted: a fraction of FP32's bit operations, or limits by kind, such as ``{"bops": 0.01, "bytes": 120_000}``, which hold
        together
    :param layers: the problem's with other choices, see :func:`arq_env.bitwidths.restrict`; None for its own
    :raises ArqError: for an unknown kind, a limit that is none, or one that even the smallest bits exceed
    """
    layers = problem.layers if layers is None else layers
    if not isinstance(wanted, Mapping):
        return BopsBudget.of(problem, wanted, layers)
    unknown = [name for name in wanted if not isinstance(name, str) or name not in BUDGETS]
    if unknown or not wanted:
        raise ArqError(f"the budget is {shown(dict(wanted))}: give a limit for one or several of {', '.join(BUDGETS)}")
    parts = [BUDGETS[name].of(problem, value, layers) for name, value in wanted.items()]
    return parts[0] if len(parts) == 1 else AllOf(parts)
