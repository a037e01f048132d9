"""rl_zoo3's hyperparameters for DDPG."""

from . import configuration

hyperparams = configuration("ddpg")
