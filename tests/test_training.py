import json
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from arq_env import ArqError
from arq_env.datasets import Split
from arq_env.datasets.augment import random_crop, to_float
from arq_env.networks import checkpoints, memory
from arq_env.networks.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from arq_env.networks.memory import images_at_once, kept_bytes
from arq_env.networks.recipe import Recipe, training_method
from arq_env.networks.resnet import resnet20
from arq_env.networks.training import noisy_accuracy, smoothing_loss, train
from tests.toy import ToyNet, toy_dataset, toy_network

RECIPE = Recipe(epochs=3, batch=50, peak_rate=0.1)


def fresh():
    torch.manual_seed(0)
    return ToyNet()


@pytest.mark.parametrize(
    "recipe",
    [RECIPE, replace(RECIPE, **training_method("consistency", 0.5)), replace(RECIPE, optimizer="adamw", peak_rate=0.01)],
    ids=["gaussian", "consistency", "adamw"],
)
def test_a_killed_training_resumes_to_the_same_weights(recipe, tmp_path):
    whole, cut = fresh(), fresh()
    train(whole, toy_dataset(), recipe, tmp_path / "whole")

    class Killed(Exception):
        pass

    batches = []

    def dying(count):
        batches.append(count)
        if sum(batches) == 40:  # in the middle of the second epoch
            raise Killed

    with pytest.raises(Killed):
        train(cut, toy_dataset(), recipe, tmp_path / "cut", on_batch=dying)
    resumed, seen = ToyNet(), []
    history = train(resumed, toy_dataset(), recipe, tmp_path / "cut", on_batch=seen.append)
    assert seen[:2] == [26, 1] and sum(seen) == 78  # a progress bar starts at the first epoch's end
    assert [record["epoch"] for record in history] == [1, 2, 3]
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


class WithoutNorm(torch.nn.Sequential):
    """What it computes of an image does not depend on the images beside it, in training either."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 3))


@pytest.mark.parametrize("noises", [1, 2])
def test_a_batch_in_parts_has_the_whole_batch_s_gradient(noises, tmp_path, monkeypatch):
    monkeypatch.setattr("arq_env.networks.training.random_crop", lambda images, *_, **__: images)  # parts draw other ones
    monkeypatch.setattr(torch, "randn", lambda shape, **_: torch.zeros(shape))
    recipe, trained = replace(RECIPE, epochs=1, noises=noises, consistency=float(noises - 1)), {}
    for at_once in (None, 50, 20):
        trained[at_once] = WithoutNorm()
        together = None if at_once is None else at_once * noises
        train(trained[at_once], toy_dataset(), recipe, tmp_path / str(at_once), at_once=together)
    states = [network.state_dict() for network in trained.values()]
    for name, whole in states[0].items():
        assert torch.equal(whole, states[1][name]), name
        torch.testing.assert_close(whole, states[2][name], msg=name)
    assert belongs(tmp_path / "20") != belongs(tmp_path / "50") == belongs(tmp_path / "None")


def belongs(folder) -> str:
    return torch.load(folder / "training.pt", weights_only=True)["belongs_to"]


def test_as_many_images_go_through_together_as_memory_holds(tmp_path, monkeypatch):
    shape, network = toy_dataset().image_shape, fresh()
    assert images_at_once(network, shape, 50) == 50
    image = (kept_bytes(network, torch.rand(12, *shape)) - kept_bytes(network, torch.rand(2, *shape))) // 10
    monkeypatch.setattr(memory, "KEPT_BYTES", 20 * image)
    assert 18 <= images_at_once(network, shape, 50) <= 20
    monkeypatch.setattr(memory, "KEPT_BYTES", 1)
    assert images_at_once(network, shape, 50) == 2 and images_at_once(network, shape, 1) == 1
    sizes = []
    network.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])) if module.training else None)
    train(network, toy_dataset(), replace(RECIPE, epochs=1), tmp_path)
    assert set(sizes) == {2, 4} and sum(sizes) == 6 + 26 * 50  # 4: measuring what is kept
    monkeypatch.undo()
    history = train(fresh(), toy_dataset(), replace(RECIPE, epochs=1, batch=5, images=20), tmp_path / "odd", at_once=1)
    assert history[0]["parts_of_a_batch"] == 2  # no part has a single image, which BatchNorm could not stand
    torch.manual_seed(3)
    before = torch.get_rng_state()
    images_at_once(network, shape, 50)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ArqError, match="parts_of_a_batch"):
        train(fresh(), toy_dataset(), replace(RECIPE, epochs=1), tmp_path)


def test_loss_is_the_published_one():
    """Cross-entropy over all copies, lambda times the mean KL(p || p_i), eta times the entropy of p, the copies' mean."""
    torch.manual_seed(0)
    logits, labels = torch.randn(3 * 4, 5), torch.tensor([0, 4, 2, 2])
    p_i = logits.softmax(1).view(3, 4, 5)
    p = p_i.mean(0)
    cross_entropy = -torch.stack([p_i[i, j, labels[j]].log() for i in range(3) for j in range(4)]).mean()
    divergence = torch.stack([(p * (p / p_i[i]).log()).sum(1) for i in range(3)]).mean()
    entropy = -(p * p.log()).sum(1).mean()
    got = smoothing_loss(logits, labels, noises=3, consistency=10.0, entropy=0.5)
    torch.testing.assert_close(got, cross_entropy + 10 * divergence + 0.5 * entropy)
    torch.testing.assert_close(smoothing_loss(logits, labels, noises=3), cross_entropy)
    same = smoothing_loss(logits[:4].repeat(2, 1), labels, noises=2, consistency=1e3)
    torch.testing.assert_close(same, torch.nn.functional.cross_entropy(logits[:4], labels))
    assert smoothing_loss(logits[:4] * 1e4, labels[:4], consistency=1.0, entropy=1.0).isfinite()


def test_training_methods():
    assert training_method("gaussian", 0.5) == {"noises": 1, "consistency": 0.0, "entropy": 0.0}
    assert [training_method("consistency", sigma)["consistency"] for sigma in (0.25, 0.5, 1.0)] == [20, 10, 10]
    with pytest.raises(ArqError, match="gaussian or consistency"):
        training_method("magic", 0.5)


@pytest.mark.parametrize("change", [{"noises": 0}, {"consistency": -1.0}, {"entropy": float("nan")}])
def test_recipe_out_of_range(change):
    with pytest.raises(ArqError, match=next(iter(change))):
        Recipe(**change)


def test_training_teaches_noise():
    accuracy = noisy_accuracy(toy_network(), *toy_dataset().test, sigma=0.5)
    assert accuracy > 0.6 > noisy_accuracy(fresh(), *toy_dataset().test, sigma=0.5)


def test_each_cycle_ends_at_rest_and_starts_the_next(tmp_path):
    history = train(fresh(), toy_dataset(), Recipe(epochs=4, batch=50, peak_rate=0.1, cycles=2), tmp_path)
    rates = [record["rate"] for record in history]
    assert rates[0] == rates[2] > 100 * rates[1] == 100 * rates[3]
    with pytest.raises(ArqError, match="divisor"):
        Recipe(epochs=4, cycles=3)


def test_cycles_of_few_steps(tmp_path):
    data = toy_dataset()
    for steps in (1, 2, 5, 6):
        few = replace(data, train=Split(data.train.images[: 20 * steps], data.train.labels[: 20 * steps]))
        history = train(fresh(), few, Recipe(epochs=1, batch=20, peak_rate=0.1), tmp_path / str(steps))
        assert np.isfinite(history[0]["loss"])


def test_another_recipe_is_not_resumed(tmp_path):
    train(fresh(), toy_dataset(), Recipe(epochs=1, batch=50), tmp_path)
    with pytest.raises(ArqError, match="differs in recipe"):
        train(fresh(), toy_dataset(), Recipe(epochs=1, batch=50, sigma=0.25), tmp_path)


def test_another_data_set_is_not_resumed(tmp_path):
    recipe, data = Recipe(epochs=1, batch=50), toy_dataset()
    train(fresh(), data, recipe, tmp_path)
    other = replace(data, train=Split(data.train.images, np.roll(data.train.labels, 1)))
    with pytest.raises(ArqError, match="differs in data set"):
        train(fresh(), other, recipe, tmp_path)
    with pytest.raises(ArqError, match="differs in what else"):
        train(fresh(), data, recipe, tmp_path, what={"what else": 1})
    with pytest.raises(ArqError, match="cannot be gone on from"):
        train(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3)), data, recipe, tmp_path)


@pytest.mark.parametrize("damage", [lambda data: data[:-40], lambda data: b"", lambda data: b"nonsense", lambda data: data[:200]])
def test_a_damaged_state_is_one_line(tmp_path, damage):
    train(fresh(), toy_dataset(), Recipe(epochs=1, batch=650), tmp_path)
    path = tmp_path / "training.pt"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ArqError, match="cannot be gone on from.*delete it") as error:
        train(fresh(), toy_dataset(), Recipe(epochs=1, batch=650), tmp_path)
    assert "\n" not in str(error.value)


def test_a_full_disk_is_one_line(tmp_path):
    """Whatever is written, through torch.save as well; what was there stays."""
    resource = pytest.importorskip("resource")
    train(fresh(), toy_dataset(), Recipe(epochs=1, batch=650), tmp_path)
    before = (tmp_path / "training.pt").read_bytes()
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, limits[1]))
    try:
        with pytest.raises(ArqError, match="cannot write .*training.pt"):
            train(fresh(), toy_dataset(), Recipe(epochs=1, batch=650), tmp_path / "new")
        with pytest.raises(ArqError, match="cannot write .*a.safetensors"):
            save_checkpoint(fresh(), tmp_path / "a.safetensors", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "training.pt").read_bytes() == before and list((tmp_path / "new").iterdir()) == []


def test_distillation_needs_a_teacher(tmp_path):
    recipe = Recipe(epochs=1, batch=50, distillation=1.0)
    for teacher in (None, fresh()):  # the latter in training mode
        with pytest.raises(ArqError, match="no teacher in evaluation mode"):
            train(fresh(), toy_dataset(), recipe, tmp_path, teacher=teacher)
    assert not list(tmp_path.iterdir())


def test_crops_are_windows_of_the_padded_image():
    images = torch.randint(1, 256, (200, 8, 8, 3), dtype=torch.uint8)
    cropped = random_crop(images, torch.Generator().manual_seed(0), flip=True)
    padded = torch.nn.functional.pad(images, (0, 0, 4, 4, 4, 4))
    seen = set()
    for image, crop in zip(padded, cropped, strict=True):
        windows = [
            (r, c, f)
            for r in range(9)
            for c in range(9)
            for f in (0, 1)
            if torch.equal(crop, (lambda w: w.flip(1) if f else w)(image[r : r + 8, c : c + 8]))
        ]
        assert windows
        seen.add(windows[0])
    assert len({s[:2] for s in seen}) > 60 and {s[2] for s in seen} == {0, 1}
    straight = random_crop(images, torch.Generator().manual_seed(0), flip=False)
    assert sum(torch.equal(a, b) for a, b in zip(straight, cropped, strict=True)) > 50
    assert to_float(images).shape == (200, 3, 8, 8) and to_float(images).max() <= 1


@pytest.fixture
def saved(tmp_path):
    checkpoint = Checkpoint("resnet20", "cifar10", 0.25)
    torch.manual_seed(0)
    network = resnet20()
    save_checkpoint(network, checkpoint.path(tmp_path), {"sigma": 0.25})
    return checkpoint, network, tmp_path


def test_checkpoint_comes_back(saved):
    checkpoint, network, folder = saved
    loaded, card = load_checkpoint(checkpoint, folder)
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), loaded.state_dict().values(), strict=True))
    assert card["sigma"] == 0.25 and len(card["digest"]) == 64 and not loaded.training


def test_damaged_checkpoints(saved):
    checkpoint, _, folder = saved
    path = checkpoint.path(folder)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ArqError, match="damaged"):
        load_checkpoint(checkpoint, folder)
    path.write_bytes(whole)
    path.with_suffix(".json").write_text("{")
    with pytest.raises(ArqError, match="cannot be loaded"):
        load_checkpoint(checkpoint, folder)
    path.with_suffix(".json").unlink()
    with pytest.raises(ArqError, match="no checkpoint resnet20-cifar10-sigma0.25-gaussian"):
        load_checkpoint(checkpoint, folder)
    with pytest.raises(ArqError, match="no network 'vgg'"):
        load_checkpoint(Checkpoint("vgg", "cifar10", 0.25), folder)


def test_the_shipped_checkpoints_are_small():
    there = [(c.network, c.dataset, c.sigma, c.training) for c in checkpoints.shipped()]
    cifar10 = [("resnet20", "cifar10", sigma, training) for sigma in (0.25, 0.5, 1.0) for training in ("gaussian", "consistency")]
    assert [one for one in there if one[0] == "resnet20"] == [*cifar10, ("resnet20", "signs", 0.5, "gaussian")]
    sizes = {path.name: path.stat().st_size for path in checkpoints.SHIPPED.iterdir()}
    assert max(sizes.values()) < 4e6 and sum(sizes.values()) < 20e6


@pytest.mark.parametrize("path", sorted(checkpoints.SHIPPED.glob("*.safetensors")), ids=lambda path: path.stem)
def test_shipped_checkpoints_load_and_are_what_their_card_says(path):
    card = json.loads(path.with_suffix(".json").read_text())
    checkpoint = Checkpoint(card["network"], card["dataset"], card["sigma"], card["training"])
    assert checkpoint.name == path.stem
    network, _ = load_checkpoint(checkpoint)
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert {"recipe", "command", "digest", "accuracy_under_noise", "versions"} <= card.keys()
    if card["dataset"] == "signs":
        from arq_env.datasets import load_dataset

        test = load_dataset("signs").test
        assert noisy_accuracy(network, *test, sigma=card["sigma"]) == pytest.approx(card["accuracy_under_noise"]["test"], abs=0.005)
