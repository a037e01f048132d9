"""What can be added to a search, each by itself: ``td3+features+demonstrations+exchange`` is TD3 with all three.

- ``onehot``: the agent sees which layer is at hand as one number a layer; the environment's own features are nearly the same for
  many layers.
- ``features``: the agent sees what few bits would cost in the layer at hand.
- ``demonstrations``: the maps of the integer program and of greedy are played first, in place of random episodes (Vecerik et
  al. 2017, without the parts that change the agent's loss).
- ``exchange``: the last evaluations go to neighbours of the best map: :data:`EXCHANGES`, and what a search that ended early has
  left. Any search can have this one.

The last three start from measured sensitivities, as the integer program does. Five more take away what the agents have by default,
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

import gymnasium
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from arq_env.bitwidths import MAX_BITS, MIN_BITS, Bits, BitWidthMap, complete
from arq_env.env import REWARD_SCALE
from arq_env.sensitivity import MEASURED, places

from .baselines import Proposals, affordable, greedy, integer_program
from .haq import incremental_reward
from .methods import CHANGES, INFORMED, WITH_SENSITIVITIES, split_method
from .recorder import Recorder

#: Evaluations that ``exchange`` keeps for itself, at least.
EXCHANGES = 50
#: An effect of fewer nats than this looks like none to an agent.
LEAST_EFFECT = 1e-5


def uses_sensitivities(method: str) -> bool:
    """Whether a search measures the effect of few bits in each place before its first map."""
    name, levers = split_method(method)
    return name in WITH_SENSITIVITIES or not {*levers}.isdisjoint(INFORMED)


class RowPerLayer(gymnasium.ObservationWrapper):
    """Adds to the observation the numbers that belong to the layer at hand.

    :param env: an :class:`arq_env.env.ArqEnv`, wrapped or not
    :param rows: [free layers, numbers] in [0, 1]
    """

    def __init__(self, env: gymnasium.Env, rows: np.ndarray):
        super().__init__(env)
        self._rows = rows.astype(np.float32)
        self.observation_space = spaces.Box(0, 1, (env.observation_space.shape[0] + rows.shape[1],), np.float32)

    def observation(self, observation):
        """The environment's row and the layer's; after the last step that of the last layer."""
        return np.concatenate([observation, self._rows[min(self.unwrapped.step_count, len(self._rows) - 1)]])


class IncrementalReward(gymnasium.Wrapper):
    """Replaces an episode's reward by :func:`arq_agents.haq.incremental_reward`'s; ``info["reward"]`` stays the environment's own.

    As in the published search's reconstruction each map is thus evaluated twice, and a resumed search certifies it again.

    :param env: an :class:`arq_env.env.ArqEnv`, wrapped or not
    """

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        self._reward = incremental_reward(self.unwrapped)

    def step(self, action):
        """As the environment does; the last reward is the certified one."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, self._reward(info["bit_widths"]) if terminated else reward, terminated, truncated, info


def seen_with(levers: tuple[str, ...], env: gymnasium.Env) -> gymnasium.Env:
    """The environment as an agent with these levers sees it."""
    if "incremental" in levers:
        env = IncrementalReward(env)
    if "unscaled" in levers:
        env = gymnasium.wrappers.TransformReward(env, lambda reward: reward / REWARD_SCALE)
    if "onehot" in levers:
        env = RowPerLayer(env, np.eye(env.unwrapped.horizon))
    return RowPerLayer(env, effects_by_layer(env.unwrapped)) if "features" in levers else env


def changes(levers: tuple[str, ...]) -> dict:
    """What :func:`arq_agents.algorithms.build_agent` is told for these levers."""
    return {key: value for lever in levers for key, value in CHANGES.get(lever, {}).items()}


def effects_by_layer(env) -> np.ndarray:
    """The effects of 2, 3 and 4 bits on each free layer's weights, and of as many on what it reads.

    :return: [free layers, 6] in [0, 1], on one logarithmic scale
    """
    effects, unpriced = env.evaluator.sensitivities, [0.0] * len(MEASURED)  # an earlier layer decides what this one reads
    pairs = [[(layer.name, kind) for kind in Bits._fields] for layer in env.free_layers]
    table = np.array([[e for place in pair for e in effects.get(place, unpriced)[: len(MEASURED)]] for pair in pairs])
    scale = np.log(np.maximum(table, LEAST_EFFECT) / LEAST_EFFECT)
    return scale / max(scale.max(), 1e-12)


def demonstrations(env) -> Iterator[tuple[float, BitWidthMap]]:
    """The environment's budget and a map within it: those of the integer program, and greedy's."""
    maps = chain(integer_program(env, None), greedy(env, None))
    return ((env.default_budget.fraction, bit_widths) for bit_widths in maps)


def demonstrate(agent: OffPolicyAlgorithm, recorder: Recorder, maps: Iterable[tuple[float, BitWidthMap]]) -> None:
    """Play maps, as near as actions reach, into an agent's replay buffer.

    :param maps: each with the budget of its episode, as a fraction of FP32's bit operations
    """
    (env,) = agent.env.envs
    base = env.unwrapped
    for budget, bit_widths in maps:
        observation, _ = env.reset(options={"budget": budget})
        for action in base.encode(bit_widths):
            following, reward, terminated, _, info = env.step(action)
            agent.replay_buffer.add(observation, following, action, np.array([reward]), np.array([terminated]), [{}])
            observation = following
        recorder.add(info)
        recorder.logger.dump()


def exchange(env, known: dict[tuple, float]) -> Proposals:
    """Neighbours of the best map so far: a bit less in one place, a bit more in another, or one of the two.

    Of those within the budget and not met before, always the one whose sensitivities add up to least. Local search with the
    integer program's objective as its guide.

    :param known: maps (as tuples of items) and their rewards; what the generator is sent is added
    """
    decided = (None, *places(env.layers))
    while True:
        best = dict(max(known, key=known.get))
        moves = product(decided, decided)
        near = (_moved(env, best, down, up) for down, up in moves if down != up)
        fresh = [found for found in near if found and tuple(found.items()) not in known and affordable(env, found)]
        if not fresh:
            return
        bit_widths = min(fresh, key=lambda found: _total_effect(env, found))
        known[tuple(bit_widths.items())] = yield bit_widths


def _moved(env, bit_widths: BitWidthMap, down, up) -> BitWidthMap | None:
    """A map with a bit less in one place and a bit more in another; None where a place has no such bits.

    :param down, up: the places, or None
    """
    chosen = {layer.name: bit_widths[layer.name] for layer in env.free_layers}
    for place, change in ((down, -1), (up, 1)):
        if place is not None:
            name, kind = place
            bits = getattr(chosen[name], kind) + change
            if not MIN_BITS <= bits <= MAX_BITS:
                return None
            chosen[name] = chosen[name]._replace(**{kind: bits})
    return complete(chosen, env.layers, env.end_bits)


def _total_effect(env, bit_widths: BitWidthMap) -> float:
    effects = env.evaluator.sensitivities.items()
    return sum(effect[getattr(bit_widths[name], kind) - MIN_BITS] for (name, kind), effect in effects)
