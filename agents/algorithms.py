"""stable-baselines3's DDPG, TD3 and SAC, with hyperparameters for a short horizon and one terminal reward."""

from typing import Any

import gymnasium
import numpy as np
from stable_baselines3 import DDPG, SAC, TD3
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from arq_env.env import arq_env_of
from arq_env.support.errors import ArqError

from .haq import build_haq_agent, warm_up_steps
from .methods import AGENTS

ALGORITHMS: dict[str, type[OffPolicyAlgorithm]] = {"ddpg": DDPG, "td3": TD3, "sac": SAC}

#: Episodes of uniformly random actions before the first gradient step.
WARM_UP_EPISODES = 20
#: By which exploration noise shrinks, an episode.
NOISE_DECAY = 0.98


class DecayingNoise(ActionNoise):
    """Gaussian exploration noise after the warm-up, shrinking by a factor an episode.

    During the warm-up it is zero, since SB3 adds it to the uniformly random actions too, which would push a fifth of them to
    the bounds. SB3 calls :meth:`reset` once before the first episode and at the end of each. Draws come from NumPy's
    global generator, which SB3 seeds.

    :param size: number of actions
    :param std: standard deviation in the first episodes
    :param decay: factor an episode
    :param least: standard deviation that is never undercut
    :param warm_up: episodes of it
    """

    def __init__(
        self, size: int, std: float = 0.5, decay: float = NOISE_DECAY, least: float = 0.05, warm_up: int = WARM_UP_EPISODES
    ):
        super().__init__()
        self.size, self.std, self.decay, self.least, self.warm_up = size, std, decay, least, warm_up
        self.episodes = -1

    def __call__(self) -> np.ndarray:
        if self.episodes < self.warm_up:
            return np.zeros(self.size, np.float32)
        std = self.std * self.decay ** (self.episodes - self.warm_up)
        return np.random.normal(0.0, max(std, self.least), self.size).astype(np.float32)

    def reset(self) -> None:
        """Count an episode."""
        self.episodes += 1


def hyperparameters(
    name: str, horizon: int, warm_up: int = WARM_UP_EPISODES, noise_decay: float = NOISE_DECAY, **changes: Any
) -> dict:
    """Keyword arguments for the algorithm.

    With ``gamma = 1`` and n-step returns over the whole episode, every sampled transition is learned from the certifier's
    reward itself and not from a bootstrapped guess at it; an episode is followed by as many gradient steps as it had steps.
    ``n_steps`` makes SB3 choose its n-step buffer, with the algorithm's own ``gamma``.

    :param horizon: steps of an episode
    :param warm_up: episodes of random actions before the first gradient step
    :param noise_decay: as ``decay`` of :class:`DecayingNoise`; not of "sac", whose own policy is random
    :param changes: keyword arguments of the algorithm in place of those here
    """
    common: dict[str, Any] = {
        "learning_rate": 1e-3,
        "buffer_size": 2_000 * horizon,
        "learning_starts": warm_up_steps(warm_up, horizon),
        "batch_size": 64,
        "tau": 0.01,
        "gamma": 1.0,
        "n_steps": horizon,
        "train_freq": (1, "episode"),
        "gradient_steps": -1,
        "policy_kwargs": {"net_arch": [300, 300]},
    }
    if name == "sac":
        return common | {"ent_coef": "auto_0.1", "target_entropy": -2.0} | changes
    return common | {"action_noise": DecayingNoise(2, decay=noise_decay, warm_up=warm_up)} | changes


def build_agent(name: str, env: gymnasium.Env, *, seed: int, device: str, **changes: Any) -> OffPolicyAlgorithm:
    """An untrained agent for ``env``.

    :param env: an :class:`arq_env.env.ArqEnv`, wrapped or not
    :param changes: as for :func:`hyperparameters` (not of "arq")
    :raises ArqError: for an unknown algorithm
    """
    if name == "arq":
        return build_haq_agent(arq_env_of(env), seed=seed, device=device)
    if name not in ALGORITHMS:
        raise ArqError(f"there is no algorithm {name!r}: choose one of {', '.join(AGENTS)}")
    settings = hyperparameters(name, arq_env_of(env).horizon, **changes)
    return ALGORITHMS[name]("MlpPolicy", Monitor(env), seed=seed, device=device, **settings)
