"""The table of environments: id to network and data set."""

from typing import Any

import gymnasium

ENVIRONMENTS: dict[str, dict[str, Any]] = {
    "ARQ-ResNet20-v0": {"network": "resnet20", "dataset": "cifar10"},
    "ARQ-ResNet20-Signs-v0": {"network": "resnet20", "dataset": "signs", "images": 768},
}

#: Steps of an episode, network by network: its layers but the first and the last.
HORIZONS = {"resnet20": 18}


def register_all() -> None:
    """Register every id that is not registered yet. The entry point is a string, so that torch stays unimported."""
    for name, kwargs in ENVIRONMENTS.items():
        if name not in gymnasium.registry:
            gymnasium.register(name, entry_point="arq_env.env:make_env", kwargs=kwargs)
