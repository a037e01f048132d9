"""What is being quantized: a network, its layers, its data and its noise level."""

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from arq_env.bitwidths import MIN_BITS, BitWidthMap, bops_fraction, load_map
from arq_env.budget import make_budget
from arq_env.certification import network_digest
from arq_env.datasets import Dataset, Split, load_dataset
from arq_env.datasets.augment import add_noise, as_tensor, random_crop, to_float
from arq_env.layers import Layers, find_layers
from arq_env.networks.checkpoints import Checkpoint, load_checkpoint
from arq_env.quantization.convert import check_conversion
from arq_env.support.errors import ArqError, reason
from arq_env.support.files import read_json, sha256

#: Training images that ranges of activations and BatchNorm's statistics are estimated on; more of them rank maps no better.
CALIBRATION_IMAGES = 320


@dataclass
class Problem:
    """A base classifier trained under noise, with the data to calibrate, to reward and to certify it.

    :param network: in evaluation mode; images [n, c, h, w] in [0, 1] to logits (normalisation inside)
    :param load: returns the data set; called at the first use of an image, so that building a problem downloads nothing
    :param sigma: standard deviation of the smoothing noise, in units of pixels in [0, 1]
    :param input_shape: of one image, [c, h, w]
    :param keep: what may stay at full precision, as for :func:`arq_env.layers.find_layers`
    :param card: what the network is and where it comes from, for the files that results are written to
    """

    network: torch.nn.Module
    load: Callable[[], Dataset]
    sigma: float
    input_shape: tuple[int, int, int] = (3, 32, 32)
    keep: tuple[str, ...] = ()
    card: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (np.isfinite(self.sigma) and self.sigma > 0):
            raise ArqError(f"sigma is {self.sigma}: give a positive standard deviation, in units of pixels in [0, 1]")
        if any(module.training for module in self.network.modules()):
            raise ArqError(
                "the network is in training mode, in which its output depends on the rest of the batch: call eval() first"
            )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what the network computes with: what an evaluation kept in a file belongs to."""
        known = self.card.get("digest", "")
        return sha256((repr(self.layers) + repr(self.layers.kept) + network_digest(self.network, known)).encode())

    @cached_property
    def layers(self) -> Layers:
        """The layers to quantize, in order of use.

        :raises ArqError: when the network is not understood, see :func:`arq_env.layers.find_layers` and
            :func:`arq_env.quantization.convert.check_conversion`
        """
        layers = find_layers(self.network, self.input_shape, self.keep)
        noise = torch.rand(2, *self.input_shape, generator=torch.Generator().manual_seed(0))
        check_conversion(self.network, layers, noise.to(self.device))
        return layers

    @cached_property
    def dataset(self) -> Dataset:
        """The data set, loaded at first use.

        :raises ArqError: when its images are not of the input shape, for which costs and features are
        """
        dataset = self.load()
        if not isinstance(dataset, Dataset):
            raise ArqError(f"load() gave {type(dataset).__name__!r}: let it return an arq_env.datasets.Dataset")
        height, width, channels = dataset.train.images.shape[1:]
        if (channels, height, width) != tuple(self.input_shape):
            raise ArqError(
                f"the input shape is {tuple(self.input_shape)} and the images are {(channels, height, width)}: give "
                f"input_shape={(channels, height, width)}, since what a layer costs depends on it"
            )
        return dataset

    @property
    def data_digest(self) -> str:
        """SHA-256 of all images and labels."""
        return self.dataset.digest

    def __getstate__(self) -> dict:
        """Without the data, which a copy in another process loads itself."""
        return {name: value for name, value in vars(self).items() if name != "dataset"}

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        return next(chain(self.network.parameters(), self.network.buffers()), torch.empty(0)).device

    def calibration_images(self, seed: int = 0, count: int = CALIBRATION_IMAGES) -> torch.Tensor:
        """Training images, cropped and flipped as in training, with noise: float32 [count, c, h, w] on the device.

        The augmentation matters: BatchNorm's statistics on images without the border of random crops cost two points of accuracy.
        Where there are fewer training images, all of them.
        """
        generator = torch.Generator().manual_seed(seed)
        images = self.dataset.train.images
        chosen = torch.randperm(len(images), generator=generator)[:count]
        cropped = random_crop(as_tensor(images[chosen.numpy()]), generator, flip=self.dataset.flip)
        return add_noise(to_float(cropped), self.sigma, np.random.Generator(np.random.SFC64(seed))).to(self.device)

    def training_images(self, count: int, seed: int) -> tuple[torch.Tensor, np.ndarray]:
        """``count`` training images drawn by ``seed``, as they are: float32 [n, c, h, w] in [0, 1], and labels [n]."""
        chosen = np.random.default_rng(seed).permutation(len(self.dataset.train.images))[:count]
        return _as_pixels(self.dataset.train, np.sort(chosen))

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


def _as_pixels(split: Split, chosen: slice | np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    return to_float(as_tensor(split.images[chosen])), split.labels[chosen]


def load_problem(network: str, dataset: str, *, sigma: float = 0.5, training: str = "gaussian", device: str = "cpu") -> Problem:
    """The problem of a shipped checkpoint.

    :raises ArqError: for sigma out of range, when there is no such checkpoint, or it is damaged, or there is no such device
    """
    if isinstance(sigma, bool) or not isinstance(sigma, (int, float)) or not 0 < sigma <= sys.float_info.max:
        raise ArqError(f"sigma is {sigma!r}: give a positive standard deviation, in units of pixels in [0, 1]")
    module, card = load_checkpoint(Checkpoint(network, dataset, float(sigma), training))
    check_device(device)
    return Problem(module.to(device), partial(load_dataset, dataset), float(sigma), card=card)


def load_mapped(path: Path, device: str = "cpu") -> tuple[Problem, BitWidthMap, dict, Path]:
    """A map's file and the problem it is for; warns when it costs more than the budget that the file states.

    :param path: a run folder of a search, or a bit_widths.json, found or edited by hand
    :return: problem, map, the file's other entries, and the file
    :raises ArqError: when it cannot be read, is for a network of one's own, or was found for other weights than the shipped ones
    """
    path = path / "bit_widths.json" if path.is_dir() else path
    try:
        header = read_json(path)
        names = header["network"], header["dataset"]
        made_with = header.get("provenance", {})
        training, sigma, digest = made_with.get("training", "gaussian"), header["sigma"], made_with.get("checkpoint")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArqError(
            f"{path} cannot be read as a bit-width map ({reason(error)}): give a run folder or a bit_widths.json, or, where "
            "uniform bits will do, FP32 or W4A4"
        ) from error
    if None in names:
        raise ArqError(
            f"{path} is a map for a network of your own, and this script is for shipped ones: call arq_env.bitwidths.load_map, "
            "arq_env.finishing.finish and arq_env.comparison.compare_maps with your Problem"
        )
    if not all(isinstance(name, str) for name in (*names, training)):
        raise ArqError(f"{path} has network, dataset or training that is no name: restore the file, or search again")
    problem = load_problem(*names, sigma=sigma, training=training, device=device)
    if digest not in (None, problem.card["digest"]):
        raise ArqError(
            f"{path} was found for other weights than the checkpoint that is here: search again, or restore that checkpoint"
        )
    bit_widths, document = load_map(path, problem.layers)
    fraction, budget = bops_fraction(bit_widths, problem.layers), document.get("budget")
    if isinstance(budget, dict):
        limit = make_budget(budget, problem, MIN_BITS)
        if not limit.within(bit_widths):
            warnings.warn(f"the map in {path} costs more than its budget of {limit}", stacklevel=2)
    elif budget is not None and fraction > budget:
        warnings.warn(
            f"the map in {path} costs {fraction:.4%} of FP32's bit operations, more than its budget of {budget:.4%}", stacklevel=2
        )
    return problem, bit_widths, document, path


def check_device(device: str) -> None:
    """Raise an ArqError unless torch can put a tensor there."""
    try:
        torch.zeros(1, device=device).cpu()  # which fails on a device without memory
    except (RuntimeError, AssertionError) as error:
        raise ArqError(f"the device {device!r} cannot be used ({str(error).splitlines()[0]}): choose cpu or cuda") from error
