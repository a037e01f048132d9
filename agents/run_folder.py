"""The run folder: what it says of the search it belongs to, and the map it exports."""

import dataclasses
import json
from pathlib import Path

from arq_env.bitwidths import END_BITS, BitWidthMap, save_map
from arq_env.budget import BudgetSpec
from arq_env.env import ArqEnv
from arq_env.evaluation import REWARD_VERSION, Evaluator
from arq_env.sensitivity import SENSITIVITY_VERSION
from arq_env.support.errors import ArqError, reason, shown
from arq_env.support.files import read_json, write_json, writing
from arq_env.support.provenance import provenance

from .algorithms import ALGORITHMS, hyperparameters
from .haq import CONSTANTS, haq_hyperparameters
from .levers import changes
from .methods import split_method, uses_sensitivities
from .trace import Episode, read_trace


def export_map(folder: Path, env: ArqEnv, bit_widths: BitWidthMap, budget: BudgetSpec, metrics: dict) -> None:
    """Write a map as ``bit_widths.json``, with the network, the noise and the certifier it was found for."""
    problem = env.problem
    save_map(
        folder / "bit_widths.json",
        bit_widths,
        env.layers,
        network=problem.card.get("network"),
        dataset=problem.card.get("dataset"),
        sigma=problem.sigma,
        budget=budget,
        metrics=metrics,
        provenance=provenance() | problem.origin | {"certifier": dataclasses.asdict(env.settings)},
    )


def evaluation_identity(evaluator: Evaluator) -> dict:
    """What an evaluation depends on beside the map: two that are equal in this can take each other's place.

    The data set is loaded, and the quantizer calibrated.
    """
    problem = evaluator.problem
    return {
        "sigma": problem.sigma,
        "network": problem.digest,
        "data": problem.data_digest,
        "device": str(problem.device),
        "certifier": dataclasses.asdict(evaluator.settings),
        "reward_version": REWARD_VERSION,
        "rounding": evaluator.rounding,
        "versions": provenance()["versions"],
    }


def open_folder(folder: Path, algorithm: str, env: ArqEnv, episodes: int, seed: int, config: dict) -> list[Episode]:
    """Write ``config.json``, or check that it is the one already there; return the episodes of the trace.

    :raises ArqError: when no episode is asked for, fewer than there are, or the folder holds something else
    """
    if episodes < 1:
        raise ArqError(f"{episodes} episodes were asked for: give at least 1")
    settings = {}
    name, levers = split_method(algorithm)
    if name in ALGORITHMS:
        settings = hyperparameters(name, env.horizon, **changes(levers))
        settings["action_noise"] = vars(settings["action_noise"]) if "action_noise" in settings else None
    elif name == "arq":
        settings = haq_hyperparameters(2 * env.horizon) | CONSTANTS
    config = config | {
        "algorithm": algorithm,
        "seed": seed,
        "budget": env.default_budget.spec,
        "fix": env.problem.fix,
        "bits": env.problem.bits,
        "hyperparameters": settings,
        **evaluation_identity(env.evaluator),
    }
    if uses_sensitivities(algorithm):
        config["sensitivity_version"] = SENSITIVITY_VERSION
    if "exchange" in levers:
        config["episodes"] = episodes  # they decide where it begins, so such a search cannot be made longer
    config = json.loads(json.dumps(config))  # tuples become lists, as they come back from the file
    path = folder / "config.json"
    if not path.exists():
        with writing(folder):
            there = folder.exists() and any(not entry.name.endswith(".part") for entry in folder.iterdir())
        if there:
            raise ArqError(f"{folder} is not empty and holds no config.json of a search: choose another --output")
        made_from = env.problem.origin | {"images": env.problem.dataset.counts}
        write_json(path, config | {"provenance": provenance() | made_from})
        return []
    found = read_config(path)
    found.pop("provenance", None)
    if found.get("end_bits") == END_BITS:  # what folders say that were made before there was a choice
        del found["end_bits"]
        found |= {"fix": None, "bits": None}
    differing = sorted(key for key in config.keys() | found.keys() if config.get(key) != found.get(key))
    if differing:
        differing = [_difference(key, found.get(key), config.get(key)) for key in differing]
        raise ArqError(f"{folder} holds another search (it differs in {', '.join(differing)}): choose another --output")
    known = read_trace(folder / "trace.jsonl")
    if episodes < len(known):
        raise ArqError(f"{folder} already has {len(known)} episodes: ask for at least as many, or choose another --output")
    return known


def _difference(key: str, there: object, here: object) -> str:
    """A name, and for a group of settings which of them, and their values."""
    if isinstance(there, dict) and isinstance(here, dict):
        names = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
        return f"{key}: " + ", ".join(f"{name} {shown(there.get(name))}, here {shown(here.get(name))}" for name in names)
    return key


def read_config(path: Path) -> dict:
    """What a run folder's ``config.json`` says.

    :raises ArqError: when it cannot be read
    """
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise ArqError(f"{path} cannot be read ({reason(error)}): choose another --output") from error
