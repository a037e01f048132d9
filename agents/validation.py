"""Whether what a folder records holds on this machine: rewards, bit operations, bytes and certificates, measured again or computed.

A folder is that of a search (:func:`check_search`), of ``finalize.py`` (:func:`check_finished`) or of ``certify_checkpoints.py``
(:func:`check_references`). Seconds are not checked, and of what takes long a sample is.
That a search's decisions follow from its seed shows when it is run again in its folder without ``bit_widths.json``: it takes all of
them anew and compares.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from arq_env.bitwidths import BitWidthMap, bops_fraction, is_choice, load_map, uniform
from arq_env.budget import make_budget
from arq_env.certification import Certificates, Cohen, certify, clopper_pearson_lower, smoothing_radius
from arq_env.comparison import FP32, Comparison, TestSettings, summarize, table_path
from arq_env.env import REWARD_SCALE
from arq_env.evaluation import REWARD_VERSION, CertifierSettings, Evaluator
from arq_env.networks.checkpoints import shipped
from arq_env.problem import Problem, load_mapped, load_problem
from arq_env.quantization import integer_network, load_quantized, model_bytes
from arq_env.quantization.integer import integer_kernels
from arq_env.support.engines import Engine
from arq_env.support.errors import ArqError, reason
from arq_env.support.files import read_json

from .equal_cost import is_deterministic
from .main import UNIFORM_BITS
from .run_folder import evaluation_identity, read_config
from .search import judge_finished
from .trace import Episode, read_trace

#: Two numbers that were summed in another order may differ by this share.
ROUNDING = 1e-12
#: And two ACRs after fine-tuning by this one: its arithmetic is not the same on every processor.
RETRAINED = 0.02
#: What the reward says of a map.
EVALUATION = ("acr", "clean_accuracy", "certified_accuracy")


@dataclass(frozen=True)
class Sample:
    """How much is measured again.

    :param episodes: of a search, beside the exported one; 0 for all
    :param images: of each table of certificates; 0 for all, and then tables that are not there are made
    :param seed: of the choice
    """

    episodes: int = 3
    images: int = 4
    seed: int = 0

    def of(self, there: int, wanted: int) -> list[int]:
        """Indices below ``there``, in order."""
        chosen = np.random.default_rng(self.seed).permutation(there)
        return sorted(chosen[: wanted or there].tolist())


@dataclass(frozen=True)
class Check:
    """One thing that a folder says.

    :param holds: None where it could not be checked
    :param told: in what it does not hold, or why it could not be checked
    """

    what: str
    holds: bool | None
    told: str = ""


def check_folder(folder: Path, sample: Sample, engine: Engine) -> Iterator[Check]:
    """Check whatever is in a folder.

    :raises ArqError: when that is nothing to check, cannot be read, or belongs to another version of the reward
    """
    folder = Path(folder)
    if (folder / "config.json").exists():
        return check_search(folder, sample, engine)
    if any(folder.glob("summary-n*.json")):
        return check_finished(folder, sample, engine)
    if any(folder.glob("*-n*.tsv")):
        return check_references(folder, sample, engine)
    raise ArqError(f"{folder} holds nothing to check: give the folder of a search, of finalize.py or of certify_checkpoints.py")


def check_search(folder: Path, sample: Sample, engine: Engine) -> Iterator[Check]:
    """Every episode's arithmetic; the exported map and some episodes evaluated again; the certificates beside them."""
    config = read_config(folder / "config.json")
    if (version := config.get("reward_version")) != REWARD_VERSION:
        raise ArqError(
            f"{folder} was made under reward version {version or 1}, and this is version {REWARD_VERSION}: check it with the code "
            "of its time"
        )
    problem, exported, document, _ = load_mapped(folder)
    try:
        evaluator = Evaluator(problem, CertifierSettings(**config["certifier"]))
    except (KeyError, TypeError) as error:
        raise ArqError(f"{folder}/config.json has no certifier ({reason(error)}): restore the file") from error
    evaluator.engine = engine
    choice = {name: getattr(problem, name) for name in ("fix", "bits") if name in config}  # older folders have none
    here = json.loads(json.dumps(evaluation_identity(evaluator) | choice))
    made_with = (config.pop("versions", None), here.pop("versions"))
    yield _compared("what evaluations depend on", config, here)
    if made_with[0] != made_with[1]:
        yield Check("versions", None, f"made with {made_with[0]}, checked with {made_with[1]}")

    trace = read_trace(folder / "trace.jsonl")
    yield _all("the trace", _faults(trace, config, evaluator))
    metrics, chosen = document.get("metrics", {}), sample.of(len(trace), sample.episodes)
    number = metrics.get("episode")
    if not (type(number) is int and 1 <= number <= len(trace)):
        yield Check("the exported map", False, f"episode {number!r} is none of the {len(trace)} in the trace")
        return
    episodes = [trace[i] for i in sorted({number - 1, *chosen})]
    found = evaluator.evaluate_many([episode.bit_widths for episode in episodes])
    yield _all(
        f"reward of {len(episodes)} episodes",
        (
            fault
            for episode, evaluation in zip(episodes, found, strict=True)
            for fault in _differences(_told(episode, EVALUATION), _told(evaluation, EVALUATION), f"episode {episode.episode}: ")
        ),
    )
    yield _exported(exported, document, trace[number - 1], len(trace), config, evaluator)
    if (folder / "certificates.json").exists():
        yield from _check_comparison(folder, exported, config, evaluator, sample)


def _faults(trace: list[Episode], config: dict, evaluator: Evaluator) -> Iterator[str]:
    """What is wrong with episodes by themselves and beside each other."""
    layers, reference = evaluator.problem.layers, evaluator.reference.acr
    known: dict[tuple, Episode] = {}
    try:  # an agent for every budget has one an episode, which no trace keeps
        budget = None if "budgets" in config else make_budget(config["budget"], evaluator.problem)
    except KeyError as error:
        raise ArqError(f"config.json has no {error}: restore the file") from error
    for number, episode in enumerate(trace, start=1):
        first = known.setdefault(tuple(episode.bit_widths.items()), episode)
        computed = _told(first, EVALUATION) | {
            "episode": number,
            "evaluations": len(known),
            "bops_fraction": bops_fraction(episode.bit_widths, layers),
            "reference_acr": reference,
            "reward": REWARD_SCALE * (episode.acr / reference - 1),
        }
        yield from _differences(_told(episode, computed), computed, f"episode {number}: ")
        if budget is not None and not budget.within(episode.bit_widths):
            yield f"episode {number}: its map is over the budget of {budget}"
        if {*episode.bit_widths} == {layer.name for layer in layers} and not is_choice(episode.bit_widths, layers):
            yield f"episode {number}: its map has bits that are not there, or others than are fixed"


def _exported(
    bit_widths: BitWidthMap, document: dict, episode: Episode, episodes: int, config: dict, evaluator: Evaluator
) -> Check:
    """The map's file: what it repeats, what its cost is, and what speaks for it on other draws."""
    metrics, judge = document["metrics"], evaluator.second_opinion()
    steps, acr = metrics.get("confirmed_steps"), judge.evaluate(bit_widths).acr
    computed = {
        "sigma": evaluator.problem.sigma,
        "budget": config.get("budget"),
        "bops_fraction": bops_fraction(bit_widths, evaluator.problem.layers),
        "certifier": asdict(evaluator.settings),
        "checkpoint": evaluator.problem.card.get("digest"),
        "same map as in the trace": True,
        **_told(episode, ("reward", *EVALUATION, "reference_acr")),
        "confirmed_reference_acr": judge.reference.acr,
        "fresh_reward": REWARD_SCALE * (acr / judge.reference.acr - 1),
        **{f"confirmed_{name}": getattr(judge.settings, name) for name in ("images", "n", "part")},
    }
    stated = {"same map as in the trace": bit_widths == episode.bit_widths} | document | document.get("provenance", {}) | metrics
    faults = list(_differences({name: stated.get(name) for name in computed}, computed))
    if type(steps) is int and steps > 0:
        acr = judge_finished(judge, evaluator, steps, bit_widths).acr
    near = RETRAINED if steps else ROUNDING
    faults += _differences(metrics.get("confirmed_acr"), acr, "confirmed_acr", near=near)
    if steps and not evaluator.settings.regained_bits:
        faults.append(f"confirmed_steps is {steps!r} and should be 0 without regained_bits")
    asked = metrics.get("episodes")
    if asked != episodes and not (is_deterministic(config["algorithm"]) and type(asked) is int and asked > episodes):
        faults.append(f"episodes is {asked!r} and should be {episodes}")  # those may end early
    return _all("the exported map", faults)


def _check_comparison(folder: Path, exported: BitWidthMap, config: dict, evaluator: Evaluator, sample: Sample) -> Iterator[Check]:
    """``certificates.json`` of a search, from the tables that it was made of."""
    path = folder / "certificates.json"
    stated, engine = _read(path), evaluator.engine
    try:
        settings, layers = TestSettings(**stated["settings"]), evaluator.problem.layers
        maps = {
            f"W{UNIFORM_BITS}A{UNIFORM_BITS}": uniform(layers, UNIFORM_BITS, UNIFORM_BITS),
            "found": exported,
        }
    except (KeyError, TypeError) as error:
        raise ArqError(f"{path} is not what a search leaves ({reason(error)}): restore the file") from error
    shown = {name: {layer: list(bits) for layer, bits in bit_widths.items()} for name, bit_widths in maps.items()}
    yield _compared("maps of certificates.json", stated, {"maps": shown})
    tables = {}
    for name, bit_widths in {FP32: None, **maps}.items():
        network = evaluator.problem.network if bit_widths is None else evaluator.quantizer.quantize(bit_widths)
        table = table_path(folder / "certificates", name, bit_widths, evaluator, settings)
        if table.exists():
            tables[name] = Certificates.from_tsv(table)
            yield _check_table(f"certificates of {name}", tables[name], network, evaluator.problem, settings, sample, engine)
        elif not sample.images:
            tables[name] = _certified(network, evaluator.problem, settings, None, True, engine)
        else:
            yield Check(f"certificates of {name}", None, f"{table} is not there; --images 0 certifies all of its images again")
    if len(tables) == len(maps) + 1:
        computed = Comparison(settings, layers, maps, tables).document(evaluator)
        del computed["provenance"]
        yield _compared("certificates.json", stated, json.loads(json.dumps(computed)))


def check_finished(folder: Path, sample: Sample, engine: Engine) -> Iterator[Check]:
    """What ``finalize.py`` left: costs, tables of certificates, and the network where it is there."""
    for path in sorted(folder.glob("summary-n*.json")):
        stated = _read(path)
        try:
            settings, name, stem = TestSettings(**stated["settings"]), stated["map"], path.stem.removeprefix("summary")
            if stated["training"] is None and name == FP32:
                raise ArqError(
                    f"{path} is of an FP32 network of somebody's own, whose weights no folder holds: give its map's folder"
                )
            if stated["training"] is None:  # a network of somebody's own
                problem = load_mapped(folder / "bit_widths.json")[0]
            else:
                problem = load_problem(stated["network"], stated["dataset"], sigma=stated["sigma"], training=stated["training"])
        except (KeyError, TypeError) as error:
            raise ArqError(f"{path} is not what finalize.py leaves ({reason(error)}): restore the file") from error
        bit_widths = None if name == FP32 else load_map(folder / "bit_widths.json", problem.layers)[0]
        table = Certificates.from_tsv(folder / f"certificates{stem}.tsv")
        computed = {
            "checkpoint": problem.card["digest"],
            "bops_fraction": 1.0 if bit_widths is None else bops_fraction(bit_widths, problem.layers),
            "model_bytes": model_bytes(problem.network, problem.layers, bit_widths),
            "images": len(table),
            **summarize(table),
        }
        network, weights = None, folder / "network.safetensors"
        if weights.exists() and bit_widths is not None:
            network, card = load_quantized(weights)
            computed |= {"digest": card["digest"], "bits of network.safetensors": [list(bits) for bits in bit_widths.values()]}
            bits = [[layer["weight_bits"], layer["activation_bits"]] for layer in card["layers"]]
            stated |= {"bits of network.safetensors": bits}
            if stated.get("integer_kernels") and integer_kernels():  # elsewhere the same function without them
                network = integer_network(network)
        yield _compared(path.name, stated, computed)
        yield _check_table(f"certificates{stem}.tsv", table, network, problem, settings, sample, engine)


def check_references(folder: Path, sample: Sample, engine: Engine) -> Iterator[Check]:
    """What ``certify_checkpoints.py`` left: the shipped networks' figures and tables."""
    there = {checkpoint.name: checkpoint for checkpoint in shipped()}
    for path in sorted(folder.glob("*-n*.tsv")):
        stated = _read(path.with_suffix(".json"))
        try:
            checkpoint, settings = there[stated["checkpoint"]], TestSettings(**stated["settings"])
        except (KeyError, TypeError) as error:
            raise ArqError(f"{path} is not what certify_checkpoints.py leaves ({reason(error)}): restore the file") from error
        problem = load_problem(checkpoint.network, checkpoint.dataset, sigma=checkpoint.sigma, training=checkpoint.training)
        table = Certificates.from_tsv(path)
        figures = {"sigma": problem.sigma, "images": len(table), **summarize(table)}
        yield _compared(path.with_suffix(".json").name, stated, {"digest": problem.card["digest"], **figures})
        yield _check_table(path.name, table, problem.network, problem, settings, sample, engine, skip_wrong=False)


def _check_table(
    what: str,
    table: Certificates,
    network: nn.Module | None,
    problem: Problem,
    settings: TestSettings,
    sample: Sample,
    engine: Engine,
    *,
    skip_wrong: bool = True,
) -> Check:
    """A table's labels, radii that counts can give, and some of its images certified again where there is a network."""
    _, labels = problem.test_images(settings.every, settings.offset)
    if len(table) != len(labels) or (table.label != labels).any():
        return Check(what, False, f"its labels are not those of the {len(labels)} test images")
    if not np.isin(table.n, (0, settings.n)).all():
        return Check(what, False, f"an image was given another number of samples than {settings.n}")
    bounds = clopper_pearson_lower(np.arange(settings.n + 1), settings.n, settings.alpha)
    possible = np.append(0.0, smoothing_radius(problem.sigma, bounds))
    strange = np.flatnonzero(np.abs(table.radius[:, None] - possible).min(1) > ROUNDING)
    if len(strange):
        return Check(what, False, f"image {strange[0]}: no count of {settings.n} gives the radius {table.radius[strange[0]]}")
    if network is None:
        return Check(what, True, "radii that counts can give; without network.safetensors no image was certified again")
    rows = sample.of(len(table), sample.images)
    again = _certified(network, problem, settings, rows, skip_wrong, engine)
    faults = (
        fault
        for row, *found in zip(rows, again.prediction.tolist(), again.radius.tolist(), again.n.tolist(), strict=True)
        for fault in _differences(
            {"predict": int(table.prediction[row]), "radius": float(table.radius[row]), "n": int(table.n[row])},
            dict(zip(("predict", "radius", "n"), found, strict=True)),
            f"image {row}: ",
        )
    )
    return _all(f"{what}, {len(rows)} images again", faults)


def _certified(
    network: nn.Module, problem: Problem, settings: TestSettings, rows: list[int] | None, skip_wrong: bool, engine: Engine
) -> Certificates:
    images, labels = problem.test_images(settings.every, settings.offset)
    chosen = np.arange(len(labels)) if rows is None else np.array(rows)
    asked = {name: getattr(settings, name) for name in ("n0", "n", "alpha", "seed")} | {"method": Cohen(skip_wrong)}
    return certify(network, images[chosen], labels[chosen], sigma=problem.sigma, **asked, map=engine.map)


def _read(path: Path) -> dict:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise ArqError(f"{path} cannot be read ({reason(error)}): restore the file") from error


def _told(of: Any, names: Iterable[str]) -> dict:
    return {name: getattr(of, name) for name in names}


def _compared(what: str, stated: dict, computed: dict) -> Check:
    """Whether a document says what was computed; it may say more."""
    return _all(what, _differences({name: stated.get(name) for name in computed}, computed))


def _all(what: str, faults: Iterable[str]) -> Check:
    faults = list(faults)
    more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
    return Check(what, not faults, "; ".join(faults[:3]) + more)


def _differences(stated: Any, computed: Any, name: str = "", *, near: float = ROUNDING) -> Iterator[str]:
    """Where two documents differ, entry by entry."""
    if isinstance(stated, dict) and isinstance(computed, dict):
        for key in stated | computed:
            yield from _differences(stated.get(key), computed.get(key), f"{name} {key}".strip(), near=near)
    elif isinstance(stated, float) and isinstance(computed, int | float) and not isinstance(computed, bool):
        if not math.isclose(stated, computed, rel_tol=near):
            yield f"{name} is {stated} and should be {computed}"
    elif stated != computed or isinstance(stated, bool) != isinstance(computed, bool):
        yield f"{name} is {stated!r} and should be {computed!r}"
