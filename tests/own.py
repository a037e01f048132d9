"""A small grouped-and-depthwise network and a folder of images that it has learned, as a user's own module would define them."""

import atexit
import functools
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from arq_env.datasets import Dataset, Split, load_dataset
from arq_env.networks.recipe import Recipe
from arq_env.networks.training import train
from arq_env.registration import ENVIRONMENTS
from arq_env.support.imports import call_imported

EDGE = 12
CLASSES = ("bars", "disc", "frame")


class Separable(nn.Module):
    """A grouped convolution, a depthwise one, a pointwise one and a linear layer, for images [n, 1, h, w] in [0, 1]."""

    def __init__(self, classes: int = 3, width: int = 8):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.grouped = nn.Conv2d(width, width, 3, stride=2, padding=1, groups=2)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.pointwise = nn.Conv2d(width, 2 * width, 1)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, images):
        x = torch.relu(self.norm(self.stem(images)))
        x = torch.relu(self.depthwise(torch.relu(self.grouped(x))))
        return self.head(torch.relu(self.pointwise(x)).amax((2, 3)))


def make_net(width: int = 8) -> nn.Module:
    """Untrained: it wants a checkpoint."""
    return Separable(len(CLASSES), width)


def write_images(root: Path, counts: dict[str, int], seed: int = 0, mode: str = "L") -> str:
    """Images of three shapes, grey by default, in ``root/PART/CLASS/``: learnable, in random place, light and clutter."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:EDGE, :EDGE]
    for part, count in counts.items():
        for name in CLASSES:
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                u, v = x - rng.uniform(4, 7), y - rng.uniform(4, 7)
                shape = {
                    "bars": np.abs(v) % 4 < 1.5,
                    "disc": u * u + v * v < 12,
                    "frame": (np.maximum(np.abs(u), np.abs(v)) < 4.5) & (np.maximum(np.abs(u), np.abs(v)) > 2.5),
                }[name]
                pixels = 255 * np.clip(rng.uniform(0, 0.2) + 0.8 * shape + rng.normal(0, 0.05, shape.shape), 0, 1)
                Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(root / part / name / f"{i:04}.png")
    return str(root)


@functools.cache
def trained_state() -> dict:
    """Weights of a Separable trained under noise of sigma 0.25 for some seconds."""
    torch.manual_seed(0)
    network = make_net()
    with tempfile.TemporaryDirectory() as folder:
        data = load_dataset(write_images(Path(folder) / "data", {"train": 200, "test": 4}, seed=1), reward_images=60)
        train(network, data, Recipe(sigma=0.25, epochs=8, batch=30, peak_rate=0.1), Path(folder))
    return network.state_dict()


#: Small versions of the networks of ids that need a checkpoint and data: what gym.make takes beside the id.
SMALL = {
    "ARQ-MobileNetV2-CIFAR10-v0": {"data": "tests.own:small_data", "network": "arq_env.networks.mobilenet:mobilenetv2"},
    "ARQ-ResNet50-v0": {"network_arguments": {"num_classes": 3, "width_per_group": 4}},
    "ARQ-MobileNetV2-v0": {"network_arguments": {"num_classes": 3, "width_mult": 0.1}},
    "ARQ-Custom-v0": {"network": "tests.own:make_net"},
}


@functools.cache
def small_data() -> Dataset:
    """Ten classes of 32x32 images in which there is nothing to learn."""
    rng = np.random.default_rng(0)
    parts = (Split(rng.integers(0, 256, (n, 32, 32, 3), np.uint8), np.arange(n) % 10) for n in (40, 20, 20))
    return Dataset("small", tuple("0123456789"), True, *parts)


@functools.cache
def _folder() -> Path:
    """Kept until the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="arq-tests-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@functools.cache
def arguments_of(name: str) -> dict:
    """What ``gym.make`` needs beside the id: nothing for a shipped network, else data, and weights nobody has trained."""
    if name not in SMALL:
        return {}
    arguments = {**ENVIRONMENTS[name], **SMALL[name]}
    if "data" not in SMALL[name]:
        mode = "L" if name == "ARQ-Custom-v0" else "RGB"
        arguments["data"] = write_images(_folder() / name, {"train": 40, "test": 4}, mode=mode)
    if "image_size" in arguments:
        arguments["image_size"] = 32
    torch_state = torch.random.get_rng_state()
    network = call_imported(arguments["network"], arguments.get("network_arguments"))
    if name == "ARQ-Custom-v0":
        network.load_state_dict(trained_state())
        arguments |= {"sigma": 0.25, "images": 12, "budget": 0.1}
    torch.random.set_rng_state(torch_state)
    torch.save(network.state_dict(), _folder() / f"{name}.pth")
    return arguments | {"checkpoint": str(_folder() / f"{name}.pth")}
