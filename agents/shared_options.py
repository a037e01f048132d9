"""Options that several scripts have, by group, and the types of their values.

As in :mod:`arq_agents.command_line`, nothing is imported here, before a call, but what Python itself brings.
"""

import argparse
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .command_line import OneLineParser, parser


def whole(least: int, most: int = 2**32 - 1) -> Callable[[str], int]:
    """The type of an option that takes a whole number from ``least`` to ``most``."""

    def convert(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"{value} is out of range: give a whole number from {least}" + (f" to {most}" if most < 2**31 else "")
            )
        return value

    convert.__name__ = "whole number"
    return convert


def limit(text: str) -> tuple[str, Any]:
    """A kind of budget and its limit, of ``0.01``, ``bytes=120000`` or ``latency=3.5:milliseconds.json``."""
    kind, _, value = text.rpartition("=") if not text.startswith("latency=") else text.partition("=")
    if kind == "latency":
        milliseconds, _, table = value.partition(":")
        return kind, {"milliseconds": float(milliseconds), "table": table}
    return kind or "bops", int(value) if value.isdecimal() else float(value)


class _Budget(argparse.Action):
    """Makes limits a budget as :func:`arq_env.budget.make_budget` takes it."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: Any = None) -> None:
        limits = dict(values)
        if len(limits) < len(values):
            raise argparse.ArgumentError(self, "gives two limits of one kind: give one")
        setattr(namespace, self.dest, limits["bops"] if [*limits] == ["bops"] else limits)


def budget_name(budget: Any) -> str:
    """A budget of a command line as a part of a folder's name: ``0.01`` or ``bops0.01-bytes120000``."""
    if not isinstance(budget, dict):
        return f"{budget:g}"
    values = {kind: limit["milliseconds"] if isinstance(limit, dict) else limit for kind, limit in budget.items()}
    return "-".join(f"{kind}{values[kind]:.12g}" for kind in sorted(values))


def add_test_settings(parser: argparse.ArgumentParser) -> None:
    """The options that make up a certificate on test images, named as in :class:`arq_env.support.settings.TestSettings`."""
    from arq_env.support.settings import TestSettings

    for name, kind, what in (
        ("every", whole(1), "take every so many-th test image"),
        ("offset", whole(0), "index of the first of them"),
        ("n0", whole(1), "noise samples that select a class"),
        ("n", whole(1), "noise samples that count it"),
        ("alpha", float, "error probability of each certificate"),
        ("seed", whole(0), "of the certification noise"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=getattr(TestSettings, name), help=what)


def add_protocol(parser: argparse.ArgumentParser) -> None:
    """The option ``--protocol``, for :func:`by_protocol`."""
    parser.add_argument(
        "--protocol",
        choices=("screen", "report"),
        default="screen",
        help="report: on every second test image, whatever --every says, into files of their own",
    )


def by_protocol(options: argparse.Namespace) -> argparse.Namespace:
    """The options, ``every`` as the protocol has it, and ``ending``, which the names of its files end with."""
    from arq_env.support.settings import REPORT_EVERY

    options.ending = "-report" if options.protocol == "report" else ""
    if options.ending:
        options.every = REPORT_EVERY
    return options


class _Own(argparse.Action):
    """``--network``: the id becomes that of networks of one's own, unless another is given."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, option_string: str | None = None
    ) -> None:
        from arq_env.registration import CUSTOM, DEFAULT

        namespace.network = value
        if getattr(namespace, "env", None) in (None, DEFAULT):
            namespace.env = CUSTOM


def _key_and_value(text: str) -> tuple[str, object]:
    """``width=0.5`` as a name and a value: JSON where it is, else text."""
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise argparse.ArgumentTypeError(f"{text!r} is no argument: give NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


_numbers.__name__ = "list of numbers"

#: Options of :func:`add_problem`, which are arguments of ``gym.make`` where they are given.
OWN = ("network", "checkpoint", "data", "normalize", "keep", "network_arguments", "image_size", "flip", "reward_images")
#: Options of :func:`add_environment`, likewise.
IF_GIVEN = ("images", "calibration_images", "fix", "bits", "weights")


def add_problem(parser: argparse.ArgumentParser, *, trained: bool = True) -> None:
    """The options that name a network of one's own and its data, see :func:`arq_env.problem.load_problem`.

    :param trained: whether it has weights
    """
    own = parser.add_argument_group("a network and data of your own")
    own.add_argument("--network", action=_Own, metavar="MODULE:FUNCTION", help="returns a torch module; looked for here, too")
    own.add_argument(
        "--data",
        "--dataset",
        metavar="DATA",
        help="folder with train/ and test/ or val/, .npz file, module:function that returns a Dataset, cifar10, signs or imagenet",
    )
    own.add_argument(
        "--network-arguments", nargs="+", type=_key_and_value, metavar="NAME=VALUE", help="keyword arguments for the function"
    )
    own.add_argument("--image-size", type=whole(1), metavar="PIXELS", help="scale and cut a folder's images to this edge")
    own.add_argument("--flip", action=argparse.BooleanOptionalAction, help="whether a mirrored image keeps its class")
    own.add_argument(
        "--reward-images", type=whole(1), metavar="N", help="training images kept out for the reward (default: a tenth)"
    )
    if not trained:
        return
    own.add_argument("--checkpoint", metavar="FILE", help="the network's weights: .safetensors, or of torch.save")
    own.add_argument(
        "--normalize",
        nargs=2,
        type=_numbers,
        metavar=("MEAN", "STD"),
        help="of each channel, such as 0.5,0.4,0.4 0.2,0.2,0.3; put first",
    )
    own.add_argument(
        "--keep", nargs="+", metavar="NAME", help="modules and parameters that may stay at full precision, * for any part"
    )


def _fixed(text: str) -> tuple[str, str]:
    """``head.*=4/8`` as a name and bits, which :func:`arq_env.bitwidths.restrict` checks."""
    name, equals, bits = text.rpartition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} fixes nothing: give NAME=WEIGHT/ACTIVATION, such as first=8/8")
    return name, bits


class _Fix(argparse.Action):
    """Makes what is fixed a dictionary; two bits for one name are a mistake."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: Any = None) -> None:
        fixed = dict(values)
        if len(fixed) < len(values):
            raise argparse.ArgumentError(self, "names a layer twice: name it once")
        setattr(namespace, self.dest, fixed)


def add_fix(parser: argparse._ActionsContainer) -> None:
    """The option ``--fix``, as :func:`arq_env.bitwidths.restrict` takes it."""
    parser.add_argument(
        "--fix",
        nargs="*",
        type=_fixed,
        action=_Fix,
        metavar="NAME=W/A",
        help="layers (first, last, or by name, * for any part) whose weight and activation bits are not chosen, and these "
        "(default: first=8/8 last=8/8; alone: none)",
    )


class _Weights(argparse.Action):
    """Maps on weights that stand them are judged as they are."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, option: Any = None) -> None:
        namespace.weights = value
        if namespace.regained_bits == parser.get_default("regained_bits"):
            namespace.regained_bits = 0


def add_at_once(parser: argparse._ActionsContainer) -> None:
    """The option ``--at-once``, as :func:`arq_env.networks.training.train` takes it."""
    parser.add_argument(
        "--at-once",
        type=whole(1),
        metavar="N",
        help="images of a step that go through the network together, for memory's sake (default: all, or what keeps to 4 GiB)",
    )


def add_precision(parser: argparse._ActionsContainer) -> None:
    """The option ``--precision`` of a training that may choose it by the machine."""
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="arithmetic of the training passes; auto: bf16 where the processor has it",
    )


def own_arguments(options: argparse.Namespace) -> dict:
    """What was given of :func:`add_problem`'s options, as keyword arguments of :func:`arq_env.problem.load_problem`."""
    given = {name: getattr(options, name) for name in OWN if getattr(options, name, None) is not None}
    if isinstance(given.get("network_arguments"), list):
        given["network_arguments"] = dict(given["network_arguments"])
    return given


def label(options: argparse.Namespace) -> str:
    """A network of one's own, its data and what is not chosen, as a part of a folder's name; nothing for what an id says."""
    given = own_arguments(options)
    parts = [os.path.basename(os.path.normpath(given[name].rpartition(":")[2])) for name in ("network", "data") if name in given]
    if (fix := getattr(options, "fix", None)) is not None:
        parts.append("fix-" + ("-".join(f"{name}-{bits}" for name, bits in fix.items())[:80] or "none"))
    if (bits := getattr(options, "bits", None)) is not None:
        parts.append(f"bits-{'-'.join(map(str, bits))}")
    if (weights := getattr(options, "weights", None)) is not None:
        parts.append(f"weights-{os.path.basename(os.path.dirname(os.path.abspath(weights)))}")
    return "".join(f"-{re.sub('[^a-zA-Z0-9_.-]+', '-', part)}" for part in parts)


def add_environment(
    parser: OneLineParser,
    *,
    budget: float | None = None,
    training: str = "gaussian",
    regained_bits: int = 0,
    weights: bool = True,
) -> None:
    """The options that :func:`arq_agents.main.make_env` takes.

    :param budget: the default; without it there is no such option
    :param training, regained_bits: defaults
    :param weights: whether there is an option of that name
    """
    from arq_env.registration import DEFAULT
    from arq_env.support.settings import MAX_BITS, MIN_BITS

    group = parser.add_argument_group("the environment")
    add_problem(parser)
    group.add_argument("--env", default=DEFAULT, help="its id; ARQ-ResNet20-Signs-v0 downloads nothing")
    for name, what in (
        ("images", "reward images of an evaluation"),
        ("calibration-images", "training images that ranges come from"),
    ):
        group.add_argument(f"--{name}", type=whole(1), metavar="N", help=f"{what} (default: the id's, or what there is)")
    if budget is not None:
        group.add_argument(
            "--budget",
            type=limit,
            nargs="+",
            action=_Budget,
            default=budget,
            metavar="LIMIT",
            help="bit operations, as a fraction of FP32's; or several of bops=0.01 bytes=120000 latency=3.5:milliseconds.json",
        )
    add_fix(group)
    group.add_argument(
        "--bits", nargs="+", type=int, metavar="BITS", help="bit-widths that there are, such as 2 4 8 (default: 2 to 8)"
    )
    if weights:
        group.add_argument(
            "--weights",
            action=_Weights,
            metavar="FILE",
            help="weights that stand any map, which train_any_bits.py made; --regained-bits is then 0",
        )
    parser.sigma_of_own = True
    group.add_argument(
        "--sigma",
        type=float,
        default=0.5,
        help="smoothing noise, in units of pixels in [0, 1]; a checkpoint trained under it must be there",
    )
    group.add_argument("--training", default=training, help="how that checkpoint was trained: gaussian or consistency")
    parser.set_defaults(regained_bits=regained_bits)
    if weights:
        group.add_argument(
            "--regained-bits",
            type=whole(0, MAX_BITS - MIN_BITS),
            default=regained_bits,
            help="judge maps with weights so many bits finer: 1 for a map to fine-tune (finalize.py), 0 for one to use as it is",
        )
    group.add_argument("--device", default="cpu", help="of the network that is certified, cpu or cuda; an agent stays on the CPU")


def add_finishing(parser: argparse.ArgumentParser) -> None:
    """The options of the short recipe and of the certificates in :mod:`arq_agents.finishing`."""
    from arq_env.support.settings import CONFIRMING_STEPS

    group = parser.add_argument_group("fine-tuning and certificates")
    group.add_argument("--steps", type=whole(1), default=CONFIRMING_STEPS, help="batches of fine-tuning for each map")
    group.add_argument("--every", type=whole(1), default=10, help="certify it on every so many-th test image")
    group.add_argument("--n", type=whole(10), default=200, help="noise samples that count a class there")


def add_engine(parser: argparse.ArgumentParser, what: str) -> None:
    """The options ``--engine`` and ``--processes``: both are ``options.engine``, for :func:`arq_agents.main.engine_of`.

    :param what: is done several at a time
    """
    group = parser.add_argument_group("the machine")
    group.add_argument(
        "--engine",
        metavar="ENGINE",
        help=f"what runs {what}, each on one thread: serial, processes[:NUMBER], dask[:ADDRESS] or ray[:ADDRESS] "
        "(default: processes, as many as torch has threads; on a GPU serial)",
    )
    group.add_argument(
        "--processes",
        dest="engine",
        type=_processes,
        default=argparse.SUPPRESS,
        metavar="NUMBER",
        help="--engine processes:NUMBER; auto for as many as torch has threads",
    )


def _processes(text: str) -> str:
    """The engine that a number of processes, or ``auto``, stands for."""
    return "processes" if text == "auto" else f"processes:{whole(1, 4_096)(text)}"


_processes.__name__ = "number or auto"


def search_options(algorithm: str) -> argparse.Namespace:
    """Parse the command line of a script that runs one search; ``algorithm`` is then the search with what ``--add`` names.

    :param algorithm: as for :func:`arq_agents.search.search`
    """
    from arq_env.registration import EPISODES as OF_ENVIRONMENT
    from arq_env.support.settings import FIRST_STEPS

    from .methods import EPISODES, LEARNERS, LEVERS, split_method

    name = f"{algorithm.upper()} (stable-baselines3)" if algorithm in LEARNERS else f"the {algorithm.replace('_', ' ')}"
    own = parser(f"Search a bit-width map with {name}. Stop it at any time: the same command goes on.")
    add_environment(own, budget=1 / 64)
    few = ", ".join(f"or {episodes} on {env}" for env, episodes in OF_ENVIRONMENT.items())
    group = own.add_argument_group("the search")
    group.add_argument("--episodes", type=whole(1), help=f"maps to try (default: {EPISODES}, {few})")
    group.add_argument("--seed", type=whole(0), default=0, help="of the search")
    group.add_argument(
        "--add", nargs="+", choices=LEVERS, default=[], metavar="LEVER", help=f"what to add to the search: {', '.join(LEVERS)}"
    )
    group.add_argument("--output", type=Path, help="run folder (default: runs/ and a name made of the settings)")
    group = own.add_argument_group("after the search")
    group.add_argument(
        "--test-images",
        type=whole(0),
        default=100,
        help="at most so many test images, evenly spread, that FP32, uniform 4 bits and the found map are certified on; 0 for none",
    )
    group.add_argument("--test-n", type=whole(10), default=100, help="noise samples counted for each of them")
    group.add_argument(
        "--finish",
        type=whole(1),
        nargs="?",
        const=FIRST_STEPS,
        metavar="BATCHES",
        help=f"then fine-tune the found map so briefly (alone: {FIRST_STEPS} batches; finalize.py makes the network to ship), "
        "certify it beside FP32 and the best uniform bits within the budget, export it, and write a report",
    )
    if algorithm == "integer_program":
        group.add_argument(
            "--target",
            type=float,
            metavar="SHARE",
            help="in place of --budget: the cheapest map that keeps this share of FP32's ACR on held-out images, such as 0.99",
        )
    add_engine(own, "parts of evaluations and certificates")
    options = own.parse_args()
    if getattr(options, "target", None) is not None and (options.finish or options.budget != own.get_default("budget")):
        own.error("--target finds the budget, and does not fine-tune: leave --budget and --finish out, and go on with finalize.py")
    if options.finish and not options.test_images:
        own.error("--finish certifies on test images: give --test-images at least 1")
    if options.episodes is None:
        options.episodes = OF_ENVIRONMENT.get(options.env, EPISODES)
    options.algorithm = "+".join([algorithm, *options.add])
    split_method(options.algorithm)  # mistakes first
    return options
