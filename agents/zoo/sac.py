"""rl_zoo3's hyperparameters for SAC."""

from agents.zoo import configuration

hyperparams = configuration("sac")
