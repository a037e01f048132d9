"""The training augmentation, as batched tensor operations on the images' device."""

import warnings

import numpy as np
import torch

from arq_env.support.errors import ArqError

#: Pixels of black border that a random crop may move into the image.
CROP_PADDING = 4


def as_tensor(images: np.ndarray) -> torch.Tensor:
    """The array as a tensor that shares its memory, for reading: it may be a memory map, which torch warns of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.as_tensor(images)


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 [n, h, w, channels] to float32 [n, channels, h, w] in [0, 1], channels-last in memory.

    :raises ArqError: for any other dtype
    """
    if images.dtype != torch.uint8:
        raise ArqError(f"the images are {images.dtype}: give uint8 from 0 to 255")
    return images.permute(0, 3, 1, 2).float().div_(255)


def add_noise(images: torch.Tensor, sigma: float, generator: np.random.Generator) -> torch.Tensor:
    """The images plus N(0, sigma^2) noise, in place; NumPy's generator gives the same bits on every processor, torch's does not.

    :param images: float32 on the CPU
    """
    return images.add_(torch.from_numpy(generator.standard_normal(tuple(images.shape), np.float32)).mul_(sigma))


def random_crop(images: torch.Tensor, generator: torch.Generator, *, flip: bool) -> torch.Tensor:
    """Crop each image at its own offset from a black border of 4 pixels and, with ``flip``, mirror half of them.

    :param images: uint8 [n, h, w, channels]
    :param generator: on the device of ``images``
    :return: uint8 [n, h, w, channels]
    """
    n, height, width, _ = images.shape
    device = images.device
    padded = torch.nn.functional.pad(images, (0, 0, CROP_PADDING, CROP_PADDING, CROP_PADDING, CROP_PADDING))

    def offsets():
        return torch.randint(2 * CROP_PADDING + 1, (n, 1), generator=generator, device=device)

    rows = offsets() + torch.arange(height, device=device)
    columns = offsets() + torch.arange(width, device=device)
    if flip:
        mirrored = torch.rand((n, 1), generator=generator, device=device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    return padded[torch.arange(n, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]]
