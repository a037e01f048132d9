"""What is being quantized: a network, its layers, its data and its noise level."""

import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arq_env.bitwidths import BitWidthMap, bops_fraction, load_map, restrict
from arq_env.budget import make_budget
from arq_env.certification import network_digest
from arq_env.datasets import Dataset, Split, known_shape, load_dataset
from arq_env.datasets.augment import add_noise, as_tensor, random_crop, to_float
from arq_env.layers import Layers, find_layers
from arq_env.networks.checkpoints import Checkpoint, load_checkpoint
from arq_env.networks.own import load_own
from arq_env.quantization import Quantizer
from arq_env.quantization.any_bits import AnyBitsQuantizer, load_any_bits
from arq_env.quantization.convert import check_conversion
from arq_env.support.errors import ArqError, reason, shown
from arq_env.support.files import checked_path, read_json, sha256

#: Training images that ranges of activations and BatchNorm's statistics are estimated on; more of them rank maps no better.
CALIBRATION_IMAGES = 320
#: Characters of a name or a path.
LONGEST_PATH = 1_024


@dataclass
class Problem:
    """A base classifier trained under noise, with the data to calibrate, to reward and to certify it.

    :param network: in evaluation mode; images [n, c, h, w] in [0, 1] to logits (normalisation inside)
    :param load: returns the data set; called at the first use of an image, so that building a problem downloads nothing
    :param sigma: standard deviation of the smoothing noise, in units of pixels in [0, 1]
    :param input_shape: of one image, [c, h, w]; None for that of the data set, which is then loaded to find it
    :param keep: what may stay at full precision, as for :func:`arq_env.layers.find_layers`
    :param fix, bits: which layers' bits nobody chooses, and which bit-widths there are, as for :func:`arq_env.bitwidths.restrict`
    :param any_bits: file of weights that stand any map (:mod:`arq_env.quantization.any_bits`), which maps then quantize in place of
        the network's own
    :param card: what the network is and where it comes from, for the files that results are written to
    """

    network: torch.nn.Module
    load: Callable[[], Dataset]
    sigma: float
    input_shape: tuple[int, int, int] | None = None
    keep: tuple[str, ...] = ()
    fix: Mapping[str, str] | None = None
    bits: Sequence[int] | None = None
    card: dict = field(default_factory=dict)
    any_bits: Path | None = None

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
        return self.base_digest if self.any_bits is None else sha256((self.base_digest + self._any_bits[1]["digest"]).encode())

    @cached_property
    def base_digest(self) -> str:
        """The same of the FP32 network, whatever weights maps quantize."""
        known = self.card.get("digest", "")
        return sha256((repr(self.layers) + repr(self.layers.kept) + network_digest(self.network, known)).encode())

    @property
    def start(self) -> str:
        """SHA-256 of the file that fine-tuning starts from; empty where there is none."""
        return self.card.get("digest", "") if self.any_bits is None else self._any_bits[1]["digest"]

    @cached_property
    def _any_bits(self) -> tuple[torch.nn.Module, dict]:
        assert self.any_bits is not None
        network, card = load_any_bits(self.any_bits, self.network, self.layers)
        if card.get("sigma") != self.sigma:
            raise ArqError(f"{self.any_bits} was trained under noise of sigma {card.get('sigma')}, and here it is {self.sigma}")
        if card.get("base") != self.base_digest:
            if card.get("checkpoint") is None or card["checkpoint"] != self.card.get("digest"):
                raise ArqError(f"{self.any_bits} was trained from another network than there is here: train it anew")
            warnings.warn(
                f"{self.any_bits} was trained from a network that computed otherwise than {self.card.get('network')} does here, or "
                "the version of Python is another",
                stacklevel=2,
            )
        return network.to(self.device), card

    def quantizer(self, calibration_images: torch.Tensor) -> Quantizer:
        """What quantizes the network by a map, calibrated on these images."""
        if self.any_bits is None:
            return Quantizer(self.network, self.layers, calibration_images)
        return AnyBitsQuantizer(self.network, self.layers, calibration_images, self._any_bits[0])

    @cached_property
    def layers(self) -> Layers:
        """The layers to quantize, in order of use.

        :raises ArqError: when the network is not understood, see :func:`arq_env.layers.find_layers` and
            :func:`arq_env.quantization.convert.check_conversion`; when ``fix`` or ``bits`` is not
        """
        shape = self.input_shape or self.dataset.image_shape
        layers = restrict(find_layers(self.network, shape, self.keep), self.fix, self.bits)
        noise = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
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
        if self.input_shape is not None and dataset.image_shape != tuple(self.input_shape):
            raise ArqError(
                f"the input shape is {tuple(self.input_shape)} and the images are {dataset.image_shape}: give "
                f"input_shape={dataset.image_shape}, since what a layer costs depends on it"
            )
        return dataset

    @property
    def origin(self) -> dict:
        """What files of results say of where the network and its data come from, so that :func:`load_mapped` finds them again."""
        said = {"checkpoint": self.card.get("digest"), "training": self.card.get("training")}
        said |= {name: value for name, value in (("fix", self.fix), ("bits", self.bits)) if value is not None}
        if self.any_bits is not None:
            said |= {"weights": str(self.any_bits), "weights_digest": self._any_bits[1]["digest"]}
        if "arguments" not in self.card:  # of a shipped network, whose name says all, or made from objects
            return said
        data = {"images": self.dataset.counts, "data": self.data_digest}
        return said | {"problem": self.card["arguments"] | {"digests": data | {"network": self.digest}}}

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


def load_problem(
    network: str,
    data: str,
    *,
    sigma: float = 0.5,
    training: str = "gaussian",
    checkpoint: str | None = None,
    normalize: Sequence[Sequence[float]] | None = None,
    keep: Sequence[str] = (),
    network_arguments: dict | None = None,
    image_size: int | None = None,
    flip: bool | None = None,
    reward_images: int | None = None,
    fix: Mapping[str, str] | None = None,
    bits: Sequence[int] | None = None,
    weights: str | None = None,
    device: str = "cpu",
) -> Problem:
    """The problem of a shipped checkpoint, or of a network of one's own; all can be written as JSON.

    :param network: a shipped network's name, or ``"module:function"``, which returns a module
    :param data: as for :func:`arq_env.datasets.load_dataset`, with ``image_size``, ``flip`` and ``reward_images``
    :param training: which of a shipped network's checkpoints; of no meaning for others
    :param checkpoint, normalize, network_arguments: as for :func:`arq_env.networks.own.load_own`; a shipped network's name with a
        checkpoint is its architecture with those weights
    :param keep, fix, bits: as of :class:`Problem`
    :param weights: file of weights that stand any map, from ``experiments/train_any_bits.py``
    :raises ArqError: for an argument out of range, when network, checkpoint, data or device are not there, and when they do not fit
        each other
    """
    if isinstance(sigma, bool) or not isinstance(sigma, (int, float)) or not 0 < sigma <= sys.float_info.max:
        raise ArqError(f"sigma is {shown(sigma)}: give a positive standard deviation, in units of pixels in [0, 1]")
    for name, value in (
        ("network", network),
        ("data", data),
        ("training", training),
        ("checkpoint", checkpoint),
        ("weights", weights),
    ):
        if not (isinstance(value, str) and 0 < len(value) <= LONGEST_PATH or name in ("checkpoint", "weights") and value is None):
            raise ArqError(f"{name} is {shown(value)}: give a name or a path of at most {LONGEST_PATH} characters")
    if not isinstance(network_arguments, dict | None):
        raise ArqError(f"network_arguments is {shown(network_arguments)}: give a dictionary of the function's keyword arguments")
    if weights is not None and not checked_path("weights", weights).is_file():
        raise ArqError(f"there is no file {weights}: give weights that experiments/train_any_bits.py made")
    choice: dict[str, Any] = {"fix": fix, "bits": bits, "any_bits": None if weights is None else checked_path("weights", weights)}
    of_data: dict[str, Any] = {"image_size": image_size, "flip": flip, "reward_images": reward_images}
    of_network = {
        "checkpoint": checkpoint,
        "normalize": normalize,
        "network_arguments": network_arguments,
        "keep": _names(keep) or None,
    }
    given = {name: value for name, value in (of_network | of_data).items() if value is not None}
    if checkpoint is None and ":" not in network:
        if given:
            raise ArqError(f"{next(iter(given))} is for networks of your own: leave it out, or give a checkpoint, too")
        module, card = load_checkpoint(Checkpoint(network, data, float(sigma), training))
        check_device(device)
        return Problem(module.to(device), partial(load_dataset, data), float(sigma), known_shape(data), **choice, card=card)
    try:
        arguments = json.loads(json.dumps({"network": network, "data": data} | given))
    except (TypeError, ValueError, RecursionError) as error:
        raise ArqError(f"the arguments of the network cannot be written as JSON ({reason(error)}): give plain data") from error
    module, digest = load_own(network, network_arguments, checkpoint, normalize)
    check_device(device)
    card = {"network": network, "dataset": data, "sigma": float(sigma), "training": None, "digest": digest, "arguments": arguments}
    load = partial(load_dataset, data, **of_data)
    kept = tuple(_names(keep))
    problem = Problem(module.to(device), load, float(sigma), known_shape(data), keep=kept, **choice, card=card)
    _check_classes(problem)
    return problem


def _names(keep: Any) -> list[str]:
    names = [keep] if isinstance(keep, str) else keep
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ArqError(f"keep is {shown(keep)}: give a list of the names that may stay at full precision")
    return list(names)


def _check_classes(problem: Problem) -> None:
    """Make sure that there are as many logits as classes, for labels are their numbers."""
    _ = problem.layers  # which makes sure that there are logits
    with torch.inference_mode():
        logits = problem.network(torch.zeros(1, *problem.dataset.image_shape, device=problem.device)).shape[1]
    if logits != len(problem.dataset.classes):
        raise ArqError(
            f"the network has {logits} classes and the data have {len(problem.dataset.classes)}: give the data that it was trained "
            "on, or build it with as many"
        )


def load_mapped(path: Path, device: str = "cpu") -> tuple[Problem, BitWidthMap, dict, Path]:
    """A map's file and the problem it is for; warns when it costs more than the budget that the file states.

    :param path: a run folder of a search, or a bit_widths.json, found or edited by hand
    :return: problem, map, the file's other entries, and the file
    :raises ArqError: when it cannot be read, is for a network of one's own, or was found for other weights than the shipped ones
    """
    path = checked_path("path", path)
    try:
        path = path / "bit_widths.json" if path.is_dir() else path
        header = read_json(path)
        names = header["network"], header["dataset"]
        made_with = header.get("provenance", {})
        training, sigma, digest = made_with.get("training", "gaussian"), header["sigma"], made_with.get("checkpoint")
        arguments = dict(made_with.get("problem", {}))
        digests = dict(arguments.pop("digests", {}))
        choice = {name: made_with.get(name) for name in ("fix", "bits", "weights")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArqError(
            f"{path} cannot be read as a bit-width map ({reason(error)}): give a run folder or a bit_widths.json, or, where "
            "uniform bits will do, FP32 or W4A4"
        ) from error
    if None in names:
        raise ArqError(
            f"{path} is a map for a network that was given as an object: give it to gym.make by import string, or call "
            "arq_env.bitwidths.load_map, arq_env.finishing.finish and arq_env.comparison.compare_maps with your Problem"
        )
    if arguments:
        problem = _load_again(path, arguments | choice, sigma, device)
    elif all(isinstance(name, str) for name in (*names, training)):
        problem = load_problem(*names, sigma=sigma, training=training, device=device, **choice)
    else:
        raise ArqError(f"{path} has network, dataset or training that is no name: restore the file, or search again")
    if digest not in (None, problem.card["digest"]):
        raise ArqError(
            f"{path} was found for other weights than the checkpoint that is here: search again, or restore that checkpoint"
        )
    if problem.any_bits is not None and made_with.get("weights_digest") != problem.origin["weights_digest"]:
        raise ArqError(f"{path} was found on other weights than {problem.any_bits} holds: restore that file, or search again")
    _check_same(path, problem, digests)
    bit_widths, document = load_map(path, problem.layers)
    fraction, budget = bops_fraction(bit_widths, problem.layers), document.get("budget")
    if isinstance(budget, dict):
        limit = make_budget(budget, problem, restrict(problem.layers, {}))  # which a map made by hand may undercut
        if not limit.within(bit_widths):
            warnings.warn(f"the map in {path} costs more than its budget of {limit}", stacklevel=2)
    elif budget is not None and fraction > budget:
        warnings.warn(
            f"the map in {path} costs {fraction:.4%} of FP32's bit operations, more than its budget of {budget:.4%}", stacklevel=2
        )
    return problem, bit_widths, document, path


def _load_again(path: Path, arguments: dict, sigma: float, device: str) -> Problem:
    """The problem of a network of one's own, from what a file of results says of it."""
    try:
        return load_problem(**arguments, sigma=sigma, device=device)
    except TypeError as error:
        raise ArqError(f"{path} says of its network what is not understood ({reason(error)}): restore the file") from error
    except ArqError as error:
        raise ArqError(f"what {path} was made for is not here: {error}") from error


def _check_same(path: Path, problem: Problem, digests: dict) -> None:
    """Compare data and network with those that a file of results was made with, where it says so; the latter's digest only warns,
    for another version of Python gives another, too.
    """
    if "data" in digests and digests["data"] != problem.data_digest:
        raise ArqError(
            f"{path} was found on other data than {problem.card['dataset']} is here ({digests.get('images')} images there, "
            f"{problem.dataset.counts} here, or others): search again, or restore them"
        )
    if "network" in digests and digests["network"] != problem.digest:
        warnings.warn(
            f"{problem.card['network']} builds a network that computes otherwise than that of {path} did, or the version of Python "
            "is another",
            stacklevel=3,
        )


def check_device(device: str) -> None:
    """Raise an ArqError unless torch can put a tensor there."""
    try:
        torch.zeros(1, device=device).cpu()  # which fails on a device without memory
    except (RuntimeError, AssertionError) as error:
        raise ArqError(f"the device {device!r} cannot be used ({str(error).splitlines()[0]}): choose cpu or cuda") from error
