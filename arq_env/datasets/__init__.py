"""Data sets, and the three disjoint parts every number in this project comes from.

========== ======================================= ========================================================================
part       images                                  used for
========== ======================================= ========================================================================
train      training images, but for the reward's   pretraining, fine-tuning, calibration; confirming a search
reward     2,000 training images, or a tenth       the reward of a search; watched during both trainings, never fitted to
test       test images                             final certificates; never seen by a search
========== ======================================= ========================================================================

Of CIFAR-10 and Signs the reward part is the last 2,000 training images. Of data of one's own it is ``val/`` where there is also
``test/``, else at most 2,000 and at most a tenth of the training images, drawn always alike.
"""

import os

from arq_env.datasets import cifar10, signs
from arq_env.datasets.own import REWARD_IMAGES, from_folder, from_function, from_npz
from arq_env.datasets.parts import Dataset, Split
from arq_env.support.errors import ArqError, shown

__all__ = ["Dataset", "REWARD_IMAGES", "Split", "known_shape", "load_dataset", "load_if_here"]


def load_dataset(
    data: str, *, image_size: int | None = None, flip: bool | None = None, reward_images: int | None = None
) -> Dataset:
    """The data set that ``data`` names.

    It is ``"cifar10"`` (downloaded once), ``"signs"`` (rendered once), ``"imagenet"`` (the folder that ``ARQ_IMAGENET`` names), a
    folder of images (:func:`arq_env.datasets.own.from_folder`), an ``.npz`` file (:func:`arq_env.datasets.own.from_npz`), or
    ``"module:function"``, called without arguments, which returns a :class:`Dataset`.

    :param image_size: of a folder's images: their edge in pixels, to which they are scaled and cut; None where all have one size
    :param flip: of a folder or file: whether a mirrored image keeps its class (default: no)
    :param reward_images: of a folder or file without a reward part: how many training images to keep out for it
    :raises ArqError: for an unknown name, data that cannot be had, and options that these data do not have
    """
    if not (isinstance(data, str) and "\0" not in data):
        raise ArqError(f"data is {shown(data)}: give the name of a data set, a folder, an .npz file or module:function")
    for name, value in (("image_size", image_size), ("reward_images", reward_images)):
        if value is not None and (type(value) is not int or value < 1):
            raise ArqError(f"{name} is {shown(value)}: give a whole number of at least 1")
    if not isinstance(flip, bool | None):
        raise ArqError(f"flip is {shown(flip)}: say with True or False whether a mirrored image keeps its class")
    options = {"image_size": image_size, "flip": flip, "reward_images": reward_images}
    if data == "imagenet" and (folder := os.environ.get("ARQ_IMAGENET")):
        data = folder
    if data not in _SOURCES and os.path.isdir(os.path.expanduser(data)):
        return from_folder(data, image_size=image_size, flip=bool(flip), reward_images=reward_images)
    unused = {"image_size": image_size} if data.endswith(".npz") else options
    if given := [name for name, value in unused.items() if value is not None]:
        raise ArqError(f"{data} takes no {given[0]}: leave it out")
    if data in _SOURCES:
        return _shipped(data)
    if data.endswith(".npz"):
        return from_npz(data, flip=bool(flip), reward_images=reward_images)
    if ":" in data:
        return from_function(data)
    if data == "imagenet":
        raise ArqError("there is no ImageNet: set ARQ_IMAGENET to its folder, with train/ and val/, or give that as the data")
    raise ArqError(
        f"there is no data set {data!r}: choose {', '.join(_SOURCES)}, a folder of images, an .npz file or module:function"
    )


def known_shape(data: str) -> tuple[int, int, int] | None:
    """The shape [c, h, w] of the images of CIFAR-10 and Signs, without loading them; None for other data."""
    return _SOURCES[data][0].SHAPE if isinstance(data, str) and data in _SOURCES else None


def _shipped(name: str) -> Dataset:
    source, flip = _SOURCES[name]
    arrays = source.load_arrays()
    images, labels = arrays["train"]
    return Dataset(
        name=name,
        classes=source.CLASSES,
        flip=flip,
        train=Split(images[:-REWARD_IMAGES], labels[:-REWARD_IMAGES]),
        reward=Split(images[-REWARD_IMAGES:], labels[-REWARD_IMAGES:]),
        test=Split(*arrays["test"]),
    )


def load_if_here(name: str) -> Dataset:
    """:func:`load_dataset` of what takes no download.

    :raises ArqError: also where it would take one
    """
    if name == "cifar10" and not cifar10.path().exists():
        raise ArqError("CIFAR-10 is not on this machine: the first search on it downloads it")
    return load_dataset(name)


_SOURCES = {"cifar10": (cifar10, True), "signs": (signs, False)}
