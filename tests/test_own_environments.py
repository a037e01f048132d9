"""The environment checks over own networks of different kinds, labelled by themselves so that nothing has to be trained."""

import pickle
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from torch import nn

from arq_env.datasets import Dataset, Split
from arq_env.datasets.augment import to_float
from arq_env.env import ArqEnv
from arq_env.evaluation import CertifierSettings
from arq_env.problem import Problem
from arq_env.support.torchvision_import import import_torchvision
from tests.own import Separable

EDGE = 32


class Decoder(nn.Module):
    """Dilated and transposed convolutions, and one module used twice."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=2, dilation=2)
        self.twice = nn.Conv2d(8, 8, 3, padding="same", padding_mode="reflect")
        self.up = nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, images):
        x = torch.relu(self.twice(torch.relu(self.twice(torch.relu(self.down(images))))))
        return self.head(torch.relu(self.up(x)).mean((2, 3)))


class Attention(nn.Module):
    """Patches, one block of attention with projections of its own, and an MLP: a small vision transformer."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.heads, self.patches = heads, nn.Conv2d(3, width, 8, 8)
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.mlp1, self.mlp2 = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 10)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.mlp2(nn.functional.gelu(self.mlp1(self.norm2(x))))
        return self.head(x.mean(1))


def resnet():
    """Bottlenecks with projection shortcuts: torchvision's, thin."""
    models = import_torchvision().models
    return models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=10, width_per_group=4)


def densenet():
    models = import_torchvision().models
    return models.DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=10)


def mobilenet():
    return import_torchvision().models.mobilenet_v2(num_classes=10, width_mult=0.1)


#: Name to function and channels.
NETWORKS = {
    "resnet": (resnet, 3),
    "densenet": (densenet, 3),
    "mobilenet": (mobilenet, 3),
    "separable": (partial(Separable, 10), 1),
    "decoder": (Decoder, 3),
    "transformer": (Attention, 3),
}
#: Those that take seconds.
LARGE = ("resnet", "mobilenet")


#: The products of attention stay at 32 x 32 bits.
BUDGETS = {"transformer": 0.2}


def problem_of(name) -> Problem:
    make, channels = NETWORKS[name]
    torch.manual_seed(0)
    network = make().eval()
    with torch.no_grad():
        *_, head = network.parameters()
        head.normal_()  # so that there are several classes
    load = partial(labelled, network, channels)
    return Problem(network, load, sigma=0.02, keep=(".",) if name == "transformer" else ())  # the products of attention


@torch.inference_mode()
def labelled(network, channels) -> Dataset:
    """Random images, each with the class that the network says."""
    rng, parts = np.random.default_rng(0), []
    for n in (24, 16, 8):
        images = rng.integers(0, 256, (n, EDGE, EDGE, channels), np.uint8)
        parts.append(Split(images, network(to_float(torch.from_numpy(images))).argmax(1).numpy()))
    return Dataset("labelled", tuple("0123456789"), True, *parts)


def env_of(name) -> ArqEnv:
    return ArqEnv(
        problem_of(name),
        budget=BUDGETS.get(name, 0.1),
        settings=CertifierSettings(images=16, calibration_images=16),
        render_mode="ansi",
    )


def play(env, seed=0):
    rng = np.random.default_rng(seed)
    observation, _ = env.reset(seed=seed)
    done, steps = False, 0
    while not done:
        assert observation in env.observation_space
        observation, reward, done, truncated, info = env.step(rng.uniform(-1, 1, 2).astype(np.float32))
        steps += 1
        assert not truncated and (done or reward == 0)
    assert steps == env.unwrapped.horizon and observation in env.observation_space
    return reward, info


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE)) for name in NETWORKS])
def test_checks_of_environments_over_six_networks(name):
    env = env_of(name)
    gymnasium_check_env(env, skip_render_check=True)  # which needs a spec
    sb3_check_env(env)
    reward, info = play(env)
    assert np.isfinite(reward) and info["bops_fraction"] <= BUDGETS.get(name, 0.1) and info["reference_acr"] > 0
    assert list(info["bit_widths"]) == [layer.name for layer in env.layers]
    for layer in env.layers:  # the same tensor has the same bits, whoever reads it
        assert layer.tied_to is None or info["bit_widths"][layer.name][1] == info["bit_widths"][layer.tied_to][1]
    again, _ = play(pickle.loads(pickle.dumps(env)))
    assert again == reward
    other, _ = play(gymnasium.wrappers.TimeLimit(env_of(name), 10_000))
    assert other == reward and play(env, seed=1)[1]["bops_fraction"] <= BUDGETS.get(name, 0.1)
    assert all(layer.name in env.render() for layer in env.layers)


def test_projection_shortcuts_share_activation_bits_and_the_others_have_none():
    tied = {name: sum(layer.tied_to is not None for layer in problem_of(name).layers) for name in NETWORKS}
    assert tied["resnet"] == 4 and tied["mobilenet"] == tied["separable"] == tied["decoder"] == tied["transformer"] == 0
