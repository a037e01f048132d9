"""Folders of images, arrays in a file and functions as data sets."""

import itertools
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from arq_env import ArqError
from arq_env.datasets import load_dataset
from arq_env.datasets.files import ENDS, ImageFiles
from arq_env.networks.recipe import Recipe
from arq_env.networks.training import noisy_accuracy, train
from tests.toy import ToyNet, toy_dataset

RNG = np.random.default_rng(0)


def write_folder(root, counts, classes=("cat", "dog"), shape=(8, 8, 3), suffix="png"):
    """Random images in ``root/PART/CLASS/``; counts are those of a class."""
    for (part, count), name in itertools.product(counts.items(), classes):
        (root / part / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = RNG.integers(0, 256, shape, np.uint8)
            Image.fromarray(pixels).save(root / part / name / f"{i:03}.{suffix}")
    return str(root)


def test_a_folder_is_read_as_it_lies(tmp_path):
    folder = write_folder(tmp_path, {"train": 30, "val": 7})
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".cache").mkdir()
    data = load_dataset(folder)
    assert data.classes == ("cat", "dog") and data.counts == {"train": 54, "reward": 6, "test": 14}
    assert data.image_shape == (3, 8, 8) and not data.flip and data.name == folder
    assert data.test.labels.tolist() == [0] * 7 + [1] * 7
    with Image.open(tmp_path / "val" / "dog" / "001.png") as image:
        assert np.array_equal(data.test.images[np.array([8])][0], np.asarray(image))
    held_out = {file.relative_to(tmp_path) for file in data.reward.images.files}
    assert len(held_out) == 6 and held_out.isdisjoint(file.relative_to(tmp_path) for file in data.train.images.files)
    for part in (data.train, data.reward):
        assert [data.classes[label] for label in part.labels] == [file.parent.name for file in part.images.files]
    again = load_dataset(folder)
    assert again.digest == data.digest and again.reward.images.files == data.reward.images.files
    assert load_dataset(folder, reward_images=20, flip=True).counts["reward"] == 20


def test_val_beside_test_is_the_reward_part(tmp_path):
    data = load_dataset(write_folder(tmp_path, {"train": 9, "val": 5, "test": 4}))
    assert data.counts == {"train": 18, "reward": 10, "test": 8}
    assert {file.parents[1].name for file in data.reward.images.files} == {"val"}
    assert len(set(data.reward.labels[:8].tolist())) == 2  # the first of them must stand for all
    with pytest.raises(ArqError, match="reward part of its own"):
        load_dataset(str(tmp_path), reward_images=3)


def test_images_of_several_sizes_are_scaled_and_cut(tmp_path):
    folder = write_folder(tmp_path, {"train": 10, "test": 2}, shape=(40, 60, 3), suffix="jpg")
    Image.fromarray(RNG.integers(0, 256, (70, 35), np.uint8)).save(tmp_path / "train" / "dog" / "grey.jpg")
    with pytest.raises(ArqError, match="grey.jpg has 35x70 pixels and others have 60x40: give image_size"):
        load_dataset(folder).train.images[:]
    data = load_dataset(folder, image_size=14)
    assert data.image_shape == (3, 14, 14) and data.train.images[:].shape == (19, 14, 14, 3)
    with Image.open(tmp_path / "test" / "cat" / "000.jpg") as image:
        scaled = image.resize((24, 16), Image.Resampling.BILINEAR).crop((5, 1, 19, 15))
    assert np.array_equal(data.test.images[:1][0], np.asarray(scaled))


@pytest.mark.parametrize("edge", [16, 28])
def test_images_of_the_size_asked_for_are_taken_as_they_are(tmp_path, edge):
    folder = write_folder(tmp_path, {"train": 10, "test": 2}, shape=(edge, edge))
    data = load_dataset(folder, image_size=edge)
    assert data.image_shape == (1, edge, edge)  # grey
    with Image.open(tmp_path / "test" / "cat" / "000.png") as image:
        assert np.array_equal(data.test.images[:1][0, ..., 0], np.asarray(image))


def test_the_digest_sees_every_file_and_parts_that_share_them(tmp_path):
    folder = write_folder(tmp_path, {"train": 10, "test": 3}, shape=(64, 64, 3))
    before = load_dataset(folder).digest
    some = tmp_path / "train" / "cat" / "003.png"
    assert some.stat().st_size > 2 * ENDS  # of which not all is read
    with Image.open(some) as image:
        pixels = np.asarray(image).copy()
    pixels[32, 32] ^= 1
    Image.fromarray(pixels).save(some)
    assert load_dataset(folder).digest != before
    some.rename(tmp_path / "train" / "dog" / "moved.png")
    assert load_dataset(folder).digest not in (before, None)
    (tmp_path / "test" / "dog" / "copy.png").write_bytes((tmp_path / "train" / "dog" / "moved.png").read_bytes())
    with pytest.raises(ArqError, match="1 of the 7 test images are among the (train|reward) images"):
        load_dataset(folder)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda root: (root / "test").rename(root / "other"), "no train/ with val/ or test/"),
        (lambda root: (root / "test" / "bird").mkdir(), "'bird' that train/ has not"),
        (lambda root: [file.unlink() for file in (root / "test").rglob("*.png")], "no images in folders of their classes"),
        (lambda root: (root / "train" / "cat").rename(root / "cat"), "two or more"),
        (lambda root: (root / "train" / "cat" / "000.png").write_bytes(b"no image"), "000.png cannot be read as an image"),
    ],
)
def test_folders_of_another_form(tmp_path, spoil, message):
    folder = write_folder(tmp_path, {"train": 10, "test": 2})
    spoil(tmp_path)
    if message == "two or more":
        (tmp_path / "test" / "cat").rename(tmp_path / "birds")
    with pytest.raises(ArqError, match=message):
        load_dataset(folder)


def test_a_damaged_image_is_named(tmp_path):
    folder = write_folder(tmp_path, {"train": 40, "test": 2}, shape=(64, 64, 3))
    data = load_dataset(folder)
    damaged = data.train.images.files[5]
    damaged.write_bytes(damaged.read_bytes()[:300])
    with pytest.raises(ArqError, match=f"{damaged.name} cannot be decoded"):
        data.train.images[4:7]


def test_training_on_files_is_training_on_their_pixels(tmp_path):
    folder = write_folder(tmp_path / "data", {"train": 30, "test": 4}, classes="abc")
    data = load_dataset(folder, flip=True)
    in_memory = type(data)(
        "same", data.classes, True, *((part.images[:], part.labels) for part in (data.train, data.reward, data.test))
    )
    states = []
    for one in (data, in_memory):
        torch.manual_seed(0)
        network = ToyNet()
        train(network, one, Recipe(epochs=1, batch=20), tmp_path / one.name.replace("/", "-"))
        states.append(network.state_dict())
    assert all(np.array_equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
    assert noisy_accuracy(network, *data.test, sigma=0.5) == noisy_accuracy(network, *in_memory.test, sigma=0.5)


def test_files_are_indexed_as_an_array(tmp_path):
    data = load_dataset(write_folder(tmp_path, {"train": 10, "test": 2}))
    files, pixels = data.train.images, data.train.images[:]
    assert (
        isinstance(files, ImageFiles) and files.shape == pixels.shape and len(files) == len(pixels) and files.dtype == pixels.dtype
    )
    for chosen in (slice(3), slice(None, None, 4), slice(2, 9), np.array([5, 0, 5])):
        assert np.array_equal(files[chosen], pixels[chosen])


def arrays(**changes):
    parts = {"train": toy_dataset().train, "test": toy_dataset().test}
    return {f"{name}_{kind}": getattr(part, kind) for name, part in parts.items() for kind in ("images", "labels")} | changes


def test_arrays_in_a_file(tmp_path):
    path = tmp_path / "toy.npz"
    np.savez(path, **arrays())
    data = load_dataset(str(path), flip=True)
    assert data.counts == {"train": 1_170, "reward": 130, "test": 40} and data.flip and data.classes == ("0", "1", "2")
    assert np.array_equal(data.test.images, toy_dataset().test.images)
    np.savez(
        path, **arrays(classes=np.array(["red", "green", "blue"])), reward_images=RNG.integers(0, 256, (50, 8, 8, 3), np.uint8)
    )
    with pytest.raises(ArqError, match="no array 'reward_labels'"):
        load_dataset(str(path))
    held_out = {"val_images": RNG.integers(0, 256, (50, 8, 8, 3), np.uint8), "val_labels": np.arange(50)[:, None] % 3}
    np.savez(path, **arrays(**held_out, classes=np.array(["red", "green", "blue"])))
    data = load_dataset(str(path))
    assert data.counts == {"train": 1_300, "reward": 50, "test": 40} and data.classes[1] == "green"
    assert np.bincount(data.reward.labels).tolist() == [17, 17, 16]
    grey = {f"{part}_images": getattr(toy_dataset(), part).images[..., 0] for part in ("train", "test")}
    np.savez(path, **arrays(**grey))
    assert load_dataset(str(path)).image_shape == (1, 8, 8)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"test_labels": np.array([None])}, "cannot be read as NumPy arrays"),
        ({"train_labels": np.zeros(3, int)}, "1300 training images and 3 labels"),
        ({"train_images": toy_dataset().train.images / 255}, "float64: give uint8"),
        ({"classes": np.array(["one"])}, "two or more"),
    ],
)
def test_arrays_of_another_form(tmp_path, changes, message):
    np.savez(tmp_path / "toy.npz", **arrays(**changes))
    with pytest.raises(ArqError, match=message):
        load_dataset(str(tmp_path / "toy.npz"))
    (tmp_path / "toy.npz").write_bytes(b"PK no arrays")
    with pytest.raises(ArqError, match="cannot be read as NumPy arrays"):
        load_dataset(str(tmp_path / "toy.npz"))


def test_a_function_that_returns_a_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "owndata.py").write_text(
        "from tests.toy import toy_dataset\ndef nothing(): pass\ndef some(number): pass\nlist_of = []\ndef fails(): return 1 / 0\n"
    )
    assert load_dataset("owndata:toy_dataset") is toy_dataset()
    for name, message in (
        ("owndata:nothing", "gave 'NoneType': let it return an arq_env.datasets.Dataset"),
        ("owndata:some", "cannot be called with no arguments .missing a required argument: 'number'."),
        ("owndata:other", "no function 'other'"),
        ("owndata:list_of", "no function 'list_of'"),
        ("nodata:f", "module nodata cannot be imported .ModuleNotFoundError.*start from the folder"),
        ("own data:f", "no import string"),
        ("photos", "no data set 'photos'.*a folder of images"),
        ("photos/none.npz", "cannot be read as NumPy arrays"),
    ):
        with pytest.raises(ArqError, match=message):
            load_dataset(name)
    with pytest.raises(ZeroDivisionError):  # its own faults keep their traceback
        load_dataset("owndata:fails")


def test_options_that_data_do_not_have(tmp_path, monkeypatch):
    folder = write_folder(tmp_path, {"train": 10, "test": 2})
    np.savez(tmp_path / "toy.npz", **arrays())
    for data, options, message in (
        ("signs", {"flip": True}, "signs takes no flip"),
        ("signs", {"image_size": 32}, "takes no image_size"),
        (str(tmp_path / "toy.npz"), {"image_size": 32}, "takes no image_size"),
        (folder, {"image_size": 0}, "image_size is 0"),
        (folder, {"reward_images": 2.5}, "reward_images is 2.5"),
        (folder, {"reward_images": 20}, "20 reward images cannot be kept out of 20"),
    ):
        with pytest.raises(ArqError, match=message):
            load_dataset(data, **options)
    monkeypatch.delenv("ARQ_IMAGENET", raising=False)
    with pytest.raises(ArqError, match="set ARQ_IMAGENET"):
        load_dataset("imagenet")
    monkeypatch.setenv("ARQ_IMAGENET", folder)
    assert load_dataset("imagenet").counts["test"] == 4
