"""The table of environments: id to network and data set."""

from typing import Any

import gymnasium

IMAGENET = {"data": "imagenet", "image_size": 224, "flip": True}
ENVIRONMENTS: dict[str, dict[str, Any]] = {
    "ARQ-ResNet20-v0": {"network": "resnet20", "data": "cifar10"},
    "ARQ-ResNet20-Signs-v0": {"network": "resnet20", "data": "signs", "images": 768},
    "ARQ-MobileNetV2-CIFAR10-v0": {"network": "mobilenetv2", "data": "cifar10"},
    "ARQ-ResNet50-v0": {"network": "torchvision.models:resnet50", **IMAGENET},
    "ARQ-MobileNetV2-v0": {"network": "torchvision.models:mobilenet_v2", **IMAGENET},
    "ARQ-Custom-v0": {},
}

#: What scripts take by default, and the id of networks of one's own.
DEFAULT, CUSTOM = "ARQ-ResNet20-v0", "ARQ-Custom-v0"

#: Steps of an episode: the network's layers but the first and the last. Of a network of one's own more than it has as a rule, since
#: n-step returns end with the episode.
HORIZONS = {
    "ARQ-ResNet20-v0": 18,
    "ARQ-ResNet20-Signs-v0": 18,
    "ARQ-MobileNetV2-CIFAR10-v0": 51,
    "ARQ-ResNet50-v0": 52,
    "ARQ-MobileNetV2-v0": 51,
    "ARQ-Custom-v0": 64,
}

#: Maps that scripts try by default where it is not as many as elsewhere: on the embedded data, for a first result within minutes.
EPISODES = {"ARQ-ResNet20-Signs-v0": 60}


def register_all() -> None:
    """Register every id that is not registered yet. The entry point is a string, so that torch stays unimported."""
    for name, kwargs in ENVIRONMENTS.items():
        if name not in gymnasium.registry:
            gymnasium.register(name, entry_point="arq_env.env:make_env", kwargs=kwargs)
