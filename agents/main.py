"""The command behind the scripts that run one search: search, export the best map, certify it beside FP32 and uniform 4 bits."""

from functools import partial
from pathlib import Path

import gymnasium
from tqdm import tqdm

from agents.algorithms import ALGORITHMS, EPISODES
from agents.levers import LEVERS, split_method
from agents.search import search
from arq_env import ArqError, command_line
from arq_env.bitwidths import MAX_BITS, MIN_BITS, uniform
from arq_env.comparison import TestSettings, compare_maps
from arq_env.files import write_json
from arq_env.registration import ENVIRONMENTS
from arq_env.report import comparison_table, layer_table

#: The uniform network that every found map is compared with.
UNIFORM_BITS = 4
#: Episodes of a search by default on the embedded data: a first result within minutes.
SIGNS_EPISODES = 60


def main(algorithm: str) -> None:
    """Parse the command line and run one search.

    :param algorithm: as for :func:`agents.search.search`
    """
    name = f"{algorithm.upper()} (stable-baselines3)" if algorithm in ALGORITHMS else f"the {algorithm.replace('_', ' ')}"
    options = _parse(f"Search a bit-width map with {name}. Stop it at any time: the same command goes on.")
    algorithm = "+".join([algorithm, *options.add])
    split_method(algorithm)  # mistakes first
    trained = "" if options.training == "gaussian" else f"-{options.training}"
    folder = (
        options.output
        or Path("runs") / f"{algorithm}-{options.env}-budget{options.budget:g}-sigma{options.sigma:g}{trained}-seed{options.seed}"
    )
    env = make_env(options)
    print(
        f"{algorithm} on {options.env}: at most {options.episodes} episodes into {folder}  (tensorboard --logdir {folder.parent})"
    )
    best = search(
        algorithm,
        env,
        episodes=options.episodes,
        folder=folder,
        seed=options.seed,
        config={"env": options.env},
    )
    base = env.unwrapped
    print(f"\nexported: episode {best.episode}, reward {best.reward:.3f}; {folder / 'bit_widths.json'}\n")
    print(layer_table(base.layers, best.bit_widths))
    if options.test_images:
        _certify(base, best, folder, options)


def make_env(options):
    """The environment that a command line asks for.

    :param options: with ``env, budget, sigma, training, device, regained_bits``
    """
    arguments = {name: getattr(options, name) for name in ("budget", "sigma", "training", "device", "regained_bits")}
    try:
        return gymnasium.make(options.env, disable_env_checker=True, **arguments)
    except TypeError as error:  # an environment that takes no budget
        if "keyword argument" not in str(error):
            raise
        raise ArqError(f"{options.env} is not one of this package's: choose one of {', '.join(ENVIRONMENTS)}") from error


def add_environment(parser, *, budget: float | None = None, training: str = "gaussian", regained_bits: int = 0) -> None:
    """The options that :func:`make_env` takes.

    :param budget: the default; without it there is no such option
    :param training, regained_bits: defaults
    """
    parser.add_argument("--env", default="ARQ-ResNet20-v0", help="environment id; ARQ-ResNet20-Signs-v0 downloads nothing")
    if budget is not None:
        parser.add_argument("--budget", type=float, default=budget, help="bit operations, as a fraction of FP32's")
    parser.add_argument(
        "--sigma",
        type=float,
        default=0.5,
        help="smoothing noise, in units of pixels in [0, 1]; a checkpoint trained under it must be there",
    )
    parser.add_argument("--training", default=training, help="how that checkpoint was trained: gaussian or consistency")
    parser.add_argument(
        "--regained-bits",
        type=command_line.whole(0, MAX_BITS - MIN_BITS),
        default=regained_bits,
        help="judge maps with weights so many bits finer: 1 for a map to fine-tune (finalize.py), 0 for one to use as it is",
    )
    parser.add_argument("--device", default="cpu", help="of the network that is certified, cpu or cuda; an agent stays on the CPU")


def _parse(description: str):
    parser = command_line.parser(description)
    add_environment(parser, budget=1 / 64)
    parser.add_argument(
        "--episodes",
        type=command_line.whole(1),
        help=f"maps to try (default: {EPISODES}, or {SIGNS_EPISODES} on ARQ-ResNet20-Signs-v0)",
    )
    parser.add_argument("--seed", type=command_line.whole(0), default=0, help="of the search")
    parser.add_argument(
        "--add", nargs="+", choices=LEVERS, default=[], metavar="LEVER", help=f"what to add to the search: {', '.join(LEVERS)}"
    )
    parser.add_argument("--output", type=Path, help="run folder (default: runs/ and a name made of the settings)")
    parser.add_argument(
        "--test-images",
        type=command_line.whole(0),
        default=100,
        help="at most so many test images, evenly spread, that FP32, uniform 4 bits and the found map are certified on; 0 for none",
    )
    parser.add_argument("--test-n", type=command_line.whole(10), default=500, help="noise samples counted for each of them")
    options = parser.parse_args()
    if options.episodes is None:
        options.episodes = SIGNS_EPISODES if options.env == "ARQ-ResNet20-Signs-v0" else EPISODES
    return options


def _certify(env, best, folder: Path, options) -> None:
    """Certify FP32, uniform 4 bits and the found map on the same test images, print the table, write ``certificates.json``."""
    every = -(-len(env.problem.dataset.test.images) // options.test_images)
    maps = {
        f"W{UNIFORM_BITS}A{UNIFORM_BITS}": uniform(env.layers, UNIFORM_BITS, UNIFORM_BITS, env.end_bits),
        "found": best.bit_widths,
    }
    settings = TestSettings(every=every, n=options.test_n)
    print(f"\ncertifying on every {every}th test image (the search saw none), n = {settings.n}, alpha = {settings.alpha}:")
    comparison = compare_maps(
        env.evaluator,
        maps,
        settings,
        folder=folder / "certificates",
        progress=lambda name: partial(tqdm, desc=name, leave=False),
    )
    print(comparison_table(comparison))
    write_json(folder / "certificates.json", comparison.document(env.evaluator))
