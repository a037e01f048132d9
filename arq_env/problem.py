"""What is being quantized: a network, its layers, its data and its noise level."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from arq_env.bitwidths import BitWidthMap, load_map
from arq_env.datasets import Dataset, Split, load_dataset
from arq_env.datasets.augment import random_crop, to_float
from arq_env.errors import ArqError
from arq_env.layers import Layer, find_layers
from arq_env.networks.checkpoints import Checkpoint, load_checkpoint

CALIBRATION_IMAGES = 1_280


@dataclass
class Problem:
    """A base classifier trained under noise, with the data to calibrate, to reward and to certify it.

    :param network: in evaluation mode; images [n, c, h, w] in [0, 1] to logits (normalisation inside)
    :param load: returns the data set; called at the first use of an image, so that building a problem downloads nothing
    :param sigma: standard deviation of the smoothing noise, in units of pixels in [0, 1]
    :param input_shape: of one image, [c, h, w]
    :param card: what the network is and where it comes from, for the files that results are written to
    """

    network: torch.nn.Module
    load: Callable[[], Dataset]
    sigma: float
    input_shape: tuple[int, int, int] = (3, 32, 32)
    card: dict = field(default_factory=dict)

    def __post_init__(self):
        if not (np.isfinite(self.sigma) and self.sigma > 0):
            raise ArqError(f"sigma is {self.sigma}: give a positive standard deviation, in units of pixels in [0, 1]")
        if self.network.training:
            raise ArqError(
                "the network is in training mode, in which its output depends on the rest of the batch: call eval() first"
            )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the network's layers and weights: what an evaluation kept in a file belongs to."""
        digest = hashlib.sha256(repr(self.layers).encode())
        for name, tensor in self.network.state_dict().items():
            digest.update(name.encode() + np.ascontiguousarray(tensor.detach().cpu().numpy()).tobytes())
        return digest.hexdigest()

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The layers to quantize, in order of use."""
        return find_layers(self.network, self.input_shape)

    @cached_property
    def dataset(self) -> Dataset:
        """The data set, loaded at first use."""
        return self.load()

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        return next(self.network.parameters()).device

    def calibration_images(self, seed: int = 0) -> torch.Tensor:
        """1,280 training images, cropped and flipped as in training, with noise: float32 [n, c, h, w] on the device.

        The augmentation matters: BatchNorm's statistics on images without the border of random crops cost two points of accuracy.
        """
        generator = torch.Generator().manual_seed(seed)
        images = self.dataset.train.images
        chosen = torch.randperm(len(images), generator=generator)[:CALIBRATION_IMAGES]
        cropped = random_crop(torch.as_tensor(images[chosen.numpy()]), generator, flip=self.dataset.flip)
        noisy = to_float(cropped)
        noisy += self.sigma * torch.randn(noisy.shape, generator=generator)
        return noisy.to(self.device)

    def reward_images(self, count: int, first: int = 0) -> tuple[torch.Tensor, np.ndarray]:
        """``count`` images of the reward split from index ``first``: float32 [n, c, h, w] in [0, 1], and labels [n]."""
        there = len(self.dataset.reward.images)
        if not 1 <= count <= there - first:
            raise ArqError(f"{count} reward images from index {first} were asked for: there are {there}")
        return _as_pixels(self.dataset.reward, slice(first, first + count))

    def test_images(self, every: int = 20, offset: int = 0) -> tuple[torch.Tensor, np.ndarray]:
        """Every ``every``-th test image from index ``offset``, for final certificates only."""
        there = len(self.dataset.test.images)
        if not 0 <= offset < there:
            raise ArqError(f"test images from index {offset} were asked for: there are {there}")
        return _as_pixels(self.dataset.test, slice(offset, None, every))


def _as_pixels(split: Split, chosen: slice) -> tuple[torch.Tensor, np.ndarray]:
    return to_float(torch.as_tensor(split.images[chosen])), split.labels[chosen]


def load_problem(network: str, dataset: str, *, sigma: float = 0.5, training: str = "gaussian", device: str = "cpu") -> Problem:
    """The problem of a shipped checkpoint.

    :raises ArqError: for sigma out of range, when there is no such checkpoint, or it is damaged, or there is no such device
    """
    if not (isinstance(sigma, (int, float)) and np.isfinite(sigma) and sigma > 0):
        raise ArqError(f"sigma is {sigma!r}: give a positive standard deviation, in units of pixels in [0, 1]")
    module, card = load_checkpoint(Checkpoint(network, dataset, float(sigma), training))
    check_device(device)
    return Problem(module.to(device), lambda: load_dataset(dataset), float(sigma), card=card)


def load_mapped(path: Path, device: str = "cpu") -> tuple[Problem, BitWidthMap, dict, Path]:
    """A map's file and the problem it is for.

    :param path: a run folder of a search, or a bit_widths.json, found or edited by hand
    :return: problem, map, the file's ``provenance``, and the file
    :raises ArqError: when it cannot be read, or was found for other weights than the shipped ones
    """
    path = path / "bit_widths.json" if path.is_dir() else path
    try:
        header = json.loads(path.read_text())
        names = header["network"], header["dataset"]
        made_with = header.get("provenance", {})
        training, sigma = made_with.get("training", "gaussian"), header["sigma"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArqError(
            f"{path} cannot be read as a bit-width map ({error}): give a run folder or a bit_widths.json, or, where uniform bits "
            "will do, FP32 or W4A4"
        ) from error
    problem = load_problem(*names, sigma=sigma, training=training, device=device)
    if made_with.get("checkpoint", problem.card["digest"]) != problem.card["digest"]:
        raise ArqError(
            f"{path} was found for other weights than the checkpoint that is here: search again, or restore that checkpoint"
        )
    return problem, load_map(path, problem.layers)[0], made_with, path


def check_device(device: str) -> None:
    """Raise an ArqError unless torch can put a tensor there."""
    try:
        torch.zeros(1, device=device).cpu()  # which fails on a device without memory
    except (RuntimeError, AssertionError) as error:
        raise ArqError(f"the device {device!r} cannot be used ({str(error).splitlines()[0]}): choose cpu or cuda") from error
