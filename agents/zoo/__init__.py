"""The agents' hyperparameters in rl_zoo3's format, a module an algorithm: ``--conf-file arq_agents.zoo.td3``."""

from arq_env.registration import HORIZONS

from ..algorithms import hyperparameters
from ..methods import EPISODES


def configuration(algorithm: str) -> dict:
    """Environment id to keyword arguments, as rl_zoo3 reads them: plain data, nothing in it shared by two models."""
    return {name: _settings(algorithm, horizon) for name, horizon in HORIZONS.items()}


def _settings(algorithm: str, horizon: int) -> dict:
    settings = {"policy": "MlpPolicy", "n_timesteps": EPISODES * horizon, **hyperparameters(algorithm, horizon)}
    if settings.pop("action_noise", None) is not None:
        settings["callback"] = "arq_agents.callbacks.ExplorationNoise"  # a noise for each model
    return settings
