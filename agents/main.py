"""The command behind the scripts that run one search: search, export the best map, certify it beside FP32 and uniform 4 bits."""

import argparse
from functools import partial
from pathlib import Path

import gymnasium
from tqdm import tqdm

from arq_env import ArqError
from arq_env.bitwidths import uniform
from arq_env.comparison import compare_maps
from arq_env.env import ArqEnv, arq_env_of
from arq_env.registration import ENVIRONMENTS
from arq_env.report.tables import comparison_table, layer_table
from arq_env.support.files import write_json
from arq_env.support.settings import TestSettings

from .command_line import budget_name
from .search import search
from .trace import Episode

#: The uniform network that every found map is compared with.
UNIFORM_BITS = 4


def main(options: argparse.Namespace) -> None:
    """Run the search that a command line asks for.

    :param options: of :func:`arq_agents.command_line.search_options`
    """
    algorithm = options.algorithm
    trained = "" if options.training == "gaussian" else f"-{options.training}"
    problem = f"{options.env}-budget{budget_name(options.budget)}-sigma{options.sigma:g}{trained}"
    folder = options.output or Path("runs") / f"{algorithm}-{problem}-seed{options.seed}"
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
    base = arq_env_of(env)
    print(f"\nexported: episode {best.episode}, reward {best.reward:.3f}; {folder / 'bit_widths.json'}\n")
    print(layer_table(base.layers, best.bit_widths))
    if options.test_images:
        _certify(base, best, folder, options)


def make_env(options: argparse.Namespace) -> gymnasium.Env:
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


def _certify(env: ArqEnv, best: Episode, folder: Path, options: argparse.Namespace) -> None:
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
