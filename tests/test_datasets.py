import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from arq_env import ArqError
from arq_env.datasets import REWARD_IMAGES, cache, cifar10, load_dataset, signs
from arq_env.support import files


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ARQ_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_signs_are_the_same_bytes_everywhere():
    images, labels = signs.render(100, seed=5)
    assert files.sha256(images) == "ef2535441f9fa17b2174ff4b9723e13a2e1a14864ad6b4b50087420690f1730f"
    assert np.bincount(labels).tolist() == [10] * 10
    again, _ = signs.render(100, seed=5)
    other, _ = signs.render(100, seed=6)
    assert np.array_equal(images, again) and not np.array_equal(images, other)


def test_signs_parts_are_disjoint_and_cached(empty_cache, monkeypatch):
    monkeypatch.setattr(signs, "SIZES", {"train": 2_600, "test": 300})
    data = load_dataset("signs")
    assert [len(part.images) for part in (data.train, data.reward, data.test)] == [
        2_600 - REWARD_IMAGES,
        REWARD_IMAGES,
        300,
    ]
    seen = [{image.tobytes() for image in part.images} for part in (data.train, data.reward, data.test)]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    assert [path.name for path in empty_cache.iterdir()] == ["signs-1.npz"]
    monkeypatch.setattr(signs, "render", lambda n, seed: pytest.fail("rendered again"))
    assert np.array_equal(load_dataset("signs").test.images, data.test.images)


def test_damaged_cache_is_an_error(empty_cache):
    empty_cache.mkdir()
    whole = io.BytesIO()
    np.savez(whole, train_images=np.zeros(5), train_labels=np.zeros(5))
    for name, dataset in [("signs-1.npz", "signs"), ("cifar10.npz", "cifar10")]:
        for content in (b"half a file", b"", whole.getvalue()[:-30], whole.getvalue()):
            (empty_cache / name).write_bytes(content)
            with pytest.raises(ArqError, match="delete it"):
                load_dataset(dataset)


def test_unknown_data_set():
    with pytest.raises(ArqError, match="cifar10, signs"):
        load_dataset("mnist")


def test_interrupted_write_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), files.atomic_file(tmp_path / "a" / "file") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert list((tmp_path / "a").iterdir()) == []


def test_what_a_kill_left_is_swept_an_hour_later(tmp_path):
    left, fresh, other = (tmp_path / name for name in (".file.1.part", ".file.2.part", ".else.1.part"))
    for path in (left, fresh, other):
        path.write_bytes(b"half")
    os.utime(left, (0, 0))
    with files.atomic_file(tmp_path / "file") as file:
        file.write(b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".else.1.part", ".file.2.part", "file"]


def test_full_disk_is_one_line(tmp_path):
    with (
        pytest.raises(ArqError, match="No space left on device.*free some space"),
        files.atomic_file(tmp_path / "file"),
    ):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "plain").write_text("")
    with pytest.raises(ArqError, match="cannot write"), files.atomic_file(tmp_path / "plain" / "file"):
        pass


def fake_source(name, failure=None, arrays=None):
    def source(scratch):
        if failure:
            (scratch / "half-a-download").write_bytes(b"x")
            raise failure
        return arrays

    source.__doc__ = name
    return source


def tiny_arrays():
    rng = np.random.default_rng(0)
    return {split: (rng.integers(0, 256, (20, 32, 32, 3), np.uint8), rng.integers(0, 10, 20)) for split in ("train", "test")}


@pytest.fixture
def tiny_cifar10(empty_cache, monkeypatch):
    """CIFAR-10 as if it had twenty images."""
    arrays = tiny_arrays()
    monkeypatch.setattr(cifar10, "DIGESTS", {split: files.sha256(images) for split, (images, _) in arrays.items()})
    monkeypatch.setattr(cifar10, "LABEL_DIGESTS", {split: files.sha256(labels) for split, (_, labels) in arrays.items()})
    return arrays


def test_no_source_reached_says_where_it_looked(empty_cache, monkeypatch):
    monkeypatch.setattr(cifar10, "_from_torchvision", fake_source("torchvision's source", OSError("no route")))
    monkeypatch.setattr(cifar10, "_from_npm", fake_source("the npm package", FileNotFoundError("npm is not installed")))
    with pytest.raises(ArqError) as error:
        cifar10.load_arrays()
    for part in (
        "no route",
        "npm is not installed",
        str(empty_cache),
        "cifar-10-python.tar.gz",
        "ARQ-ResNet20-Signs-v0",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value) and not empty_cache.exists()


def test_second_source_is_tried_and_kept(tiny_cifar10, empty_cache, monkeypatch):
    monkeypatch.setattr(cifar10, "_from_torchvision", fake_source("torchvision's source", OSError("no route")))
    monkeypatch.setattr(cifar10, "_from_npm", fake_source("the npm package", arrays=tiny_cifar10))
    first = cifar10.load_arrays()
    monkeypatch.setattr(cifar10, "_from_npm", lambda scratch: pytest.fail("downloaded again"))
    second = cifar10.load_arrays()
    assert np.array_equal(first["test"][0], second["test"][0]) and [p.name for p in empty_cache.iterdir()] == ["cifar10.npz"]


def test_other_pixels_are_refused(tiny_cifar10, empty_cache, monkeypatch):
    wrong = {split: (images ^ 1, labels) for split, (images, labels) in tiny_cifar10.items()}
    monkeypatch.setattr(cifar10, "_from_torchvision", fake_source("torchvision's source", arrays=wrong))
    monkeypatch.setattr(cifar10, "_from_npm", fake_source("the npm package", arrays=wrong))
    with pytest.raises(ArqError, match="SHA-256"):
        cifar10.load_arrays()
    assert not empty_cache.exists()


@pytest.mark.parametrize("change", [lambda labels: 0 * labels + 9, lambda labels: 0 * labels - 5, lambda labels: labels[::-1]])
def test_other_labels_are_refused(tiny_cifar10, empty_cache, change):
    cache.write_arrays(empty_cache / "cifar10.npz", tiny_cifar10)
    assert cifar10.load_arrays()["test"][1].tolist() == tiny_cifar10["test"][1].tolist()
    images, labels = tiny_cifar10["test"]
    cache.write_arrays(empty_cache / "cifar10.npz", tiny_cifar10 | {"test": (images, change(labels))})
    with pytest.raises(ArqError, match="test labels.*SHA-256"):
        cifar10.load_arrays()


def test_npm_package_is_read_in_order(tmp_path):
    """Six PNGs of one image a row, as the package has them, packed and unpacked."""
    rng = np.random.default_rng(0)
    images = {f"data_batch_{i}": rng.integers(0, 256, (4, 32, 32, 3), np.uint8) for i in range(1, 6)}
    images["test_batch"] = rng.integers(0, 256, (3, 32, 32, 3), np.uint8)
    with tarfile.open(tmp_path / "p.tgz", "w:gz") as archive:
        for name, pixels in images.items():
            Image.fromarray(pixels.reshape(len(pixels), 1024, 3)).save(tmp_path / "one.png")
            archive.add(tmp_path / "one.png", f"package/{name}.png")
        for split, n in (("train", 20), ("test", 3)):
            data = json.dumps(list(range(n))).encode()
            entry = tarfile.TarInfo(f"package/{split}_lables.json")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    with tarfile.open(tmp_path / "p.tgz") as archive:
        archive.extractall(tmp_path, filter="data")
    arrays = cifar10.read_npm_package(tmp_path / "package")
    assert np.array_equal(arrays["train"][0], np.concatenate([images[f"data_batch_{i}"] for i in range(1, 6)]))
    assert np.array_equal(arrays["test"][0], images["test_batch"])
    assert arrays["train"][1].tolist() == list(range(20))


def test_torchvision_imports_beside_any_torch():
    from arq_env.support.torchvision_import import import_torchvision

    torchvision = import_torchvision()
    assert torchvision.models.resnet18(num_classes=2) and torchvision.datasets.CIFAR10
    assert import_torchvision() is torchvision


@pytest.mark.slow
def test_cifar10_is_cifar10():
    data = load_dataset("cifar10")
    assert [len(part.images) for part in (data.train, data.reward, data.test)] == [48_000, 2_000, 10_000]
    assert np.allclose(
        np.concatenate([data.train.images, data.reward.images]).mean((0, 1, 2)) / 255,
        (0.49139968, 0.48215841, 0.44653091),
    )
    assert data.test.labels[:4].tolist() == [3, 8, 8, 0]
