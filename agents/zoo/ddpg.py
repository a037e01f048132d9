"""rl_zoo3's hyperparameters for DDPG."""

from agents.zoo import configuration

hyperparams = configuration("ddpg")
