"""One search from first episode to exported map, resumable at every episode."""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
from tqdm import tqdm

from agents.algorithms import AGENTS, ALGORITHMS, DecayingNoise, build_agent, hyperparameters
from agents.baselines import BASELINES
from agents.callbacks import RecordEpisodes
from agents.recorder import Recorder
from agents.trace import Episode, read_trace
from arq_env.bitwidths import save_map
from arq_env.errors import ArqError
from arq_env.evaluation import Evaluator
from arq_env.files import atomic_file, drop_partial_line, write_json
from arq_env.provenance import provenance

#: Maps with the highest rewards that are judged again, on other images.
CANDIDATES = 5


def search(
    algorithm: str,
    env,
    *,
    episodes: int,
    folder: Path,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = True,
    config: dict | None = None,
) -> Episode:
    """Run one search; return the episode whose map is exported (see :func:`confirm`).

    The run folder holds ``config.json``, ``trace.jsonl``, ``tensorboard/``, ``bit_widths.json`` and, of an agent,
    ``agent.zip``. A second call with the same configuration resumes: the search takes the same decisions again from the first
    episode, since all is seeded, while every map in the trace is recalled instead of certified, which takes a hundredth of the
    time; so a killed and resumed search ends exactly where an uninterrupted one does. More ``episodes`` than before extend it,
    and one that has come to its end is left as it is.

    :param algorithm: one of :data:`agents.algorithms.AGENTS` or :data:`agents.baselines.BASELINES`; of the latter some
        end before all episodes are used
    :param env: a single :class:`arq_env.env.ArqEnv`, wrapped or not
    :param folder: the run folder; it may hold an earlier part of the same search, and nothing else
    :param device: of the agent
    :param config: written to ``config.json`` beside the settings of the search; two runs are the same when it is equal
    :raises ArqError: for an unknown algorithm, when the folder holds another search, and when there is no episode to run
    """
    if algorithm not in (*AGENTS, *BASELINES):
        raise ArqError(f"there is no algorithm {algorithm!r}: choose one of {', '.join((*AGENTS, *BASELINES))}")
    if episodes < 1:
        raise ArqError(f"{episodes} episodes were asked for: give at least 1")
    folder = Path(folder)
    evaluator = env.get_wrapper_attr("evaluator")
    known = _open_folder(folder, algorithm, env, seed, config or {})
    if episodes < len(known):
        raise ArqError(f"{folder} already has {len(known)} episodes: ask for at least as many, or choose another --output")
    if (exported := _exported(folder, episodes)) is not None:
        return known[exported - 1]
    for episode in known:
        evaluator.remember(episode.bit_widths, episode.evaluation)
    _ = evaluator.reference  # certified before the bar starts, so that errors and warnings come first

    shutil.rmtree(folder / "tensorboard", ignore_errors=True)  # replaying writes the same curves again
    recorder = Recorder(folder, env.get_wrapper_attr("layers"), episodes, known, progress=progress)
    if algorithm in AGENTS:
        agent = _learn(algorithm, env, recorder, seed, device)
        with atomic_file(folder / "agent.zip") as file:
            agent.save(file)
    else:
        _propose(algorithm, env.unwrapped, recorder, seed)
    recorder.close()
    best, confirmed = confirm(recorder.done, evaluator, progress=progress)
    save_run_map(folder, env, best, confirmed | {"episodes": episodes})
    return best


def _exported(folder: Path, episodes: int) -> int | None:
    """The episode whose map a search of this length has exported; None when it has not come to its end."""
    try:
        metrics = json.loads((folder / "bit_widths.json").read_text())["metrics"]
        return metrics["episode"] if metrics["episodes"] == episodes else None
    except (OSError, ValueError, KeyError):
        return None


def _learn(algorithm: str, env, recorder: Recorder, seed: int, device: str):
    """Train an agent for as many episodes as the recorder expects."""
    agent = build_agent(algorithm, env, seed=seed, device=device)
    agent.set_logger(recorder.logger)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You specified a buffer size")
        agent.learn(recorder.episodes * agent.env.get_attr("horizon")[0], callback=RecordEpisodes(recorder), log_interval=1)
    return agent


def _propose(algorithm: str, env, recorder: Recorder, seed: int) -> None:
    """Give a baseline the reward of each map that it proposes, until it or the recorder has had enough."""
    proposals = BASELINES[algorithm](env, np.random.default_rng(seed))
    reward = None
    while len(recorder.done) < recorder.episodes:
        try:
            bit_widths = proposals.send(reward)
        except StopIteration:
            break
        reward, info = env.judge(bit_widths)
        recorder.add(reward, info)
        recorder.logger.dump(len(recorder.done) * env.horizon)


def confirm(episodes: list[Episode], evaluator: Evaluator, *, progress: bool = True) -> tuple[Episode, dict]:
    """Choose among the five maps with the highest rewards, on images that the search did not use.

    :return: the chosen episode, and what speaks for it: its ACR and the FP32 network's on those images
    """
    distinct: dict[tuple, Episode] = {}
    for episode in sorted(episodes, key=lambda episode: -episode.reward):
        distinct.setdefault(tuple(episode.bit_widths.items()), episode)
    candidates = list(distinct.values())[:CANDIDATES]
    judge = evaluator.second_opinion()
    if judge is None:
        return candidates[0], {}
    bar = tqdm(candidates, desc="confirming", unit="map", disable=not progress)
    judged = {episode.episode: judge.evaluate(episode.bit_widths) for episode in bar}
    best = max(candidates, key=lambda episode: judged[episode.episode].acr)
    settings = {f"confirmed_{name}": getattr(judge.settings, name) for name in ("images", "n")}
    return best, {"confirmed_acr": judged[best.episode].acr, "confirmed_reference_acr": judge.reference.acr, **settings}


def save_run_map(folder: Path, env, best: Episode, also: dict) -> None:
    """Write the chosen map of a run as ``bit_widths.json``.

    :param also: what its metrics say beside the episode's outcome
    """
    problem = env.get_wrapper_attr("problem")
    metrics = {
        key: getattr(best, key) for key in ("reward", "acr", "clean_accuracy", "certified_accuracy", "reference_acr", "episode")
    }
    save_map(
        folder / "bit_widths.json",
        best.bit_widths,
        env.get_wrapper_attr("layers"),
        network=problem.card.get("network"),
        dataset=problem.card.get("dataset"),
        sigma=problem.sigma,
        budget=env.get_wrapper_attr("default_budget").fraction,
        metrics=metrics | also,
        provenance=provenance()
        | {
            "checkpoint": problem.card.get("digest"),
            "training": problem.card.get("training"),
            "certifier": dataclasses.asdict(env.get_wrapper_attr("evaluator").settings),
        },
    )


def evaluation_identity(evaluator: Evaluator) -> dict:
    """What an evaluation depends on beside the map: two that are equal in this can take each other's place."""
    problem = evaluator.problem
    return {
        "sigma": problem.sigma,
        "network": problem.digest,
        "certifier": dataclasses.asdict(evaluator.settings),
        "versions": provenance()["versions"],
    }


def _open_folder(folder: Path, algorithm: str, env, seed: int, config: dict) -> list[Episode]:
    """Write ``config.json``, or check that it is the one already there; return the episodes of the trace."""
    settings = {}
    if algorithm in ALGORITHMS:
        settings = hyperparameters(algorithm, env.get_wrapper_attr("horizon"))
        settings["replay_buffer_class"] = settings["replay_buffer_class"].__name__
        settings["action_noise"] = None if algorithm == "sac" else vars(DecayingNoise(2))
    config = config | {
        "algorithm": algorithm,
        "seed": seed,
        "budget": env.get_wrapper_attr("default_budget").fraction,
        "end_bits": env.get_wrapper_attr("end_bits"),
        "hyperparameters": settings,
        **evaluation_identity(env.get_wrapper_attr("evaluator")),
    }
    config = json.loads(json.dumps(config))  # tuples become lists, as they come back from the file
    path = folder / "config.json"
    if not path.exists():
        if folder.exists() and any(not entry.name.endswith(".part") for entry in folder.iterdir()):
            raise ArqError(f"{folder} is not empty and holds no config.json of a search: choose another --output")
        write_json(path, config | {"provenance": provenance()})
        return []
    try:
        found = json.loads(path.read_text())
        found.pop("provenance", None)
    except (OSError, ValueError, AttributeError) as error:
        raise ArqError(f"{path} cannot be read ({error}): choose another --output") from error
    differing = sorted(key for key in config.keys() | found.keys() if config.get(key) != found.get(key))
    if differing:
        raise ArqError(f"{folder} holds another search (it differs in {', '.join(differing)}): choose another --output")
    episodes = read_trace(folder / "trace.jsonl")
    drop_partial_line(folder / "trace.jsonl")
    return episodes
