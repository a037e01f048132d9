"""Compare sensitivities to second order with those measured place by place: rank correlations, and the maps that follow from both.

Measured are the divergence of few bits in one place and 8 elsewhere, less that of 8 bits everywhere. Each is done for two seeds, of
images, noise and labels, for what agreement there can be. A stopped run starts over.
"""

from pathlib import Path

from arq_agents import command_line, shared_options


def parse():
    parser = command_line.parser(__doc__)
    shared_options.add_environment(parser, budget=0.007)
    shared_options.add_engine(parser, "measurements")
    parser.add_argument("--output", type=Path, default=Path("experiments/results/sensitivities"), help="folder for the JSON file")
    return parser.parse_args()


options = command_line.start(__name__, parse)

import time

from scipy import stats

from arq_agents.baselines import least_sensitive
from arq_agents.main import engine_of, make_env
from arq_env.bitwidths import MAX_BITS, Bits, complete, uniform
from arq_env.env import arq_env_of
from arq_env.sensitivity import WITH_EFFECT, Divergence, SecondOrder, estimate_sensitivities, for_all_bits, places
from arq_env.support.engines import Engine
from arq_env.support.files import write_json
from arq_env.support.provenance import provenance

SEEDS = (0, 1)


def main(options):
    env = arq_env_of(make_env(options))
    with engine_of(options) as env.evaluator.engine:
        runs = engine_runs(env, env.evaluator.engine)
        keys = [(place, i) for place in places(env.layers) for i in range(len(WITH_EFFECT))]
        names = [f"{kind} {seed}" for kind in ("second order", "measured") for seed in SEEDS]
        agreement = {
            f"{a}, {b}": {what: correlation(runs[a][0], runs[b][0], chosen) for what, chosen in groups(keys).items()}
            for i, a in enumerate(names)
            for b in names[i + 1 :]
        }
        for pair, found in agreement.items():
            print(pair + ":", ", ".join(f"{what} {value:.3f}" for what, value in found.items()))
        rewards = {name: env.judge(least_sensitive(env, table))["reward"] for name, (table, _) in runs.items()}
    for name, reward in rewards.items():
        print(f"{name}: {runs[name][1]:.0f} s, reward of its integer program's map within {options.budget} {reward:.3f}")
    document = {"env": options.env, "budget": options.budget, "spearman": agreement, "rewards": rewards}
    document |= {"seconds": {name: seconds for name, (_, seconds) in runs.items()}, "problem": env.problem.origin}
    name = f"{options.env}-{options.training}".lower() if options.training else options.env.lower()
    write_json(options.output / f"{name}.json", document | {"provenance": provenance()})


def engine_runs(env, engine: Engine) -> dict:
    """Name to sensitivities and the seconds they took."""
    problem, quantizer = env.problem, env.evaluator.quantizer
    runs = {}
    for seed in SEEDS:
        start = time.perf_counter()
        table = estimate_sensitivities(SecondOrder(problem, quantizer, seed), engine.map)
        runs[f"second order {seed}"] = table, time.perf_counter() - start
        start = time.perf_counter()
        table = measured(Divergence(problem, quantizer, seed), env.layers, engine)
        runs[f"measured {seed}"] = table, time.perf_counter() - start
    return runs


def measured(divergence: Divergence, layers, engine: Engine) -> dict:
    """The same table from a quantized network for each bit-width in each place."""
    widest = uniform(layers, MAX_BITS, MAX_BITS)
    chosen = [
        widest | {layer: Bits(MAX_BITS, MAX_BITS)._replace(**{kind: bits})}
        for layer, kind in places(layers)
        for bits in WITH_EFFECT
    ]
    least, *found = engine.map(divergence, [widest, *(complete(one, layers) for one in chosen)])
    effects = iter(found)
    return {place: for_all_bits([max(next(effects) - least, 0.0) for _ in WITH_EFFECT]) for place in places(layers)}


def groups(keys) -> dict:
    """Which places and bit-widths are compared with each other."""
    parts = {f"{bits} bits": [key for key in keys if key[1] == i] for i, bits in enumerate(WITH_EFFECT)}
    kinds = {kind: [key for key in keys if key[0][1] == kind] for kind in Bits._fields}
    return {"all": keys} | parts | kinds


def correlation(a, b, keys) -> float:
    """Spearman's, over places and bit-widths."""
    return float(stats.spearmanr([a[place][i] for place, i in keys], [b[place][i] for place, i in keys])[0])


if __name__ == "__main__":
    command_line.run(main, options, resumes=False)
