"""The cheapest map that keeps a share of FP32's certified radius: a bisection over budgets."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from arq_env.bitwidths import BitWidthMap, uniform
from arq_env.budget import OneBudget
from arq_env.env import ArqEnv
from arq_env.evaluation import Evaluator
from arq_env.support.errors import ArqError

#: Halvings of the range of budgets, whose ends differ by a factor of 16 in bit operations: to 2% of the cost.
HALVINGS = 7
#: Fresh draws that the map is judged on in the end.
DRAWS = 4


@dataclass(frozen=True)
class Reached:
    """What a bisection found.

    :param budget: the least that it found to be enough, in the measure of its kind
    :param ratio: ACR over FP32's on half of the reward images, by which the map was chosen
    :param fresh_ratio: the mean of that on parts of the other half, with other noise and calibration images
    :param interval: 95% t interval of ``fresh_ratio``
    :param evaluations: of maps, those on fresh draws included
    """

    bit_widths: BitWidthMap
    budget: float
    ratio: float
    fresh_ratio: float
    interval: tuple[float, float]
    evaluations: int


def cheapest(env: ArqEnv, propose: Callable[[float], BitWidthMap], target: float) -> Reached:
    """The map of the least budget at which a searcher's map keeps ``target`` of FP32's ACR.

    Maps that keep more are taken to cost more, which noise can undo near the target; so the map is judged again, on images that
    decided nothing.

    :param propose: gives a map for a budget, in the measure of the environment's
    :param target: a share of FP32's ACR, such as 0.99
    :raises ArqError: when the target is no share, even the dearest map misses it, or there are several limits
    """
    if not 0 < target < 2:
        raise ArqError(f"the target is {target}: give a share of FP32's ACR, such as 0.99")
    if not isinstance(env.default_budget, OneBudget):
        raise ArqError(f"the budget is {env.default_budget}: give a target for one kind of cost")
    costs = [env.default_budget.amount(uniform(env.layers, bits, bits)) for bits in (env.widths[0], env.widths[-1])]
    judge, *fresh = _judges(env.evaluator)
    judged = 0

    def share(evaluator: Evaluator, bit_widths: BitWidthMap) -> float:
        nonlocal judged
        judged += 1
        return evaluator.evaluate(bit_widths).acr / evaluator.reference.acr

    def tried(budget: float) -> tuple[float, BitWidthMap, float]:
        bit_widths = propose(budget)
        return budget, bit_widths, share(judge, bit_widths)

    low, found = math.log(costs[0]), tried(costs[1])
    if found[2] < target:
        raise ArqError(f"{env.widths[-1]} bits keep {found[2]:.4f} of FP32's ACR, less than {target}: ask for less")
    for _ in range(HALVINGS):
        middle = (low + math.log(found[0])) / 2
        if (here := tried(math.exp(middle)))[2] >= target:
            found = here
        else:
            low = middle
    shares = np.array([share(other, found[1]) for other in fresh])
    spread = stats.t.ppf(0.975, DRAWS - 1) * shares.std(ddof=1) / math.sqrt(DRAWS)
    mean = float(shares.mean())
    return Reached(found[1], found[0], found[2], mean, (float(mean - spread), float(mean + spread)), judged)


def _judges(evaluator: Evaluator) -> list[Evaluator]:
    """One on half of the reward images, and others on parts of the other half, each with noise and calibration images of its own.

    None of these images was trained on, and sensitivities are not measured on them.
    """
    settings = evaluator.settings
    half, part = settings.images // 2, settings.images // 2 // DRAWS
    if not part:
        raise ArqError(f"there are {settings.images} reward images: a target needs at least {2 * DRAWS}")
    judges = [replace(settings, images=half)]
    for draw in range(DRAWS):
        first, seed = settings.first + half + draw * part, (settings.seed + 1 + draw) % 2**32
        judges.append(replace(settings, images=part, first=first, seed=seed))
    made = [Evaluator(evaluator.problem, judge) for judge in judges]
    for judge in made:
        judge.engine = evaluator.engine
    return made
