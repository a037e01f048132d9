"""One search from first episode to exported map, resumable at every episode."""

import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from tqdm import tqdm

from arq_env.bitwidths import BitWidthMap
from arq_env.env import REWARD_SCALE, ArqEnv, arq_env_of
from arq_env.evaluation import Evaluation, Evaluator
from arq_env.finishing import finish_briefly
from arq_env.search_space import SearchSpace
from arq_env.support.errors import ArqError
from arq_env.support.files import atomic_file, read_json
from arq_env.support.settings import CONFIRMING_STEPS

from .algorithms import WARM_UP_EPISODES, build_agent
from .baselines import BASELINES, Proposals
from .callbacks import RecordEpisodes
from .levers import EXCHANGES, changes, demonstrate, demonstrations, exchange, seen_with
from .methods import AGENTS, PLANNED, split_method
from .recorder import Recorder
from .run_folder import export_map, open_folder
from .trace import Episode

#: Maps with the highest rewards that are judged again, on other images.
CANDIDATES = 5


def search(
    algorithm: str,
    env: gymnasium.Env,
    *,
    episodes: int,
    folder: Path,
    seed: int = 0,
    device: str = "cpu",
    confirming_steps: int = CONFIRMING_STEPS,
    progress: bool = True,
    config: dict | None = None,
) -> Episode:
    """Run one search; return the episode whose map is exported (see :func:`confirm`).

    The run folder holds ``config.json``, ``trace.jsonl``, ``tensorboard/``, ``bit_widths.json`` and, of an agent,
    ``agent.zip``. A second call with the same configuration resumes: the search takes the same decisions again from the first
    episode, since all is seeded, while every map in the trace is recalled instead of certified, which takes a hundredth of the
    time (but see :class:`arq_agents.haq.HaqEnv`); so a killed and resumed search ends exactly where an uninterrupted one does. More
    ``episodes`` than before extend it, and one that has come to its end is left as it is.

    :param algorithm: one of :data:`arq_agents.methods.AGENTS` or :data:`arq_agents.methods.SEARCHES`, and what
        :mod:`arq_agents.levers` adds, such as ``td3+features``; some of the baselines end before all episodes are used
    :param env: a single :class:`arq_env.env.ArqEnv`, wrapped or not
    :param folder: the run folder; it may hold an earlier part of the same search, and nothing else
    :param device: of the agent
    :param confirming_steps: as for :func:`confirm`
    :param config: written to ``config.json`` beside the settings of the search; two runs are the same when it is equal
    :raises ArqError: for an unknown algorithm, when the folder holds another search, and when there are too few episodes to run
    """
    name, levers = split_method(algorithm)
    if "exchange" in levers and name in AGENTS and episodes <= EXCHANGES + WARM_UP_EPISODES:
        raise ArqError(
            f"{episodes} episodes leave none to learn from: exchange keeps {EXCHANGES} and warm-up takes {WARM_UP_EPISODES}, "
            "so ask for more, or leave exchange out"
        )
    folder, base = Path(folder), arq_env_of(env)
    known = open_folder(folder, algorithm, base, episodes, seed, config or {})
    if (exported := _exported(folder, episodes)) is not None and exported <= len(known):
        return known[exported - 1]
    with start(folder, base, episodes, known, progress=progress) as recorder:
        until = max(episodes - EXCHANGES, 1) if "exchange" in levers else episodes
        if name in AGENTS:
            shown = demonstrations(base) if "demonstrations" in levers else ()
            learn(name, env, recorder, folder, seed, device, levers=levers, shown=shown, until=until)
        else:
            proposals = BASELINES[name](base, np.random.default_rng(seed))
            if name in PLANNED:
                proposals = _evaluated(islice(proposals, until), base.evaluator)
            _propose(proposals, base, recorder, until)
        if "exchange" in levers:
            rewards = {tuple(episode.bit_widths.items()): episode.reward for episode in recorder.done}
            _propose(exchange(base, rewards), base, recorder, episodes)
        best, confirmed = confirm(recorder.done, base.evaluator, confirming_steps, progress=progress)
        told = ("reward", "acr", "clean_accuracy", "certified_accuracy", "reference_acr", "episode")
        metrics = {key: getattr(best, key) for key in told} | confirmed | {"episodes": episodes}
        recorder.exported(best, metrics)
    export_map(folder, base, best.bit_widths, base.default_budget.spec, metrics)
    return best


def _exported(folder: Path, episodes: int) -> int | None:
    """The episode whose map a search of this length has exported; None when it has not come to its end."""
    try:
        metrics = read_json(folder / "bit_widths.json")["metrics"]
        exported, ended = metrics["episode"], metrics["episodes"] == episodes
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return exported if ended and type(exported) is int and 1 <= exported <= episodes else None


def start(folder: Path, env: ArqEnv, episodes: int, known: list[Episode], *, progress: bool) -> Recorder:
    """Recall what is known, certify the FP32 network, and open the record of a search."""
    for episode in known:
        env.evaluator.remember(episode.bit_widths, episode.evaluation)
    _ = env.evaluator.reference  # certified before the bar starts, so that errors and warnings come first
    return Recorder(folder, env.layers, episodes, known, progress=progress)


def learn(
    name: str,
    env: gymnasium.Env,
    recorder: Recorder,
    folder: Path,
    seed: int,
    device: str,
    *,
    levers: tuple[str, ...],
    shown: Iterable[tuple[Any, BitWidthMap]],
    until: int,
) -> OffPolicyAlgorithm:
    """Train an agent until the recorder has so many episodes; leave it in ``agent.zip``.

    :param shown: for ``demonstrations``, as :func:`arq_agents.levers.demonstrate` takes them
    """
    env = seen_with(levers, env)
    agent = build_agent(name, env, seed=seed, device=device, **changes(levers))
    agent.set_logger(recorder.logger)
    demonstrate(agent, recorder, islice(shown, until - len(recorder.done)))
    assert agent.env is not None  # it was built with one
    (horizon,) = agent.env.get_attr("horizon")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You specified a buffer size")
        steps = (until - len(recorder.done)) * horizon
        agent.num_timesteps = len(recorder.done) * horizon  # demonstrations are steps, too
        agent.learn(steps, callback=RecordEpisodes(recorder), log_interval=1, reset_num_timesteps=False)
    with atomic_file(folder / "agent.zip") as file:
        agent.save(file)
    return agent


def _propose(proposals: Proposals, space: SearchSpace, recorder: Recorder, until: int) -> None:
    """Give a baseline the reward of each map that it proposes, until it or the recorder has had enough."""
    reward: float | None = None
    while len(recorder.done) < until:
        try:
            bit_widths = next(proposals) if reward is None else proposals.send(reward)
        except StopIteration:
            break
        reward = recorder.add(space.judge(bit_widths)).reward
        recorder.logger.dump()


def _evaluated(maps: Iterator[BitWidthMap], evaluator: Evaluator) -> Proposals:
    """The same maps, as many as there are workers evaluated at a time before they are proposed."""
    while some := list(islice(maps, evaluator.engine.workers)):
        evaluator.evaluate_many(some)
        for bit_widths in some:  # noqa: UP028 (a list takes no rewards)
            yield bit_widths


def confirm(
    episodes: list[Episode], evaluator: Evaluator, steps: int = CONFIRMING_STEPS, *, progress: bool = True
) -> tuple[Episode, dict]:
    """Choose among the five maps with the highest rewards, on draws that the search never saw: images, noise, calibration.

    :param steps: batches of fine-tuning that each of the five gets before, where rewards only foretell what fine-tuning leaves
        (``regained_bits``); with 0 they are judged as the search judged them
    :return: the chosen episode, and what speaks for it: its ACR and the FP32 network's on those draws, and as ``fresh_reward`` the
        reward it gets there as it is, to compare with that of other searches: it holds none of the luck that a search climbs
    """
    distinct: dict[tuple, Episode] = {}
    for episode in sorted(episodes, key=lambda episode: -episode.reward):
        distinct.setdefault(tuple(episode.bit_widths.items()), episode)
    candidates = list(distinct.values())[:CANDIDATES]
    judge = evaluator.second_opinion()
    steps = steps if evaluator.settings.regained_bits else 0
    maps = [episode.bit_widths for episode in candidates]
    finished = partial(judge_finished, judge, evaluator, steps)
    judged = evaluator.engine.map(finished, maps) if steps else map(judge.evaluate, maps)
    bar = tqdm(judged, total=len(maps), desc="confirming", unit="map", disable=not progress)
    acr = {episode.episode: found.acr for episode, found in zip(candidates, bar, strict=True)}
    best = max(candidates, key=lambda episode: acr[episode.episode])
    settings = {f"confirmed_{name}": getattr(judge.settings, name) for name in ("images", "n", "part")} | {"confirmed_steps": steps}
    fresh = REWARD_SCALE * (judge.evaluate(best.bit_widths).acr / judge.reference.acr - 1)
    confirmed = {"confirmed_acr": acr[best.episode], "confirmed_reference_acr": judge.reference.acr, "fresh_reward": fresh}
    return best, confirmed | settings


def judge_finished(judge: Evaluator, evaluator: Evaluator, steps: int, bit_widths: BitWidthMap) -> Evaluation:
    """What an evaluator says of a map's network once another's calibration images have fine-tuned it briefly."""
    return judge.measure(partial(finish_briefly, evaluator, bit_widths, steps))
