"""Data sets of one's own: a folder of images, arrays in an .npz file, or a function that returns a Dataset."""

import os
import zipfile
from pathlib import Path

import numpy as np

from arq_env.datasets.files import SUFFIXES, ImageFiles
from arq_env.datasets.parts import Dataset, Split
from arq_env.support.errors import ArqError, reason
from arq_env.support.imports import call_imported

#: Most images that are kept out of training for the reward, and the share of the training images that is.
REWARD_IMAGES, REWARD_SHARE = 2_000, 0.1


def from_function(name: str) -> Dataset:
    """What the function returns that ``module:function`` names.

    :raises ArqError: when there is none, or it returns something else
    """
    dataset = call_imported(name)
    if not isinstance(dataset, Dataset):
        raise ArqError(f"{name} gave {type(dataset).__name__!r}: let it return an arq_env.datasets.Dataset")
    return dataset


def from_folder(folder: str, *, image_size: int | None, flip: bool, reward_images: int | None) -> Dataset:
    """Images in ``train/CLASS/`` and ``test/CLASS/`` or ``val/CLASS/``, as torchvision's ImageFolder has them; decoded when used.

    Where there are both, ``val/`` is the reward part; else it is cut out of ``train/``.

    :param image_size: as ``size`` of :class:`arq_env.datasets.files.ImageFiles`
    :raises ArqError: when the folder is none of this kind
    """
    root = Path(os.path.expanduser(folder))
    there = [part for part in ("val", "test") if (root / part).is_dir()]
    if not there or not (root / "train").is_dir():
        raise ArqError(
            f"{folder} has no train/ with val/ or test/ beside it: give a folder in the layout of torchvision's ImageFolder"
        )
    classes = _subfolders(root / "train")
    parts = {part: _listed(root / part, classes) for part in ("train", *there)}
    train, labels = parts["train"]
    images = ImageFiles(train, image_size)
    every = {part: (ImageFiles(files, image_size, like=images), labels) for part, (files, labels) in parts.items()}
    reward = every["val"] if len(there) == 2 else None
    return _cut(folder, classes, flip, every["train"], reward, every[there[-1]], reward_images)


def _subfolders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")))


def _listed(folder: Path, classes: tuple[str, ...]) -> tuple[list[Path], np.ndarray]:
    """The images below the folder in the order of their classes, and their labels."""
    if unknown := sorted(set(_subfolders(folder)) - set(classes)):
        raise ArqError(f"{folder} has a class {unknown[0]!r} that train/ has not: give both the same classes")
    files, labels = [], []
    for label, name in enumerate(classes):
        found = (Path(where, file) for where, _, names in os.walk(folder / name) for file in names if not file.startswith("."))
        of_class = sorted(file for file in found if file.suffix.lower() in SUFFIXES)
        files += of_class
        labels += [label] * len(of_class)
    if not files:
        raise ArqError(
            f"{folder} has no images in folders of their classes: there must be {folder.name}/CLASS/IMAGE, one folder a class"
        )
    return files, np.array(labels, np.int64)


def from_npz(path: str, *, flip: bool, reward_images: int | None) -> Dataset:
    """Arrays ``train_images, train_labels, test_images, test_labels``, and of the reward part where it is not to be cut out of the
    training images, as ``reward_images`` or ``val_images``; ``classes``, their names, may be there, too.

    Images are uint8 [n, h, w, channels], or [n, h, w] where they are grey; labels [n] or [n, 1].

    :raises ArqError: when the file cannot be read or lacks an array
    """
    try:
        with open(os.path.expanduser(path), "rb") as stream, np.load(stream) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise ArqError(
            f"{path} cannot be read as NumPy arrays ({reason(error)}): write it with numpy.savez, without objects"
        ) from error

    def part(name):
        if missing := [key for key in (f"{name}_images", f"{name}_labels") if key not in arrays]:
            raise ArqError(f"{path} has no array {missing[0]!r} (there: {', '.join(arrays) or 'none'}): add it")
        images, labels = arrays[f"{name}_images"], arrays[f"{name}_labels"]
        images = images[..., None] if images.ndim == 3 else images
        return images, labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels

    train, test = part("train"), part("test")
    reward = next((part(name) for name in ("reward", "val") if f"{name}_images" in arrays), None)
    numbered = int(train[1].max()) + 1 if train[1].size and train[1].dtype.kind in "iu" else 0
    classes = tuple(map(str, arrays["classes"])) if "classes" in arrays else tuple(map(str, range(numbered)))
    return _cut(path, classes, flip, train, reward, test, reward_images)


def _cut(name, classes, flip, train, reward, test, reward_images) -> Dataset:
    """The three parts; a reward part is shuffled, always alike, since few of its images must stand for all."""
    labels, rng = train[1], np.random.default_rng(0)
    for what, (images_of, labels_of) in (("training", train), ("reward", reward or train)):
        if len(images_of) != len(labels_of):
            raise ArqError(f"{name} has {len(images_of)} {what} images and {len(labels_of)} labels: give one for each")
    if reward is None:
        count = min(REWARD_IMAGES, int(REWARD_SHARE * len(labels))) if reward_images is None else reward_images
        if not 1 <= count < len(labels):
            raise ArqError(
                f"{count} reward images cannot be kept out of {len(labels)} training images: give reward_images, or more images"
            )
        order = rng.permutation(len(labels))
        chosen, rest = order[:count], np.sort(order[count:])
        train, reward = _taken(train, rest), _taken(train, chosen)
    elif reward_images is not None:
        raise ArqError(f"{name} has a reward part of its own: leave out reward_images")
    else:
        reward = _taken(reward, rng.permutation(len(reward[1])))
    return Dataset(name, classes, flip, Split(*train), Split(*reward), Split(*test))


def _taken(part, chosen: np.ndarray):
    images, labels = part
    if isinstance(images, ImageFiles):
        return ImageFiles([images.files[i] for i in chosen], images.size, like=images), labels[chosen]
    return images[chosen], labels[chosen]
