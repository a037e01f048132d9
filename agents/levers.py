"""What can be added to a search, each by itself: ``td3+features+demonstrations+exchange`` is TD3 with all three.

- ``onehot``: the agent sees which layer is at hand as one number a layer; the environment's own features are nearly the same for
  many layers.
- ``features``: the agent sees what few bits would cost in the layer at hand.
- ``demonstrations``: the maps of the integer program and of greedy are played first, in place of random episodes (Vecerik et
  al. 2017, without the parts that change the agent's loss).
- ``exchange``: the last evaluations go to neighbours of the best map: :data:`EXCHANGES`, and what a search that ended early has
  left. Any search can have this one.

The last three start from sensitivities, as the integer program does. Five more take away what the agents have by default,
so that it can be measured:

- ``onestep``: returns bootstrapped after one step, in place of the certifier's own reward.
- ``onegradient``: one gradient step an episode, in place of one for each of its steps.
- ``steadynoise``: exploration noise that does not shrink (DDPG and TD3).
- ``unscaled``: relative ACR itself as reward, a tenth of the environment's.
- ``incremental``: the published search's reward, certified by incremental smoothing, in place of soft radii under the same noise
  for all maps. The trace keeps the environment's own.
"""

from collections.abc import Iterable, Iterator
from itertools import chain, product
from typing import Any, SupportsFloat

import gymnasium
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv

from arq_env.bitwidths import MIN_BITS, Bits, BitWidthMap
from arq_env.env import REWARD_SCALE, arq_env_of
from arq_env.search_space import SearchSpace
from arq_env.sensitivity import WITH_EFFECT, Place, places

from .baselines import Proposals, greedy, integer_program
from .haq import incremental_reward
from .methods import CHANGES
from .recorder import Recorder

#: Evaluations that ``exchange`` keeps for itself, at least.
EXCHANGES = 50
#: An effect of fewer nats than this looks like none to an agent.
LEAST_EFFECT = 1e-5


class RowPerLayer(gymnasium.ObservationWrapper[np.ndarray, np.ndarray, np.ndarray]):
    """Adds to the observation the numbers that belong to the layer at hand.

    :param env: an :class:`arq_env.env.ArqEnv`, wrapped or not
    :param rows: [free layers, numbers] in [0, 1]
    """

    def __init__(self, env: gymnasium.Env, rows: np.ndarray):
        super().__init__(env)
        self._space: SearchSpace = arq_env_of(env)
        self._rows = rows.astype(np.float32)
        self.observation_space = spaces.Box(0, 1, (spaces.flatdim(env.observation_space) + rows.shape[1],), np.float32)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        """The environment's row and the layer's; after the last step that of the last layer."""
        return np.concatenate([observation, self._rows[min(self._space.step_count, len(self._rows) - 1)]])


class IncrementalReward(gymnasium.Wrapper[np.ndarray, np.ndarray, np.ndarray, np.ndarray]):
    """Replaces an episode's reward by :func:`arq_agents.haq.incremental_reward`'s; ``info["reward"]`` stays the environment's own.

    As in the published search's reconstruction each map is thus evaluated twice, and a resumed search certifies it again.

    :param env: an :class:`arq_env.env.ArqEnv`, wrapped or not
    """

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        self._reward = incremental_reward(arq_env_of(env))

    def step(self, action: np.ndarray) -> tuple[np.ndarray, SupportsFloat, bool, bool, dict[str, Any]]:
        """As the environment does; the last reward is the certified one."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, self._reward(info["bit_widths"]) if terminated else reward, terminated, truncated, info


def seen_with(levers: tuple[str, ...], env: gymnasium.Env) -> gymnasium.Env:
    """The environment as an agent with these levers sees it."""
    space: SearchSpace = arq_env_of(env)
    if "incremental" in levers:
        env = IncrementalReward(env)
    if "unscaled" in levers:
        env = gymnasium.wrappers.TransformReward(env, lambda reward: float(reward) / REWARD_SCALE)
    if "onehot" in levers:
        env = RowPerLayer(env, np.eye(space.horizon))
    return RowPerLayer(env, effects_by_layer(space)) if "features" in levers else env


def changes(levers: tuple[str, ...]) -> dict:
    """What :func:`arq_agents.algorithms.build_agent` is told for these levers."""
    return {key: value for lever in levers for key, value in CHANGES.get(lever, {}).items()}


def effects_by_layer(space: SearchSpace) -> np.ndarray:
    """The effects of 2, 3 and 4 bits on each free layer's weights, and of as many on what it reads.

    :return: [free layers, 6] in [0, 1], on one logarithmic scale
    """
    effects, unpriced = space.sensitivities, [0.0] * len(WITH_EFFECT)  # an earlier layer decides what this one reads
    pairs = [[(layer.name, kind) for kind in Bits._fields] for layer in space.free_layers]
    table = np.array([[e for place in pair for e in effects.get(place, unpriced)[: len(WITH_EFFECT)]] for pair in pairs])
    scale = np.log(np.maximum(table, LEAST_EFFECT) / LEAST_EFFECT)
    return scale / max(scale.max(), 1e-12)


def demonstrations(space: SearchSpace) -> Iterator[tuple[Any, BitWidthMap]]:
    """The value of the environment's budget and a map within it: those of the integer program, and greedy's."""
    maps = chain(integer_program(space), greedy(space))
    return ((space.default_budget.value, bit_widths) for bit_widths in maps)


def demonstrate(agent: OffPolicyAlgorithm, recorder: Recorder, maps: Iterable[tuple[Any, BitWidthMap]]) -> None:
    """Play maps, as near as actions reach, into an agent's replay buffer.

    :param maps: each with the budget of its episode, as :meth:`arq_env.env.ArqEnv.reset` takes it
    """
    assert isinstance(agent.env, DummyVecEnv) and agent.replay_buffer is not None  # as SB3 makes them for one environment
    (env,) = agent.env.envs
    for budget, bit_widths in maps:
        observation, _ = env.reset(options={"budget": budget})
        for action in arq_env_of(env).encode(bit_widths):
            following, reward, terminated, _, info = env.step(action)
            agent.replay_buffer.add(observation, following, action, np.array([reward]), np.array([terminated]), [{}])
            observation = following
        recorder.add(info)
        recorder.logger.dump()


def exchange(space: SearchSpace, known: dict[tuple[tuple[str, Bits], ...], float]) -> Proposals:
    """Neighbours of the best map so far: a bit less in one place, a bit more in another, or one of the two.

    (Of the bit-widths there are, the next.)

    Of those within the budget and not met before, always the one whose sensitivities add up to least. Local search with the
    integer program's objective as its guide.

    :param known: maps (as tuples of items) and their rewards; what the generator is sent is added
    """
    decided, within = (None, *places(space.layers)), space.default_budget.within
    while True:
        best = dict(max(known.items(), key=lambda item: item[1])[0])
        moves = product(decided, decided)
        near = (_moved(space, best, down, up) for down, up in moves if down != up)
        fresh = [found for found in near if found and tuple(found.items()) not in known and within(found)]
        if not fresh:
            return
        bit_widths = min(fresh, key=lambda found: _total_effect(space, found))
        known[tuple(bit_widths.items())] = yield bit_widths


def _moved(space: SearchSpace, bit_widths: BitWidthMap, down: Place | None, up: Place | None) -> BitWidthMap | None:
    """A map with a bit less in one place and a bit more in another; None where a place has no such bits.

    :param down, up: the places, or None
    """
    chosen, widths = {layer.name: bit_widths[layer.name] for layer in space.free_layers}, space.widths
    for place, change in ((down, -1), (up, 1)):
        if place is not None:
            name, kind = place
            index = widths.index(getattr(chosen[name], kind)) + change
            if not 0 <= index < len(widths):
                return None
            chosen[name] = chosen[name]._replace(**{kind: widths[index]})
    return space.complete(chosen)


def _total_effect(space: SearchSpace, bit_widths: BitWidthMap) -> float:
    effects = space.sensitivities.items()
    return sum(effect[getattr(bit_widths[name], kind) - MIN_BITS] for (name, kind), effect in effects)
