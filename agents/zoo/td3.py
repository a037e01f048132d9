"""rl_zoo3's hyperparameters for TD3."""

from agents.zoo import configuration

hyperparams = configuration("td3")
