"""The three disjoint parts of a data set, checked once, when they are put together."""

import hashlib
from dataclasses import dataclass, field
from itertools import combinations
from typing import NamedTuple

import numpy as np

from arq_env.datasets.files import ImageFiles
from arq_env.support.errors import ArqError

PARTS = ("train", "reward", "test")
#: Share of the smaller part's images that two parts may have in common: photographs come twice here and there, parts by mistake.
SHARED = 0.01


class Split(NamedTuple):
    """images: uint8 [n, h, w, channels], 1 to 4 channels; labels: int64 [n], from 0 to the number of classes - 1."""

    images: np.ndarray | ImageFiles
    labels: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """A data set cut into its three parts; ``flip`` says whether a mirrored image keeps its class.

    Parts may be given as anything NumPy takes for arrays: lists, tensors on the CPU, memory maps. They are never written to.
    Images may also be :class:`arq_env.datasets.files.ImageFiles`.

    :param classes: their names, two or more
    :raises ArqError: when images are not uint8 [n, h, w, channels] of one shape, labels are not whole numbers that name a class,
        one for each image, or two parts share images, more than 1% of the smaller one's
    """

    name: str
    classes: tuple[str, ...]
    flip: bool
    train: Split
    reward: Split
    test: Split
    #: SHA-256 of all images (of files, as :meth:`arq_env.datasets.files.ImageFiles.digests` tells them apart) and labels.
    digest: str = field(init=False, repr=False, compare=False)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of one image, as networks take it: [c, h, w]."""
        height, width, channels = self.train.images.shape[1:]
        return channels, height, width

    @property
    def counts(self) -> dict[str, int]:
        """Images of each part."""
        return {name: len(getattr(self, name).labels) for name in PARTS}

    def __post_init__(self):
        if isinstance(self.classes, str) or not hasattr(self.classes, "__len__") or len(self.classes) < 2:
            raise ArqError(f"the classes are {self.classes!r}: give the names of two or more")
        if not isinstance(self.flip, bool | np.bool_):
            raise ArqError(f"flip is {self.flip!r}: say with True or False whether a mirrored image keeps its class")
        digests = {}
        for name in PARTS:
            part = getattr(self, name)
            if not isinstance(part, tuple | list) or len(part) != 2:
                raise ArqError(f"the {name} part is {type(part).__name__!r}: give Split(images, labels)")
            part = Split(_images(name, part[0]), _labels(name, part[1], len(self.classes)))
            if len(part.images) != len(part.labels):
                raise ArqError(f"the {name} part has {len(part.images)} images and {len(part.labels)} labels: give one for each")
            object.__setattr__(self, name, part)
            if part.images.shape[1:] != self.train.images.shape[1:]:
                shapes = part.images.shape[1:], self.train.images.shape[1:]
                raise ArqError(f"the {name} images are {shapes[0]} and the train images {shapes[1]}: give all parts the same shape")
            digests[name] = _digests(part.images)
        _check_disjoint(digests)
        whole = hashlib.sha256(repr((tuple(self.classes), bool(self.flip), self.train.images.shape[1:])).encode())
        for name in PARTS:
            whole.update(name.encode() + b"".join(digests[name]) + getattr(self, name).labels.tobytes())
        object.__setattr__(self, "classes", tuple(self.classes))
        object.__setattr__(self, "digest", whole.hexdigest())


def _digests(images: np.ndarray | ImageFiles) -> list[bytes]:
    """One for each image."""
    if isinstance(images, ImageFiles):
        return images.digests()
    return [hashlib.sha256(np.ascontiguousarray(image).data).digest() for image in images]


def _check_disjoint(digests: dict[str, list[bytes]]) -> None:
    seen = {name: set(of_images) for name, of_images in digests.items()}
    for other, name in combinations(PARTS, 2):
        shared = sum(digest in seen[other] for digest in digests[name])
        if shared > SHARED * min(len(digests[name]), len(digests[other])):  # of the smaller, which may lie in the other whole
            raise ArqError(
                f"{shared} of the {len(digests[name])} {name} images are among the {other} images: what is measured on the {name} "
                "part must not have been seen before, so cut the data set into parts that share none"
            )


def _images(name: str, images) -> np.ndarray | ImageFiles:
    """The images, seen as what torch can take."""
    if isinstance(images, ImageFiles):
        return images
    images = _array(f"{name} images", images)
    if images.dtype != np.uint8:
        raise ArqError(
            f"the {name} images are {images.dtype}: give uint8 from 0 to 255; for images in [0, 1] that is "
            "(255 * images).round().astype(numpy.uint8)"
        )
    if images.ndim != 4 or not 1 <= images.shape[3] <= 4 or not images.size:
        hint = ""
        if images.ndim == 4 and images.shape[1] in (1, 2, 3, 4):
            hint = "; with channels first that is images.transpose(0, 2, 3, 1)"
        if images.ndim == 3:
            hint = "; of grey images that is images[..., None]"
        raise ArqError(f"the {name} images have shape {images.shape}: give [n, height, width, 1 to 4 channels]{hint}")
    return images.copy() if min(images.strides) < 0 else images  # torch knows no negative strides


def _labels(name: str, labels, classes: int) -> np.ndarray:
    labels = _array(f"{name} labels", labels)
    if labels.ndim != 1 or labels.dtype.kind not in "biuf":
        raise ArqError(f"the {name} labels are {labels.dtype} of shape {labels.shape}: give one whole number for each image, [n]")
    bad = ~((labels >= 0) & (labels < classes) & (labels == np.floor(labels)))  # NaN is bad, too
    if bad.any():
        raise ArqError(
            f"the {name} labels include {labels[bad][0]}: give whole numbers from 0 to {classes - 1}, one for each class"
        )
    return labels.astype(np.int64, copy=False)


def _array(what: str, values) -> np.ndarray:
    try:
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists; tensors on a GPU or with gradients
        raise ArqError(f"the {what} are no array ({error}): give a NumPy array") from error
