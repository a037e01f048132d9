"""A network and a data set so small that everything runs in a second; registered as ``ARQ-Toy-v0`` by conftest."""

import functools

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from arq_agents.algorithms import WARM_UP_EPISODES
from arq_agents.search import search
from arq_agents.trace import Episode, read_trace
from arq_env.bitwidths import Bits
from arq_env.datasets import Dataset, Split
from arq_env.env import ArqEnv
from arq_env.evaluation import CertifierSettings
from arq_env.layers import find_layers
from arq_env.networks.training import Recipe, train
from arq_env.problem import Problem
from arq_env.quantization import Quantizer

SHAPE = (3, 8, 8)
#: Of a search by default: some more than an agent plays at random.
EPISODES = WARM_UP_EPISODES + 6


class ToyNet(nn.Module):
    """Four layers to quantize, with a BatchNorm and a shortcut."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.deep = nn.Conv2d(8, 8, 1, bias=False)
        self.last = nn.Linear(8, 3)

    def forward(self, images):
        x = torch.relu(self.norm(self.first(images - 0.5)))
        x = x + torch.relu(self.deep(torch.relu(self.middle(x))))
        return self.last(x.mean((2, 3)))


class DepthwiseNet(nn.Module):
    """Depthwise and pointwise convolutions, and activations with a small negative part (SiLU)."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.pointwise = nn.Conv2d(8, 16, 1)
        self.last = nn.Linear(16, 3)

    def forward(self, images):
        x = functional.silu(self.norm(self.stem(images - 0.5)))
        x = functional.relu6(self.norm2(self.depthwise(x)))
        return self.last(functional.silu(self.pointwise(x)).mean((2, 3)))


@functools.cache
def depthwise_network() -> DepthwiseNet:
    """With random weights and plausible statistics, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = DepthwiseNet()
        network.train()(torch.rand(64, *SHAPE))
    return network.eval()


def quantized_depthwise(bits: tuple[int, ...] = (2, 3, 4, 8), activation_bits: tuple[int, ...] = (8, 2, 5, 4)) -> nn.Module:
    """The same with a layer each of so many weight and activation bits."""
    layers = find_layers(depthwise_network(), SHAPE)
    bit_widths = {layer.name: Bits(*pair) for layer, *pair in zip(layers, bits, activation_bits, strict=True)}
    images = torch.rand(64, *SHAPE, generator=torch.Generator().manual_seed(0))
    return Quantizer(depthwise_network(), layers, images).quantize(bit_widths)


@functools.cache
def toy_dataset() -> Dataset:
    """Three classes, each a colour, with pixel noise."""
    rng = np.random.default_rng(0)
    colours = np.array([[145, 110, 110], [110, 145, 110], [110, 110, 145]])

    def split(n):
        labels = rng.integers(0, 3, n)
        images = colours[labels][:, None, None, :] + rng.integers(-50, 51, (n, 8, 8, 3))
        return Split(images.astype(np.uint8), labels.astype(np.int64))

    return Dataset("toy", ("red", "green", "blue"), True, split(1_300), split(64), split(40))


@functools.cache
def trained_state() -> dict:
    """Weights of a ToyNet trained under noise of sigma 0.5 for two seconds."""
    import tempfile

    torch.manual_seed(0)
    network = ToyNet()
    with tempfile.TemporaryDirectory() as folder:
        train(network, toy_dataset(), Recipe(epochs=4, batch=50, peak_rate=0.1), folder)
    return network.state_dict()


def toy_network() -> ToyNet:
    """A trained ToyNet, in evaluation mode."""
    network = ToyNet()
    network.load_state_dict(trained_state())
    return network.eval()


def toy_problem(**changes) -> Problem:
    """The toy network on the toy data, at sigma 0.5."""
    card = {"network": "toy", "dataset": "toy", "digest": "0" * 64}
    return Problem(**{"network": toy_network(), "load": toy_dataset, "sigma": 0.5, "input_shape": SHAPE, "card": card} | changes)


def make_toy_env(budget: float = 0.03, fix=None, bits=None, render_mode=None, problem=None, **settings) -> ArqEnv:
    """The entry point of ``ARQ-Toy-v0``."""
    settings = CertifierSettings(**{"images": 32, "n0": 4, "n": 16} | settings)
    return ArqEnv(problem or toy_problem(fix=fix, bits=bits), budget=budget, settings=settings, render_mode=render_mode)


def search_toy(folder, algorithm="td3", episodes=EPISODES, env=None, **changes) -> Episode:
    """A whole search on the toy problem."""
    return search(algorithm, env or make_toy_env(), episodes=episodes, folder=folder, progress=False, **changes)


def outcome(folder) -> list[tuple]:
    """What a search found, without the times it took."""
    return [(e.episode, e.reward, e.bit_widths, e.evaluations) for e in read_trace(folder / "trace.jsonl")]
