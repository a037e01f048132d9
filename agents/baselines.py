"""Searches that a user could pick instead of an agent: each proposes maps and is told their rewards.

A baseline is a generator function ``(env, rng)``: it yields a map, is sent that map's reward, and may end when it has no more
to propose. Every map is within the environment's budget.
"""

from collections.abc import Generator
from itertools import product

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from arq_env.bitwidths import MAX_BITS, MIN_BITS, Bits, BitWidthMap, bops, complete, uniform
from arq_env.budget import BopsBudget
from arq_env.layers import kept_macs
from arq_env.sensitivity import Sensitivities
from arq_env.support.errors import ArqError

from .methods import WITH_OPTUNA

Proposals = Generator[BitWidthMap, float, None]
WIDTHS = range(MIN_BITS, MAX_BITS + 1)
#: What an activation's sensitivity is multiplied by, in the order in which the integer program's maps are tried: single effects
#: measured on weights and on activations need not add up alike (LIMPQ, Tang et al. 2022, weighs weights by 2).
ACTIVATION_WEIGHTS = (1.0, 0.5, 2.0, 0.25, 4.0, 0.7, 1.4, 0.35, 2.8, 0.125, 8.0)


def uniform_bits(env, rng: np.random.Generator) -> Proposals:
    """The same bits in every free layer: each pair that no other affordable pair exceeds, dearest first."""
    pairs = [pair for pair in product(WIDTHS, WIDTHS) if affordable(env, uniform(env.layers, *pair, env.end_bits))]
    best = [p for p in pairs if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in pairs)]
    for weight, activation in sorted(best, key=lambda pair: (-pair[0] * pair[1], pair)):
        yield uniform(env.layers, weight, activation, env.end_bits)


def random(env, rng: np.random.Generator) -> Proposals:
    """Uniformly random actions, as an agent's warm-up plays them."""
    while True:
        yield env.decode(rng.uniform(-1, 1, (len(env.free_layers), 2)))


def greedy(env, rng: np.random.Generator) -> Proposals:
    """From 8 bits down: always take the bit whose loss costs least sensitivity per bit operation saved, until the map fits."""
    sensitivities = env.evaluator.sensitivities
    bits = dict.fromkeys(sensitivities, MAX_BITS)

    def as_map(bits):
        pairs = {a.name: Bits(bits[a.name, "weight"], bits.get((a.name, "activation"), MAX_BITS)) for a in env.free_layers}
        return complete(pairs, env.layers, env.end_bits)

    while not affordable(env, as_map(bits)):
        cost = bops(as_map(bits), env.layers)

        def price(place, cost=cost):
            lower = bits[place] - 1
            saved = cost - bops(as_map(bits | {place: lower}), env.layers)
            lost = sensitivities[place][lower - MIN_BITS] - sensitivities[place][lower + 1 - MIN_BITS]
            return lost / saved

        bits[min((place for place in bits if bits[place] > MIN_BITS), key=price)] -= 1
    yield as_map(bits)


def integer_program(env, rng: np.random.Generator) -> Proposals:
    """Maps of least total sensitivity within the budget, as in HAWQ-V3 (Yao et al. 2021): the optimum of an integer program.

    One for each of :data:`ACTIVATION_WEIGHTS`, maps met before left out; each is solved by SciPy's HiGHS in about a second.
    """
    sensitivities, seen = env.evaluator.sensitivities, []
    for weight in ACTIVATION_WEIGHTS:
        if (bit_widths := least_sensitive(env, sensitivities, weight)) not in seen:
            seen.append(bit_widths)
            yield bit_widths


def least_sensitive(
    env, sensitivities: Sensitivities, activation_weight: float = 1.0, budget: BopsBudget | None = None
) -> BitWidthMap:
    """The map within a budget whose sensitivities, those of activations times ``activation_weight``, add up to least.

    :param budget: the environment's own, if none is given
    """
    free, pairs = env.free_layers, list(product(WIDTHS, WIDTHS))
    rows = {layer.name: row for row, layer in enumerate(free)}
    losses, costs = np.zeros((len(free), len(pairs))), np.zeros((len(free), len(pairs)), np.int64)
    for row, layer in enumerate(free):
        weights = sensitivities[layer.name, "weight"]
        activations = sensitivities.get((layer.name, "activation"), [0.0] * len(WIDTHS))
        losses[row] = [weights[w - MIN_BITS] + activation_weight * activations[a - MIN_BITS] for w, a in pairs]
        costs[row] = [layer.macs * w * a for w, a in pairs]
    limit = (budget or env.default_budget).limit - 1024 * kept_macs(env.layers)
    for layer in env.layers:
        if layer.tied_to in rows and layer.name not in rows:  # an end whose activation bits a free layer decides
            costs[rows[layer.tied_to]] += [layer.macs * env.end_bits * a for _, a in pairs]
        elif layer.name not in rows:
            limit -= layer.macs * env.end_bits**2
    # HiGHS works with absolute tolerances: whole units of the largest common cost, and half a unit to spare
    unit = np.gcd.reduce(costs.ravel())
    constraints = [
        LinearConstraint(np.kron(np.eye(len(free)), np.ones(len(pairs))), 1, 1),
        LinearConstraint(costs.reshape(1, -1) / unit, ub=limit // unit + 0.5),
    ]
    for layer in free:
        if layer.tied_to is not None:
            equal = np.zeros((len(WIDTHS), *losses.shape))
            for column, (_, a) in enumerate(pairs):
                equal[a - MIN_BITS, rows[layer.name], column] = 1
                if layer.tied_to in rows:
                    equal[a - MIN_BITS, rows[layer.tied_to], column] = -1
            fixed = 0.0 if layer.tied_to in rows else np.eye(len(WIDTHS))[env.end_bits - MIN_BITS]
            constraints.append(LinearConstraint(equal.reshape(len(WIDTHS), -1), fixed, fixed))
    scaled = (losses / max(losses.max(), 1e-12)).ravel()
    solved = milp(scaled, integrality=np.ones(losses.size), bounds=Bounds(0, 1), constraints=constraints)
    if solved.x is None:
        raise ArqError(f"the integer program was not solved ({solved.message}): try another budget")
    chosen = solved.x.reshape(losses.shape).argmax(1)
    return complete({layer.name: Bits(*pairs[i]) for layer, i in zip(free, chosen, strict=True)}, env.layers, env.end_bits)


def evolution(env, rng: np.random.Generator) -> Proposals:
    """Optuna's genetic algorithm (NSGA-II with one objective, populations of 20) over the actions of an episode."""
    return _optuna(env, lambda optuna, seed: optuna.samplers.NSGAIISampler(population_size=20, seed=seed), rng)


def parzen(env, rng: np.random.Generator) -> Proposals:
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011) over the actions of an episode."""
    return _optuna(env, lambda optuna, seed: optuna.samplers.TPESampler(n_startup_trials=20, seed=seed), rng)


def import_optuna():
    """Optuna, an optional dependency.

    :raises ArqError: when it is not installed
    """
    try:
        import optuna
    except ImportError as error:
        raise ArqError(f'the searches {" and ".join(WITH_OPTUNA)} need Optuna ({error}): pip install -e ".[search]"') from error
    return optuna


def _optuna(env, sampler, rng) -> Proposals:
    optuna = import_optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=sampler(optuna, int(rng.integers(2**31))))
    names = [f"{layer.name} {kind}" for layer in env.free_layers for kind in Bits._fields]
    while True:
        trial = study.ask()
        actions = [trial.suggest_float(name, -1, 1) for name in names]
        reward = yield env.decode(np.reshape(actions, (-1, 2)))
        study.tell(trial, reward)


def affordable(env, bit_widths: BitWidthMap) -> bool:
    """Whether a map is within the environment's budget."""
    return bops(bit_widths, env.layers) <= env.default_budget.limit


BASELINES = {
    "uniform": uniform_bits,
    "random": random,
    "greedy": greedy,
    "integer_program": integer_program,
    "evolution": evolution,
    "parzen": parzen,
}
