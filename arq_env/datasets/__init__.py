"""Data sets by name, and the three disjoint parts every number in this project comes from.

========== ======================================= ========================================================================
part       images                                  used for
========== ======================================= ========================================================================
train      training images, all but the last 2,000 pretraining, fine-tuning, calibration; confirming a search
reward     the last 2,000 training images          the reward of a search; watched during both trainings, never fitted to
test       test images                             final certificates; never seen by a search
========== ======================================= ========================================================================
"""

from arq_env.datasets import cifar10, signs
from arq_env.datasets.parts import Dataset, Split
from arq_env.support.errors import ArqError

__all__ = ["Dataset", "REWARD_IMAGES", "Split", "load_dataset", "load_if_here"]

#: Number of training images kept out of training and calibration, for the reward.
REWARD_IMAGES = 2_000


def load_dataset(name: str) -> Dataset:
    """Load ``"cifar10"`` (downloaded once) or ``"signs"`` (rendered once).

    :raises ArqError: for an unknown name, or data that cannot be had.
    """
    if name not in _SOURCES:
        raise ArqError(f"there is no data set {name!r}: choose one of {', '.join(_SOURCES)}")
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
