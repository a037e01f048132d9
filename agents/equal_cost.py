"""Several searches on one problem at equal cost: how to run them so that they share evaluations, and how to read them."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import gymnasium
import numpy as np
from scipy import stats

from arq_env.env import arq_env_of
from arq_env.evaluation import Evaluator
from arq_env.sensitivity import SENSITIVITY_VERSION, forward_passes
from arq_env.support.files import sha256, write_json

from .haq import cached_samples
from .methods import split_method, uses_sensitivities
from .run_folder import evaluation_identity, read_config
from .search import search
from .trace import Episode, read_trace


def is_deterministic(method: str) -> bool:
    """Whether a search comes out the same with every seed."""
    return split_method(method)[0] in ("uniform", "greedy", "integer_program")


def run_search(method: str, env: gymnasium.Env, *, seed: int, episodes: int, folder: Path, store: Path, config: dict) -> None:
    """Run or resume one search as :func:`arq_agents.search.search` does, but for free where a map was evaluated before.

    That is, alike and in any run folder two levels below ``store``.

    :param episodes: evaluations, of which those count that the search needs before its first map (:func:`setup_cost`)
    :param config: as for :func:`arq_agents.search.search`
    :raises ArqError: when these are all, and as :func:`arq_agents.search.search` does
    """
    evaluator = arq_env_of(env).evaluator
    recall(evaluator, store)
    if uses_sensitivities(method):
        share_sensitivities(evaluator, store)
    episodes -= math.ceil(setup_cost(method, env))
    # no confirming steps: fine-tuning would cost what no evaluation counts
    search(method, env, episodes=episodes, folder=folder, seed=seed, confirming_steps=0, progress=False, config=config)


def recall(evaluator: Evaluator, store: Path) -> None:
    """Take over the evaluations from all run folders two levels below a folder that were made alike."""
    wanted = evaluation_identity(evaluator)
    for path in sorted(store.glob("*/*/config.json")):
        config = read_config(path)
        if {key: config.get(key) for key in wanted} == wanted:
            for episode in read_trace(path.parent / "trace.jsonl"):
                evaluator.remember(episode.bit_widths, episode.evaluation)


def share_sensitivities(evaluator: Evaluator, store: Path) -> None:
    """Read the sensitivities from ``store``, or find them and leave them there."""
    known = evaluation_identity(evaluator) | {"sensitivities": SENSITIVITY_VERSION}
    if (fix := evaluator.problem.fix) is not None:
        known |= {"fix": dict(fix)}  # other layers have sensitivities
    identity = sha256(json.dumps(known, sort_keys=True).encode())
    path = store / f"sensitivities-{identity[:12]}.json"
    if path.exists():
        rows = json.loads(path.read_text())
        evaluator.remember_sensitivities({(row["layer"], row["kind"]): row["divergence"] for row in rows})
    else:
        rows = [{"layer": layer, "kind": kind, "divergence": d} for (layer, kind), d in evaluator.sensitivities.items()]
        write_json(path, rows)


def setup_cost(method: str, env: gymnasium.Env) -> float:
    """What a search measures before its first map, in evaluations by forward passes."""
    evaluator, (name, levers) = arq_env_of(env).evaluator, split_method(method)
    passes = forward_passes() if uses_sensitivities(method) else 0
    if name == "arq" or "incremental" in levers:
        passes += cached_samples(evaluator.settings)
    return passes / evaluator.settings.forward_passes


def best_so_far(episodes: list[Episode], evaluations: int, setup: float = 0.0) -> np.ndarray:
    """Best reward after each number of evaluations from 1 on, repeated maps counted; NaN before the first map.

    :param setup: evaluations' worth of work before the first map
    """
    best = np.maximum.accumulate([episode.reward for episode in episodes])
    index = np.arange(1, evaluations + 1) - int(np.ceil(setup)) - 1
    return np.where(index >= 0, best[np.clip(index, 0, len(best) - 1)], np.nan)


def half_width(values: Sequence[float], level: float = 0.95) -> float | None:
    """Half of Student's confidence interval for the mean of runs; None for a single run, which says nothing of others.

    >>> round(half_width([1.0, 2.0, 3.0]), 2)
    2.48
    """
    n = len(values)
    return float(stats.t.ppf((1 + level) / 2, n - 1) * np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else None


def difference_of_means(a: Sequence[float], b: Sequence[float], comparisons: int, level: float = 0.95) -> dict[str, float | None]:
    """Mean of a's runs less that of b's, and half of Welch's confidence interval, which is None where both are single runs.

    A single run stands for a search that always comes out the same, and counts as exact.

    :param comparisons: so many differences are looked at together; all of their intervals hold at once with this level (Bonferroni)
    """
    errors = [np.var(runs, ddof=1) / len(runs) if len(runs) > 1 else 0.0 for runs in (a, b)]
    difference, error = float(np.mean(a) - np.mean(b)), sum(errors)
    if len(a) == len(b) == 1:
        return {"mean": difference, "half_width": None}
    parts = sum(e**2 / (len(runs) - 1) for e, runs in zip(errors, (a, b), strict=True) if len(runs) > 1)
    freedom = error**2 / parts if parts else 1.0
    return {"mean": difference, "half_width": float(stats.t.ppf(1 - (1 - level) / 2 / comparisons, freedom) * np.sqrt(error))}


def reaches(curve: np.ndarray, reward: float) -> int | None:
    """The number of evaluations after which a curve is at least at a reward; None when it never is."""
    above = np.flatnonzero(curve >= reward)
    return int(above[0]) + 1 if len(above) else None
