"""Searches that a user could pick instead of an agent: each proposes maps and is told their rewards.

A baseline is a generator function ``(space, rng)``: it yields a map, is sent that map's reward, and may end when it has no more
to propose. Every map is within the environment's budget.
"""

import math
from collections.abc import Callable, Generator
from itertools import product
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from arq_env.bitwidths import MIN_BITS, Bits, BitWidthMap, uniform
from arq_env.budget import Budget
from arq_env.search_space import SearchSpace
from arq_env.sensitivity import Place, Sensitivities
from arq_env.support.errors import ArqError

from .methods import WITH_OPTUNA

Proposals = Generator[BitWidthMap, float, None]
#: What an activation's sensitivity is multiplied by, in the order in which the integer program's maps are tried: single effects
#: measured on weights and on activations need not add up alike (LIMPQ, Tang et al. 2022, weighs weights by 2).
ACTIVATION_WEIGHTS = (1.0, 0.5, 2.0, 0.25, 4.0, 0.7, 1.4, 0.35, 2.8, 0.125, 8.0)


def uniform_bits(space: SearchSpace, rng: np.random.Generator | None = None) -> Proposals:
    """The same bits in every free layer: each pair that no other affordable pair exceeds, dearest first."""
    maps = {pair: uniform(space.layers, *pair) for pair in product(space.widths, repeat=2)}
    pairs = [pair for pair, bit_widths in maps.items() if space.default_budget.within(bit_widths)]
    best = [p for p in pairs if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in pairs)]
    for pair in sorted(best, key=lambda pair: (-pair[0] * pair[1], pair)):
        yield maps[pair]


def random(space: SearchSpace, rng: np.random.Generator) -> Proposals:
    """Uniformly random actions, as an agent's warm-up plays them."""
    while True:
        yield space.decode(rng.uniform(-1, 1, (len(space.free_layers), 2)))


def greedy(space: SearchSpace, rng: np.random.Generator | None = None) -> Proposals:
    """From the most bits down: always take the bit whose loss costs least sensitivity for what it saves, until the map fits.

    Where a single bit saves nothing, as in a table of latencies, as many are taken as do.
    """
    sensitivities, budget, most = space.sensitivities, space.default_budget, space.widths[-1]
    bits = dict.fromkeys(sensitivities, most)

    def as_map(bits: dict[Place, int]) -> BitWidthMap:
        pairs = {a.name: Bits(bits[a.name, "weight"], bits.get((a.name, "activation"), most)) for a in space.free_layers}
        return space.complete(pairs)

    while (excess := budget.excess(as_map(bits))) > 0:

        def cheaper(place: Place, excess: float = excess) -> tuple[float, float, int]:
            """What the next bits that save something cost for what they save; and where none do, what the next bit costs."""
            lost = [effect - sensitivities[place][bits[place] - MIN_BITS] for effect in sensitivities[place]]
            fewer = [width for width in reversed(space.widths) if width < bits[place]]
            for lower in fewer:
                if (saved := excess - budget.excess(as_map(bits | {place: lower}))) > 0:
                    return lost[lower - MIN_BITS] / saved, 0.0, lower
            return math.inf, lost[fewer[0] - MIN_BITS], fewer[0]

        steps = {place: cheaper(place) for place in bits if bits[place] > space.widths[0]}
        cheapest = min(steps, key=lambda place: steps[place][:2])
        bits[cheapest] = steps[cheapest][2]
    yield as_map(bits)


def integer_program(space: SearchSpace, rng: np.random.Generator | None = None) -> Proposals:
    """Maps of least total sensitivity within the budget, as in HAWQ-V3 (Yao et al. 2021): the optimum of an integer program.

    One for each of :data:`ACTIVATION_WEIGHTS`, maps met before left out; each is solved by SciPy's HiGHS in about a second.
    """
    seen: list[BitWidthMap] = []
    for weight in ACTIVATION_WEIGHTS:
        if (bit_widths := least_sensitive(space, space.sensitivities, weight)) not in seen:
            seen.append(bit_widths)
            yield bit_widths


def least_sensitive(
    space: SearchSpace, sensitivities: Sensitivities, activation_weight: float = 1.0, budget: Budget | None = None
) -> BitWidthMap:
    """The map within a budget whose sensitivities, those of activations times ``activation_weight``, add up to least.

    :param budget: the environment's own, if none is given
    """
    free, widths, fixed = space.free_layers, space.widths, space.complete({})
    pairs, picked = list(product(widths, repeat=2)), np.array(widths) - MIN_BITS
    rows = {layer.name: row for row, layer in enumerate(free)}
    losses = np.zeros((len(free), len(pairs)))
    for row, layer in enumerate(free):
        weights = sensitivities[layer.name, "weight"]
        activations = sensitivities.get((layer.name, "activation"), [0.0] * len(sensitivities[layer.name, "weight"]))
        losses[row] = [weights[w - MIN_BITS] + activation_weight * activations[a - MIN_BITS] for w, a in pairs]
    constraints = [LinearConstraint(np.kron(np.eye(len(free)), np.ones(len(pairs))), 1, 1)]
    for part in (budget or space.default_budget).parts:
        costs, limit = (
            np.stack([part.costs[layer.name][np.ix_(picked, picked)].ravel() for layer in free]),
            part.limit - part.constant,
        )
        for layer in space.layers:
            if layer.name in rows:
                continue
            weight, activation = fixed[layer.name]
            if layer.tied_to in rows:  # a free layer decides its activation bits
                costs[rows[layer.tied_to]] += np.tile(part.costs[layer.name][weight - MIN_BITS][picked], len(widths))
            else:
                limit -= int(part.costs[layer.name][weight - MIN_BITS][activation - MIN_BITS])
        # HiGHS works with absolute tolerances: whole units of the largest common cost, and half a unit to spare
        unit = max(int(np.gcd.reduce(costs.ravel())), 1)
        constraints.append(LinearConstraint(costs.reshape(1, -1) / unit, ub=limit // unit + 0.5))
    for layer in free:
        if layer.tied_to is not None:
            equal = np.zeros((len(widths), *losses.shape))
            for column, (_, a) in enumerate(pairs):
                equal[widths.index(a), rows[layer.name], column] = 1
                if layer.tied_to in rows:
                    equal[widths.index(a), rows[layer.tied_to], column] = -1
            shared = 0.0 if layer.tied_to in rows else np.equal(widths, fixed[layer.tied_to].activation)
            constraints.append(LinearConstraint(equal.reshape(len(widths), -1), shared, shared))
    scaled = (losses / max(losses.max(), 1e-12)).ravel()
    solved = milp(scaled, integrality=np.ones(losses.size), bounds=Bounds(0, 1), constraints=constraints)
    if solved.x is None:
        raise ArqError(f"the integer program was not solved ({solved.message}): try another budget")
    chosen = solved.x.reshape(losses.shape).argmax(1)
    return space.complete({layer.name: Bits(*pairs[i]) for layer, i in zip(free, chosen, strict=True)})


def evolution(space: SearchSpace, rng: np.random.Generator) -> Proposals:
    """Optuna's genetic algorithm (NSGA-II with one objective, populations of 20) over the actions of an episode."""
    return _optuna(space, lambda optuna, seed: optuna.samplers.NSGAIISampler(population_size=20, seed=seed), rng)


def parzen(space: SearchSpace, rng: np.random.Generator) -> Proposals:
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011) over the actions of an episode."""
    return _optuna(space, lambda optuna, seed: optuna.samplers.TPESampler(n_startup_trials=20, seed=seed), rng)


def import_optuna() -> Any:
    """Optuna, an optional dependency.

    :raises ArqError: when it is not installed
    """
    try:
        import optuna
    except ImportError as error:
        raise ArqError(f'the searches {" and ".join(WITH_OPTUNA)} need Optuna ({error}): pip install -e ".[search]"') from error
    return optuna


def _optuna(space: SearchSpace, sampler: Callable[[Any, int], Any], rng: np.random.Generator) -> Proposals:
    optuna = import_optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=sampler(optuna, int(rng.integers(2**31))))
    names = [f"{layer.name} {kind}" for layer in space.free_layers for kind in Bits._fields]
    while True:
        trial = study.ask()
        actions = [trial.suggest_float(name, -1, 1) for name in names]
        reward = yield space.decode(np.reshape(actions, (-1, 2)))
        study.tell(trial, reward)


BASELINES: dict[str, Callable[[SearchSpace, np.random.Generator], Proposals]] = {
    "uniform": uniform_bits,
    "random": random,
    "greedy": greedy,
    "integer_program": integer_program,
    "evolution": evolution,
    "parzen": parzen,
}
