"""The agents' hyperparameters in rl_zoo3's format, a module an algorithm: ``--conf-file agents.zoo.td3``."""

from agents.algorithms import hyperparameters
from agents.methods import EPISODES
from arq_env.registration import ENVIRONMENTS, HORIZONS


def configuration(algorithm: str) -> dict:
    """Environment id to keyword arguments, as rl_zoo3 reads them: plain data, nothing in it shared by two models."""
    return {name: _settings(algorithm, HORIZONS[kwargs["network"]]) for name, kwargs in ENVIRONMENTS.items()}


def _settings(algorithm: str, horizon: int) -> dict:
    settings = {"policy": "MlpPolicy", "n_timesteps": EPISODES * horizon, **hyperparameters(algorithm, horizon)}
    if settings.pop("action_noise", None) is not None:
        settings["callback"] = "agents.callbacks.ExplorationNoise"  # a noise for each model
    return settings
