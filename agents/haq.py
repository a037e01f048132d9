"""The published search, as far as the public record goes: HAQ's DDPG and decision process with ARQ's reward.

A reconstruction to compare with, made without its authors' code: agent, observation, action and budget are those of HAQ (Wang et
al. 2019), which ARQ builds on; the reward is the certified radius by incremental randomized smoothing (Ugare et al. 2024),
for about as many forward passes as an evaluation of this package.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from scipy.stats import truncnorm
from stable_baselines3 import DDPG
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from arq_env.bitwidths import MAX_BITS, Bits, BitWidthMap
from arq_env.evaluation import CertifierSettings
from arq_env.observation import scale_columns
from arq_env.rewards import CACHE_FACTOR
from arq_env.search_space import SearchSpace

WARM_UP_EPISODES = 20
ACTOR_RATE, CRITIC_RATE = 1e-4, 1e-3
NOISE, NOISE_DECAY = 0.5, 0.99
#: Share of a batch's mean reward that the moving baseline takes over.
BASELINE_RATE = 0.5
#: Noise samples an image in the incremental reward: fewer leave no radius worth comparing.
REWARD_SAMPLES = 128


def warm_up_steps(episodes: int, horizon: int) -> float:
    """SB3's ``learning_starts`` for so many whole episodes of random actions, and gradient steps from the end of the last on.

    SB3 plays at random while it has made *fewer* steps than this, and trains once it has made *more*: hence half a step less.
    """
    return max(episodes * horizon - 0.5, 0)


class HaqEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """HAQ's decision process: two steps a layer, absolute bits, the budget enforced when all is chosen.

    The agent is rewarded for the map that is left after the cut. The last step's info, ``reward`` included, is that of the
    environment below, which the agent does not see: each map is evaluated twice, so that this search's trace can be
    compared with the others'. A resumed search recalls the latter evaluation only and makes the former again.

    :param base: the environment below, whose problem and budget this shares
    """

    def __init__(self, base: SearchSpace):
        self.base, self.free_layers = base, base.free_layers
        self._reward = incremental_reward(base)
        self.observation_space = spaces.Box(0, 1, (10,), np.float32)
        self.action_space = spaces.Box(-1, 1, (1,), np.float32)
        columns = ("depthwise", "in_channels", "out_channels", "stride", "kernel", "parameters", "input_size")
        table = np.array([[getattr(layer, name) for name in columns] for layer in self.free_layers], float)
        table = np.column_stack([table, np.arange(len(table))])
        self._static = scale_columns(table)

    @property
    def horizon(self) -> int:
        """Steps of an episode."""
        return 2 * len(self.free_layers)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Start at the first free layer's weights."""
        super().reset(seed=seed)
        self._bits: list[int] = []
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Choose the next layer's weight bits, then its activation bits; the last step enforces the budget and certifies."""
        # 1. an action is the bits themselves, first of the weights, then of the activations
        self._bits.append(absolute_bits((float(np.clip(action, -1, 1)[0]) + 1) / 2, self.base.widths))
        if len(self._bits) < self.horizon:
            return self._observe(), 0.0, False, False, {}
        # 2. what all layers chose is cut until it fits the budget
        pairs = zip(self.free_layers, self._bits[::2], self._bits[1::2], strict=True)
        bit_widths = cut_to_budget({layer.name: Bits(weight, activation) for layer, weight, activation in pairs}, self.base)
        # 3. the map that is left is quantized and rewarded; the buffer gives its reward to every step of the episode
        return self._observe(), self._reward(bit_widths), True, False, self.base.judge(bit_widths)

    def _observe(self) -> np.ndarray:
        step = min(len(self._bits), self.horizon - 1)
        previous = self._bits[-1] / MAX_BITS if self._bits else 1.0
        return np.array([*self._static[step // 2], previous, step % 2], np.float32)


def incremental_reward(space: SearchSpace) -> Callable[[BitWidthMap], float]:
    """ARQ's reward on an environment's problem, as a function of the map; each map is certified once."""
    return space.reward_by(incremental(space.settings))


def incremental(settings: CertifierSettings) -> CertifierSettings:
    """A reward certifier by incremental smoothing for about as many forward passes."""
    images = max(1, settings.images * settings.n // REWARD_SAMPLES)
    return replace(settings, images=images, n0=100, n=REWARD_SAMPLES, alpha=0.001, reward_method="incremental")


def cached_samples(settings: CertifierSettings) -> int:
    """Forward passes of the FP32 network that incremental smoothing makes once, beside a search with these settings."""
    own = incremental(settings)
    return own.images * (own.n0 + CACHE_FACTOR * own.n)


def absolute_bits(action: float, widths: tuple[int, ...]) -> int:
    """HAQ's rounding of an action in [0, 1] to one of the bit-widths there are, clipped, since it can leave the range by one."""
    place = round(action * len(widths) + widths[0] - 0.5) - widths[0]
    return widths[min(max(place, 0), len(widths) - 1)]


def cut_to_budget(chosen: BitWidthMap, space: SearchSpace) -> BitWidthMap:
    """Sweep from the last layer to the first, taking an activation bit and then a weight bit from each, until the map fits.

    With fewer bit-widths than all of 2 to 8 the next of them is taken.

    Bits that the budget does not charge for stay.
    """
    chosen, budget = dict(chosen), space.default_budget
    while True:
        for layer in reversed(space.free_layers):
            for kind in (kind for kind in ("activation", "weight") if kind in budget.priced):
                if budget.within(bit_widths := space.complete(chosen)):
                    return bit_widths
                bits = chosen[layer.name]
                fewer = max((width for width in space.widths if width < getattr(bits, kind)), default=space.widths[0])
                chosen[layer.name] = bits._replace(**{kind: fewer})


class EpisodeRewardBuffer(ReplayBuffer):
    """Gives every transition of an episode the reward of its end, less a moving baseline, as HAQ does."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._first = 0
        self._baseline: torch.Tensor | None = None

    def add(
        self,
        obs: np.ndarray,
        next_obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """Store a transition; the last of an episode sets the reward of all."""
        position = self.pos
        super().add(obs, next_obs, action, reward, done, infos)
        if done[0]:
            length = (position - self._first) % self.buffer_size + 1
            self.rewards[(self._first + np.arange(length)) % self.buffer_size] = reward
            self._first = self.pos

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> ReplayBufferSamples:
        samples = super()._get_samples(batch_inds, env)
        mean = samples.rewards.mean()
        self._baseline = mean if self._baseline is None else self._baseline + BASELINE_RATE * (mean - self._baseline)
        return samples._replace(rewards=samples.rewards - self._baseline)


class HaqDdpg(DDPG):
    """DDPG with a rate of its own for actor and critic, and noise from a normal distribution cut at the actions' bounds."""

    def _update_learning_rate(self, optimizers: list[torch.optim.Optimizer] | torch.optim.Optimizer) -> None:
        assert isinstance(optimizers, list)  # of DDPG
        for optimizer, rate in zip(optimizers, (ACTOR_RATE, CRITIC_RATE), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        if self.num_timesteps < learning_starts:
            return super()._sample_action(learning_starts, None, n_envs)
        assert isinstance(self._last_obs, np.ndarray) and self.env is not None  # while it learns
        mean, _ = self.predict(self._last_obs, deterministic=True)
        episodes = self.num_timesteps // self.env.get_attr("horizon")[0] - WARM_UP_EPISODES
        spread = 2 * NOISE * NOISE_DECAY**episodes  # HAQ's actions are half as wide as these
        action = truncnorm.rvs((-1 - mean) / spread, (1 - mean) / spread, mean, spread, size=mean.shape).astype(np.float32)
        return action, action


def haq_hyperparameters(horizon: int) -> dict:
    """HAQ's published hyperparameters, as keyword arguments of :class:`HaqDdpg`.

    :param horizon: steps of an episode of :class:`HaqEnv`
    """
    return {
        "buffer_size": 128 * horizon,
        "learning_starts": warm_up_steps(WARM_UP_EPISODES, horizon),
        "batch_size": 64,
        "tau": 0.01,
        "gamma": 1.0,
        "train_freq": (1, "episode"),
        "gradient_steps": -1,
        "policy_kwargs": {"net_arch": [300, 300]},
    }


#: What else decides the reconstructed search, for its ``config.json``.
CONSTANTS = {
    "warm_up_episodes": WARM_UP_EPISODES,
    "actor_rate": ACTOR_RATE,
    "critic_rate": CRITIC_RATE,
    "noise": NOISE,
    "noise_decay": NOISE_DECAY,
    "baseline_rate": BASELINE_RATE,
    "reward_samples": REWARD_SAMPLES,
}


def build_haq_agent(space: SearchSpace, *, seed: int, device: str) -> HaqDdpg:
    """HAQ's agent in its own decision process, :class:`HaqEnv`."""
    env = HaqEnv(space)
    settings = haq_hyperparameters(env.horizon)
    return HaqDdpg("MlpPolicy", Monitor(env), replay_buffer_class=EpisodeRewardBuffer, seed=seed, device=device, **settings)
