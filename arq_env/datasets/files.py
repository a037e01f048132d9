"""Images in files, decoded when they are asked for, so that a folder of any size takes little memory."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from arq_env.support.errors import ArqError, reason

#: What is read as an image, as torchvision's ImageFolder does.
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
#: Of compressed files, both ends tell one image from another; so a large folder is told apart in minutes.
COMPRESSED, ENDS = (".jpg", ".jpeg", ".png", ".webp"), 4096
#: The shorter side over the square that is cut out of its middle: 256 to 224 pixels, as networks for ImageNet are tested.
MARGIN = 8 / 7
#: Files looked into for the number of channels, evenly spread.
LOOKED_INTO = 32


class ImageFiles:
    """Behaves as an array uint8 [n, h, w, channels] that is indexed by a slice or an array of whole numbers.

    Grey images only make one channel; where some are coloured all have three.

    :param files: one or more
    :param size: pixels of the square that is cut out of the middle of each image, once its shorter side is scaled to 8/7 of it;
        an image of just this size is taken as it is. None for images that all have one size
    :raises ArqError: when a file that is looked into is no image
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(self, files: Sequence[Path], size: int | None = None, *, like: "ImageFiles | None" = None):
        self.files, self.size = list(files), size
        if like is None:
            looked_into = self.files[:: -(-len(self.files) // LOOKED_INTO)]
            channels = 1 if all(_mode(file) in ("1", "L", "LA", "I;16") for file in looked_into) else 3
            height, width, _ = _decoded(self.files[0], channels, size).shape
        else:
            _, height, width, channels = like.shape
        self.shape: tuple[int, int, int, int] = (len(self.files), height, width, channels)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, chosen: slice | np.ndarray) -> np.ndarray:
        """The images, decoded: uint8 [n, h, w, channels].

        :raises ArqError: naming the file, when it cannot be decoded or has another size
        """
        files = self.files[chosen] if isinstance(chosen, slice) else [self.files[i] for i in np.asarray(chosen)]
        images = np.empty((len(files), *self.shape[1:]), np.uint8)
        for image, file in zip(images, files, strict=True):
            decoded = _decoded(file, self.shape[3], self.size)
            if decoded.shape != image.shape:
                (height, width), (h, w) = decoded.shape[:2], image.shape[:2]
                raise ArqError(
                    f"{file} has {width}x{height} pixels and others have {w}x{h}: give image_size, to which all are scaled and cut"
                )
            image[:] = decoded
        return images

    def digests(self) -> list[bytes]:
        """SHA-256 of each file; of a compressed one of its size and both its ends."""
        return [_digest(file) for file in self.files]


def _digest(file: Path) -> bytes:
    try:
        with open(file, "rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            if file.suffix.lower() not in COMPRESSED or size <= 2 * ENDS:
                return hashlib.sha256(stream.read()).digest()
            head = stream.read(ENDS)
            stream.seek(-ENDS, 2)
            return hashlib.sha256(b"%d" % size + head + stream.read()).digest()
    except OSError as error:
        raise ArqError(f"{file} cannot be read ({error.strerror}): restore it, or take it out of the folder") from error


def _open(file: Path):
    from PIL import Image

    try:
        return Image.open(file)
    except (OSError, ValueError, SyntaxError) as error:
        raise ArqError(f"{file} cannot be read as an image ({reason(error)}): restore it, or take it out of the folder") from error


def _mode(file: Path) -> str:
    with _open(file) as image:
        return image.mode


def _decoded(file: Path, channels: int, size: int | None) -> np.ndarray:
    """One image: uint8 [h, w, channels]."""
    with _open(file) as image:
        try:
            converted = image.convert("L" if channels == 1 else "RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise ArqError(f"{file} cannot be decoded ({reason(error)}): restore it, or take it out of the folder") from error
    if size is not None and converted.size != (size, size):
        converted = _cut_out(converted, size)
    return np.asarray(converted).reshape(*converted.size[::-1], channels)


def _cut_out(image, size: int):
    """The middle of an image whose shorter side is scaled to 8/7 of ``size``."""
    from PIL import Image

    scale = round(MARGIN * size) / min(image.size)
    width, height = (max(round(scale * edge), size) for edge in image.size)
    scaled = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return scaled.crop((left, top, left + size, top + size))
