"""One agent for every budget: it learns on budgets drawn anew for each episode, and then answers for any of them."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, SupportsFloat

import gymnasium
import numpy as np
from gymnasium.utils import seeding
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.save_util import load_from_zip_file

from arq_env.bitwidths import Bits, BitWidthMap, uniform
from arq_env.budget import Budget, OneBudget
from arq_env.env import arq_env_of, budget_option
from arq_env.search_space import SearchSpace
from arq_env.support.errors import ArqError
from arq_env.support.files import write_json
from arq_env.support.provenance import provenance

from .algorithms import ALGORITHMS, build_agent
from .baselines import least_sensitive
from .levers import seen_with
from .methods import split_method
from .run_folder import export_map, open_folder, read_config
from .search import learn, start

#: Budgets that demonstrations are made for, and weights of activations in the integer program there.
DEMONSTRATED, DEMONSTRATED_WEIGHTS = 12, (1.0, 0.5, 2.0)


class DrawnBudget(gymnasium.Wrapper[np.ndarray, np.ndarray, np.ndarray, np.ndarray]):
    """Draws each episode's budget, evenly on a log scale, and takes what uniform bits would reach there off the reward.

    That baseline depends on the budget alone, so it changes no preference among maps; it leaves the agent with rewards
    of one scale, from the smallest budget to the largest. ``info["reward"]`` stays the environment's own.

    :param env: an :class:`arq_env.env.ArqEnv` with a budget of one kind
    :param low, high: limits of that kind: of bit operations, fractions of FP32's
    """

    def __init__(self, env: gymnasium.Env, low: float, high: float):
        super().__init__(env)
        self._space: SearchSpace = arq_env_of(env)
        self._budget = check_budgets(self._space.default_budget, low, high)
        self.low, self.high = low, high
        self._rng = np.random.default_rng()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Start an episode at a drawn budget, unless ``options`` name one."""
        if seed is not None:
            self._rng, _ = seeding.np_random(seed)  # Gymnasium's error for what is no seed
        if budget_option(options) is None:
            options = {"budget": float(np.exp(self._rng.uniform(np.log(self.low), np.log(self.high))))}
        return self.env.reset(seed=seed, options=options)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, SupportsFloat, bool, bool, dict]:
        """As the environment does; the last reward is relative to uniform bits."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated:
            reward = float(reward) - float(np.interp(np.log(self._space.budget.value), *self.uniform_rewards))
        return observation, reward, terminated, truncated, info

    @cached_property
    def uniform_rewards(self) -> tuple[list[float], list[float]]:
        """Log costs and rewards of W2A2, W3A3 and so on, up to the first that the largest budget allows not.

        Costs are in the budget's own measure; where activations cost nothing it is W2A8, W3A8 and so on.
        """
        space, costs, rewards = self._space, [], []
        for bits in space.widths:
            bit_widths = uniform(space.layers, *self._budget.level(bits))
            costs.append(float(np.log(self._budget.amount(bit_widths))))
            rewards.append(space.judge(bit_widths)["reward"])
            if np.exp(costs[-1]) > self.high:
                break
        return costs, rewards


def check_budgets(budget: Budget, low: float, high: float) -> OneBudget:
    """Make sure that others can be drawn between two limits, in the measure of a budget; return that of the second.

    :raises ArqError: when it is of several kinds, they are not two that rise, or they cannot be met
    """
    if not isinstance(budget, OneBudget):
        raise ArqError(f"the budget is {budget}: give a single one to draw others between two")
    if not 0 < low < high:
        raise ArqError(f"budgets from {low} to {high} were asked for: give two, low first")
    budget.at(low)
    return budget.at(high)


def train_for_any_budget(
    algorithm: str,
    env: gymnasium.Env,
    budgets: tuple[float, float],
    *,
    episodes: int,
    folder: Path,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = True,
    config: dict | None = None,
) -> OffPolicyAlgorithm:
    """Train one agent on all budgets between two; resumable as :func:`arq_agents.search.search` is.

    The folder holds ``config.json``, ``trace.jsonl``, ``tensorboard/`` and ``agent.zip``.

    :param algorithm: of stable-baselines3, and what :mod:`arq_agents.levers` adds but ``exchange`` and ``incremental``, such as
        ``td3+features``; ``demonstrations`` are the integer program's maps for :data:`DEMONSTRATED` budgets
    :param budgets: least and greatest, as for :class:`DrawnBudget`
    """
    name, levers = split_method(algorithm)
    if name not in ALGORITHMS or not {"exchange", "incremental"}.isdisjoint(levers):
        raise ArqError(
            f"{algorithm!r} cannot be trained on drawn budgets: choose one of {', '.join(ALGORITHMS)}, "
            "without exchange and without incremental"
        )
    folder, drawn = Path(folder), DrawnBudget(env, *budgets)
    base = arq_env_of(env)
    known = open_folder(folder, algorithm, base, episodes, seed, (config or {}) | {"budgets": list(budgets)})
    shown = _demonstrations(base, budgets) if "demonstrations" in levers else ()
    with start(folder, base, episodes, known, progress=progress) as recorder:
        return learn(name, drawn, recorder, folder, seed, device, levers=levers, shown=shown, until=episodes)


def _demonstrations(space: SearchSpace, budgets: tuple[float, float]) -> Iterator[tuple[Any, BitWidthMap]]:
    for value in np.geomspace(*budgets, DEMONSTRATED).clip(*budgets).tolist():
        budget = space.default_budget.at(value)
        for weight in DEMONSTRATED_WEIGHTS:
            yield value, least_sensitive(space, space.sensitivities, weight, budget)


def map_for_budget(agent: OffPolicyAlgorithm, env: gymnasium.Env, budget: float) -> dict:
    """What the agent does at a budget, without exploring: the info of the episode's end, ``bit_widths`` and ``reward`` in it.

    :param env: of the network and noise that the agent learned on, or of others, as :func:`arq_agents.levers.seen_with` its levers
    """
    observation, _ = env.reset(options={"budget": budget})
    terminated = False
    while not terminated:
        action, _ = agent.predict(observation, deterministic=True)
        observation, _, terminated, _, info = env.step(action)
    return info


def export_budgets(agent: OffPolicyAlgorithm, env: gymnasium.Env, algorithm: str, budgets: list[float], folder: Path) -> str:
    """Write the agent's map for each budget below ``maps/`` and a summary as ``budgets.json``; return the latter as a table.

    :param algorithm: what the agent was trained as, with its levers
    """
    base, seen, rows = arq_env_of(env), seen_with(split_method(algorithm)[1], env), []
    if seen.observation_space != agent.observation_space:
        raise ArqError("the agent sees another network's layers one by one: train one without onehot to apply it here")
    for budget in budgets:
        info = map_for_budget(agent, seen, budget)
        metrics = {key: info[key] for key in ("reward", "acr", "clean_accuracy", "certified_accuracy", "reference_acr")}
        bit_widths = {name: Bits(*bits) for name, bits in info["bit_widths"].items()}
        export_map(folder / "maps" / str(float(budget)), base, bit_widths, base.default_budget.at(budget).spec, metrics)
        rows.append({"budget": budget, "bops_fraction": info["bops_fraction"]} | metrics)
    write_json(folder / "budgets.json", {"rows": rows, "provenance": provenance()})
    lines = [f"{row['budget']:8.3%} {row['bops_fraction']:8.3%} {row['reward']:8.3f}" for row in rows]
    return "\n".join(["  budget     BOPs   reward", *lines])


def read_agent_config(run: Path) -> dict:
    """What ``config.json`` of an agent for all budgets says.

    :raises ArqError: when there is none, or it is not of such an agent
    """
    try:
        config = read_config(run / "config.json")
    except ArqError:
        config = {}
    if not isinstance(config.get("algorithm"), str) or "budgets" not in config:
        raise ArqError(f"{run} holds no agent for all budgets: give the folder of train_any_budget.py")
    return config


def learned_on(run: Path) -> dict:
    """What an agent for all budgets learned on: ``env, sigma, training, regained_bits``, as a command line gives them, and
    ``problem``, the arguments of a network of one's own, ``fix``, ``bits`` and how many images an evaluation took.

    :return: without what the folder does not say, such as the training in one that no script made
    :raises ArqError: as :func:`read_agent_config`
    """
    config = read_agent_config(run)
    certifier, made_with = config.get("certifier"), config.get("provenance")
    found = {name: config.get(name) for name in ("env", "sigma", "training")}
    certifier = certifier if isinstance(certifier, dict) else {}
    found["regained_bits"] = certifier.get("regained_bits")
    problem = made_with.get("problem") if isinstance(made_with, dict) else None
    own = {name: value for name, value in problem.items() if name != "digests"} if isinstance(problem, dict) else {}
    own |= {name: config[name] for name in ("fix", "bits") if config.get(name) is not None}
    if isinstance(made_with, dict) and made_with.get("weights") is not None:
        own["weights"] = made_with["weights"]
    own |= {name: certifier[name] for name in ("images", "calibration_images") if name in certifier}
    found["problem"] = own or None
    kinds = {"problem": dict, "env": str, "sigma": int | float, "training": str, "regained_bits": int}
    return {name: value for name, value in found.items() if isinstance(value, kinds[name]) and not isinstance(value, bool)}


def load_agent(run: Path, env: gymnasium.Env) -> tuple[OffPolicyAlgorithm, str]:
    """The agent of a run folder for an environment, and what it was trained as.

    SB3's own ``load`` unpickles what is in ``agent.zip``, which can run any code; here an agent is built as in training, and takes
    nothing from there but its policy's numbers.

    :param env: where it is to choose maps; with the lever ``features`` sensitivities are measured there first
    :raises ArqError: when there is none, it was not trained on drawn budgets, or it does not fit the environment
    """
    algorithm, path = read_agent_config(run)["algorithm"], run / "agent.zip"
    name, levers = split_method(algorithm)
    agent = build_agent(name, seen_with(levers, env), seed=0, device="cpu", buffer_size=1)
    try:
        _, parameters, _ = load_from_zip_file(str(path), load_data=False, device="cpu")  # with torch's weights_only
        policy: dict[str, Any] = parameters["policy"]  # type: ignore[assignment]  # as SB3 has it, a tensor
    except Exception as error:  # of zipfile, zlib, pickle or torch, for whatever is in there
        reason, *_ = str(error).splitlines() or [type(error).__name__]
        raise ArqError(f"{path} holds no agent that can be read ({reason}): train it again") from error
    try:
        agent.policy.load_state_dict(policy)
    except (RuntimeError, TypeError, AttributeError) as error:  # other sizes: with onehot another network's, else another version's
        raise ArqError(
            f"the agent of {run} sees another network's layers one by one, or is of another version: train one without onehot to "
            "apply it here"
        ) from error
    return agent, algorithm
