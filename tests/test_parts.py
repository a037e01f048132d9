"""What a data set of one's own may look like, and that what it may not is one sentence."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from arq_env import ArqError
from arq_env.datasets import Dataset, Split
from arq_env.datasets.augment import to_float
from arq_env.evaluation import CertifierSettings, Evaluator
from arq_env.networks.training import noisy_accuracy
from tests.toy import toy_dataset, toy_network, toy_problem

REWARD = toy_dataset().reward


def with_reward(images=REWARD.images, labels=REWARD.labels, **changes) -> Dataset:
    return replace(toy_dataset(), reward=Split(images, labels), **changes)


@pytest.mark.parametrize(
    "images, message",
    [
        ((REWARD.images / 255).astype(np.float32), r"float32: give uint8.*\(255 \* images\)"),
        (REWARD.images.astype(np.float32), "float32: give uint8"),
        (REWARD.images.astype(np.uint16) * 257, "uint16"),
        (REWARD.images.astype(np.int64), "int64"),
        (REWARD.images > 99, "bool"),
        (torch.as_tensor(REWARD.images).float().requires_grad_(), "no array"),
        (REWARD.images.transpose(0, 3, 1, 2), r"channels first.*images.transpose\(0, 2, 3, 1\)"),
        (REWARD.images[..., 0], r"grey.*images\[..., None\]"),
        (REWARD.images[:0], r"shape \(0, 8, 8, 3\)"),
        (REWARD.images[:, :0], "shape"),
        (REWARD.images.repeat(2, 3), "6"),
        (REWARD.images[0], "grey"),
        (REWARD.images[:, :7], r"\(7, 8, 3\).*same shape"),
        (REWARD.images[..., :1], "same shape"),
        (REWARD.images[:63], "63 images and 64 labels"),
        ([[[[1]]], [[[1, 2]]]], "no array"),
        (None, "object"),
        ("images.npy", "<U10"),
    ],
)
def test_images_of_another_form(images, message):
    with pytest.raises(ArqError, match=f"reward.*{message}"):
        with_reward(images)


@pytest.mark.parametrize(
    "labels, message",
    [
        (REWARD.labels + 1, "include 3: give whole numbers from 0 to 2"),
        (REWARD.labels - 1, "include -1"),
        (REWARD.labels + 0.5, r"include \d.5"),
        (np.where(REWARD.labels == 0, np.nan, REWARD.labels), "include nan"),
        (REWARD.labels.astype(np.uint64) + 2**63, "include 9223372036854775"),
        (REWARD.labels[:, None], r"\(64, 1\)"),
        (np.eye(3)[REWARD.labels], r"\(64, 3\)"),
        (REWARD.labels[:63], "64 images and 63 labels"),
        ([["red"], ["blue"]], "one whole number"),
        (["red"] * 64, "one whole number"),
        (3, "one whole number"),
    ],
)
def test_labels_of_another_form(labels, message):
    with pytest.raises(ArqError, match=f"reward.*{message}"):
        with_reward(labels=labels)


@pytest.mark.parametrize(
    "convert",
    [list, torch.as_tensor, np.uint8, np.int32, np.float64, np.asfortranarray],
    ids=["list", "torch", "uint8", "int32", "float64", "order"],
)
def test_labels_in_any_form_of_whole_numbers(convert):
    part = with_reward(labels=convert(REWARD.labels)).reward
    assert part.labels.dtype == np.int64 and np.array_equal(part.labels, REWARD.labels)


def test_images_in_any_form_of_bytes_are_read_and_never_written(tmp_path):
    np.save(tmp_path / "images.npy", REWARD.images)
    for images in (
        torch.as_tensor(REWARD.images),
        np.broadcast_to(REWARD.images, REWARD.images.shape),
        np.load(tmp_path / "images.npy", mmap_mode="r"),
        REWARD.images[::-1][::-1],
        np.ascontiguousarray(REWARD.images[:, ::-1])[:, ::-1],
        np.asfortranarray(REWARD.images),
    ):
        before = np.asarray(images).copy()
        problem = toy_problem(load=lambda images=images: with_reward(images))
        given, _ = problem.reward_images(64)
        torch.testing.assert_close(given, to_float(torch.as_tensor(REWARD.images)))
        accuracy = noisy_accuracy(problem.network, *problem.dataset.reward, sigma=0.5)
        assert accuracy == noisy_accuracy(problem.network, *REWARD, sigma=0.5) and np.array_equal(before, np.asarray(images))
        assert problem.data_digest == toy_problem().data_digest
    for images in (torch.rand(4, 8, 8, 3), torch.ones(4, 8, 8, 3).double()):
        kept = images.clone()
        with pytest.raises(ArqError, match="give uint8"):
            to_float(images)
        with pytest.raises(ArqError, match="give uint8"):
            noisy_accuracy(toy_network(), images.numpy(), [0] * 4, sigma=0.5)
        assert torch.equal(images, kept)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"classes": ()}, "two or more"),
        ({"classes": ("one",)}, "two or more"),
        ({"classes": 3}, "two or more"),
        ({"classes": "rgb"}, "two or more"),
        ({"flip": "no"}, "True or False"),
        ({"train": None}, "train part"),
        ({"train": (REWARD.images, REWARD.labels, 3)}, "train part"),
    ],
)
def test_data_sets_of_another_form(change, message):
    with pytest.raises(ArqError, match=message):
        replace(toy_dataset(), **change)
    pairs = {part: tuple(getattr(toy_dataset(), part)) for part in ("train", "reward", "test")}
    assert replace(toy_dataset(), **pairs).digest == toy_dataset().digest  # plain tuples will do


def test_parts_that_share_images():
    data = toy_dataset()
    for change in (
        {"test": data.reward},
        {"reward": Split(data.test.images[:2], data.test.labels[:2])},  # few of the test images, and nothing else
        {"reward": Split(data.train.images[-64:], data.train.labels[-64:])},
        {"test": Split(np.concatenate([data.test.images, data.train.images[:1]]), np.append(data.test.labels, 0))},
        {
            "train": Split(
                np.concatenate([data.train.images, data.reward.images]), np.concatenate([data.train.labels, data.reward.labels])
            )
        },
    ):
        with pytest.raises(ArqError, match=r"\d+ of the \d+ (test|reward) images are among the (train|reward) images"):
            replace(data, **change)


def test_data_digest_sees_every_pixel_and_label():
    data, seen = toy_dataset(), {toy_dataset().digest}
    for part in ("train", "reward", "test"):
        images, labels = (array.copy() for array in getattr(data, part))
        images[-1, -1, -1, -1] ^= 1
        seen.add(replace(data, **{part: Split(images, getattr(data, part).labels)}).digest)
        labels[-1] = (labels[-1] + 1) % 3
        seen.add(replace(data, **{part: Split(getattr(data, part).images, labels)}).digest)
    assert len(seen) == 7


def test_the_input_shape_is_that_of_the_images():
    for shape in ((3, 32, 32), (8, 8, 3), (1, 8, 8)):
        problem = toy_problem(input_shape=shape)
        with pytest.raises(ArqError, match=r"give input_shape=\(3, 8, 8\)"):
            problem.reward_images(1)
    with pytest.raises(ArqError, match="load.. gave 'NoneType'"):
        toy_problem(load=lambda: None).reward_images(1)


def test_checking_a_large_data_set_is_quick():
    """The time for CIFAR-10's 60,000 images, from a tenth of them; twenty times the budget, for a busy machine."""
    rng = np.random.default_rng(0)
    parts = [Split(rng.integers(0, 256, (n, 32, 32, 3), np.uint8), rng.integers(0, 10, n)) for n in (4_800, 200, 1_000)]
    start = time.perf_counter()
    Dataset("large", tuple("0123456789"), True, *parts)
    assert 10 * (time.perf_counter() - start) < 20


def test_rewards_of_float_images_are_refused_before_anything_is_certified():
    floats = (REWARD.images / 255).astype(np.float32)
    evaluator = Evaluator(toy_problem(load=lambda: with_reward(floats)), CertifierSettings(images=16))
    with pytest.raises(ArqError, match="float32"):
        _ = evaluator.reference
