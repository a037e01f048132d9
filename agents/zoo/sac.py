"""rl_zoo3's hyperparameters for SAC."""

from . import configuration

hyperparams = configuration("sac")
