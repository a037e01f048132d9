"""The command behind the scripts that run one search: search, export the best map, certify it beside FP32 and uniform 4 bits."""

import argparse
import contextlib
import math
import time
from functools import partial
from pathlib import Path

import gymnasium
import torch
from tqdm import tqdm

from arq_env import ArqError
from arq_env.bitwidths import BitWidthMap, bops_fraction, uniform
from arq_env.comparison import Comparison, certify_on_test_images, compare_maps
from arq_env.env import ArqEnv, arq_env_of
from arq_env.export.formats import write_format
from arq_env.finishing import finished_network
from arq_env.quantization import load_quantized, model_bytes
from arq_env.registration import ENVIRONMENTS
from arq_env.report.page import write_report
from arq_env.report.run import read_run
from arq_env.report.tables import comparison_table, layer_table, verdict
from arq_env.support.engines import Engine, engine
from arq_env.support.files import write_json
from arq_env.support.settings import TestSettings

from .algorithms import hyperparameters
from .baselines import least_sensitive
from .equal_cost import share_sensitivities
from .methods import LEARNERS, split_method
from .run_folder import export_map
from .search import search
from .shared_options import IF_GIVEN, budget_name, label, own_arguments
from .target import cheapest
from .trace import Episode, read_trace

#: The uniform network that every found map is compared with.
UNIFORM_BITS = 4
#: Uniform maps that are judged at most: there are 7 x 7.
UNIFORM_MAPS = 49
#: Images that the time of a search is foretold from; and hours from which it is told.
PROBED, TOLD_HOURS = 16, 0.5


def main(options: argparse.Namespace) -> None:
    """Run the search that a command line asks for.

    :param options: of :func:`arq_agents.shared_options.search_options`
    """
    if getattr(options, "target", None) is not None:
        return reach(options)
    algorithm = options.algorithm
    trained = "" if options.training == "gaussian" else f"-{options.training}"
    problem = f"{options.env}{label(options)}-budget{budget_name(options.budget)}-sigma{options.sigma:g}{trained}"
    folder = options.output or Path("runs") / f"{algorithm}-{problem}-seed{options.seed}"
    env = make_env(options)
    print(
        f"{algorithm} on {options.env}: at most {options.episodes} episodes into {folder}  (tensorboard --logdir {folder.parent})"
    )
    base = arq_env_of(env)
    if (name := split_method(algorithm)[0]) in LEARNERS and "demonstrations" not in options.add:
        warm_up = math.ceil(hyperparameters(name, base.horizon)["learning_starts"] / base.horizon)
        print(f"the first {warm_up} episodes act at random")
    if (hours := estimated_hours(base, options.episodes)) > TOLD_HOURS:
        print(f"about {hours:.2g} hours for all of them, from a few forward passes")
    with engine_of(options) as base.evaluator.engine:
        best = search(
            algorithm,
            env,
            episodes=options.episodes,
            folder=folder,
            seed=options.seed,
            config={"env": options.env},
        )
        print(
            f"\nexported: episode {best.episode}, reward {best.reward:.3f}, of the highest the best on fresh draws; "
            f"{folder / 'bit_widths.json'}\n"
        )
        print(layer_table(base.layers, best.bit_widths))
        if options.finish:
            _finish(base, best, folder, options)
        elif options.test_images:
            _certify(base, best.bit_widths, folder, options)


def reach(options: argparse.Namespace) -> None:
    """Find the cheapest map of the integer program that keeps ``options.target`` of FP32's ACR; export and certify it."""
    trained = "" if options.training == "gaussian" else f"-{options.training}"
    name = f"target{options.target:g}-{options.env}{label(options)}-sigma{options.sigma:g}{trained}-seed{options.seed}"
    folder, env = options.output or Path("runs") / name, arq_env_of(make_env(options))
    with engine_of(options) as env.evaluator.engine:
        share_sensitivities(env.evaluator, folder)

        def propose(budget: float) -> BitWidthMap:
            return least_sensitive(env, env.sensitivities, budget=env.default_budget.at(budget))

        reached = cheapest(env, propose, options.target)
        metrics = {"target": options.target} | {key: value for key, value in vars(reached).items() if key != "bit_widths"}
        export_map(folder, env, reached.bit_widths, env.default_budget.at(reached.budget).spec, metrics)
        print(layer_table(env.layers, reached.bit_widths))
        low, high = reached.interval
        print(
            f"\n{env.default_budget.at(reached.budget)} keeps {reached.ratio:.4f} of FP32's ACR on half of the reward images, and "
            f"{reached.fresh_ratio:.4f} ({low:.4f} to {high:.4f}, 95%) on parts of the other; {reached.evaluations} evaluations"
        )
        print(f"exported: {folder / 'bit_widths.json'}")
        if options.test_images:
            _certify(env, reached.bit_widths, folder, options)


def estimated_hours(env: ArqEnv, episodes: int) -> float:
    """How long so many evaluations take, as if a quantized network's forward pass took FP32's time.

    Without what comes before and after: FP32's own evaluation, sensitivities where a search needs them, confirmation.
    """
    problem, batch = env.problem, torch.zeros(PROBED, *env.problem.dataset.image_shape).to(env.problem.device)
    with torch.inference_mode():
        problem.network(batch).cpu()  # the first pass allocates
        start = time.perf_counter()
        problem.network(batch).cpu()
    return (time.perf_counter() - start) / PROBED * env.settings.forward_passes * episodes / 3600


def make_env(options: argparse.Namespace) -> gymnasium.Env:
    """The environment that a command line asks for.

    :param options: with ``env, budget, sigma, training, device, regained_bits``, and what
        :func:`arq_agents.shared_options.add_environment` has of a network of one's own
    """
    arguments = {name: getattr(options, name) for name in ("budget", "sigma", "training", "device", "regained_bits")}
    arguments |= own_arguments(options)
    arguments |= {name: getattr(options, name) for name in IF_GIVEN if getattr(options, name, None) is not None}
    try:
        return gymnasium.make(options.env, disable_env_checker=True, **arguments)
    except TypeError as error:  # an environment that takes no budget
        if "keyword argument" not in str(error):
            raise
        raise ArqError(f"{options.env} is not one of this package's: choose one of {', '.join(ENVIRONMENTS)}") from error


def engine_of(options: argparse.Namespace) -> contextlib.AbstractContextManager[Engine]:
    """The engine that a command line asks for: ``options.engine``, or by default processes, but for one GPU none beside this one.

    :raises ArqError: when the block is entered, as :func:`arq_env.support.engines.engine`
    """
    on_cpu = str(getattr(options, "device", "cpu")).startswith("cpu")
    return engine(options.engine or ("processes" if on_cpu else "serial"))


def _certify(env: ArqEnv, found: BitWidthMap, folder: Path, options: argparse.Namespace) -> None:
    """Certify FP32, uniform 4 bits (or the nearest there are) and the found map on the same test images.

    Prints the table, and writes ``certificates.json``.
    """
    bits = min(env.widths, key=lambda there: abs(there - UNIFORM_BITS))
    even, name = uniform(env.layers, bits, bits), f"W{bits}A{bits}"
    comparison = _compared(env, {name: even, "found": found}, folder, options)
    print(comparison_table(comparison))
    cost = bops_fraction(even, env.layers) / bops_fraction(found, env.layers)
    print(f"\n{verdict('found', name, *comparison.difference('found', name), cost)}")
    write_json(folder / "certificates.json", comparison.document(env.evaluator))


def _compared(env: ArqEnv, maps: dict[str, BitWidthMap], folder: Path, options: argparse.Namespace) -> Comparison:
    """FP32 and maps certified on the same test images."""
    every = -(-len(env.problem.dataset.test.images) // options.test_images)
    settings = TestSettings(every=every, n0=32, n=options.test_n)
    which = "all test images" if every == 1 else f"every {every}th test image"
    print(f"\ncertifying on {which} (the search saw none), n = {settings.n}, alpha = {settings.alpha}:")
    return compare_maps(
        env.evaluator,
        maps,
        settings,
        folder=folder / "certificates",
        map=env.evaluator.engine.map,
        progress=lambda name: partial(tqdm, desc=name, leave=False),
    )


def _finish(env: ArqEnv, best: Episode, folder: Path, options: argparse.Namespace) -> None:
    """Certify FP32, the best uniform map within the budget, the found map, and that fine-tuned; print the table and what it says;
    export the fine-tuned network, and write the report.
    """
    print("\nuniform bits within the budget, judged like the search's maps:")
    even = search("uniform", env, episodes=UNIFORM_MAPS, folder=folder / "uniform", config={"env": options.env}).bit_widths
    name = "W{}A{}".format(*even[env.free_layers[0].name])
    comparison = _compared(env, {name: even, "found": best.bit_widths}, folder, options)
    print(f"fine-tuning the found map, {options.finish} batches:")
    network = finished_network(env.evaluator, best.bit_widths, folder / "finished", options.finish)
    comparison = comparison.with_network(
        "finished",
        best.bit_widths,
        certify_on_test_images(
            env.problem,
            network,
            comparison.settings,
            map=env.evaluator.engine.map,
            progress=partial(tqdm, desc="finished", leave=False),
            log=folder / "finished" / f"certificates-every{comparison.settings.every}-n{comparison.settings.n}.tsv",
        ),
    )
    write_json(folder / "certificates.json", comparison.document(env.evaluator))
    sizes = {one: model_bytes(env.problem.network, env.layers, comparison.maps.get(one)) for one in comparison.certificates}
    print(comparison_table(comparison, sizes))
    print(f"\n{verdict('found', name, *comparison.difference('found', name))}")
    network, card = load_quantized(folder / "finished" / "network.safetensors", env.problem.network)
    for form in ("packed", "onnx"):
        try:
            print(f"{form}: {write_format(form, network, folder / 'finished', card, env.problem.dataset.image_shape)}")
        except ArqError as error:  # the result stands without it
            print(f"{form}: not written ({error})")
    try:
        report = write_report(
            [read_run(folder, read_trace(folder / "trace.jsonl"))], folder / "report", lambda _: env.problem.dataset
        )
        print(f"report: {report}")
    except ArqError as error:  # the result stands without it
        print(f"no report: {error}")
