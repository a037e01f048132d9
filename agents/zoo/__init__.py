"""The agents' hyperparameters in rl_zoo3's format, a module an algorithm: ``--conf-file agents.zoo.td3``."""

from agents.algorithms import EPISODES, hyperparameters
from arq_env.registration import ENVIRONMENTS

#: Steps of an episode of ResNet-20.
HORIZON = 18


def configuration(algorithm: str) -> dict:
    """Environment id to keyword arguments, as rl_zoo3 reads them."""
    settings = {"policy": "MlpPolicy", "n_timesteps": EPISODES * HORIZON, **hyperparameters(algorithm, HORIZON)}
    return {name: dict(settings) for name in ENVIRONMENTS}
