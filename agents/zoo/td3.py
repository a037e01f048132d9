"""rl_zoo3's hyperparameters for TD3."""

from . import configuration

hyperparams = configuration("td3")
