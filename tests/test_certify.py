import concurrent.futures
import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from arq_env import ArqError
from arq_env.certification import ABSTAINED, Certificates, certify

SETTINGS = {"sigma": 0.5, "n0": 20, "n": 200, "alpha": 0.01}


def halfspace(images):
    """Class 1 where the mean pixel is above 0.5: its smoothed class and radius are known in closed form."""
    margin = images.reshape(len(images), -1).mean(1) - 0.5
    return np.stack([-margin, margin], axis=1)


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return (rng.random((37, 3, 4, 4)) * 0.2 + np.linspace(0.3, 0.5, 37)[:, None, None, None]).astype(np.float32)


def true_radius(images):
    """Distance to the hyperplane on which the mean pixel is 0.5."""
    flat = images.reshape(len(images), -1)
    return np.abs(flat.mean(1) - 0.5) * np.sqrt(flat.shape[1])


def table(certificates):
    return certificates.prediction.tolist(), certificates.radius.tolist()


def test_radii_are_sound_and_close_to_the_truth(images):
    labels = (images.mean((1, 2, 3)) > 0.5).astype(int)
    got = certify(halfspace, images, labels, **SETTINGS | {"n0": 1_000, "n": 5_000, "alpha": 1e-6})
    truth = true_radius(images)
    certain = got.prediction != ABSTAINED
    assert certain.sum() > 20
    assert (got.prediction[certain] == labels[certain]).all()
    assert (got.radius <= truth).all()
    reachable = np.minimum(truth, 0.8)
    assert (got.radius >= reachable - 0.1).all()


def test_failures_stay_under_alpha(images):
    """The share of certificates above the true radius, over many seeds, is at most alpha."""
    few, alpha = images[::6], 0.05
    failures = trials = 0
    for seed in range(150):
        got = certify(halfspace, few, np.zeros(len(few)), sigma=0.5, n0=10, n=100, alpha=alpha, seed=seed)
        truth = np.where(got.prediction == (few.mean((1, 2, 3)) > 0.5), true_radius(few), 0)
        failures += int((got.radius > truth).sum())
        trials += len(few)
    assert stats.binom.sf(failures - 1, trials, alpha) > 1e-6, (failures, trials)


def test_batch_size_changes_nothing(images):
    labels = np.zeros(len(images))
    expected = table(certify(halfspace, images, labels, **SETTINGS))
    for batch_size in (1, 7, 1_000):
        assert table(certify(halfspace, images, labels, batch_size=batch_size, **SETTINGS)) == expected


def test_order_of_images_changes_nothing(images):
    order = np.random.default_rng(1).permutation(len(images))
    forward = certify(halfspace, images, np.arange(37), **SETTINGS)
    shuffled = certify(halfspace, images[order], np.arange(37)[order], **SETTINGS)
    np.testing.assert_array_equal(shuffled.radius, forward.radius[order])
    np.testing.assert_array_equal(shuffled.label, order)


def test_map_changes_nothing(images):
    labels = np.zeros(len(images))
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        assert table(certify(halfspace, images, labels, map=threads.map, **SETTINGS)) == table(
            certify(halfspace, images, labels, **SETTINGS)
        )


def test_seed_and_selection_noise_matter(images):
    labels = np.zeros(len(images))
    assert table(certify(halfspace, images, labels, seed=1, **SETTINGS)) != table(certify(halfspace, images, labels, **SETTINGS))
    seen = []

    def recording(batch):
        seen.append(batch.copy())
        return halfspace(batch)

    certify(recording, images[:1], [0], sigma=0.5, n0=8, n=8, alpha=0.1, batch_size=8)
    assert len(seen) == 2 and not np.allclose(seen[0], seen[1])  # the class is counted on noise that did not select it


def test_torch_modules_tensors_and_labels_agree(images):
    class Module(torch.nn.Module):
        def forward(self, x):
            assert x.dtype == torch.float32
            margin = x.flatten(1).mean(1) - 0.5
            return torch.stack([-margin, margin], 1)

    labels = np.zeros(len(images))
    expected = table(certify(Module().eval(), images, labels, **SETTINGS))
    assert table(certify(Module().eval(), torch.from_numpy(images), torch.zeros(37), **SETTINGS)) == expected
    assert table(certify(lambda x: Module()(x).argmax(1), torch.from_numpy(images), labels, **SETTINGS)) == expected


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("index", [0, 7, 19])
def test_bad_logits_are_an_error_that_names_the_image(value, index):
    images = np.stack([np.full((1, 2, 2), i / 20, np.float32) for i in range(20)])

    def broken(batch):
        return np.where(np.abs(batch.mean((1, 2, 3)) - index / 20)[:, None] < 0.02, value, [[1.0, 0.0]])

    with pytest.raises(ArqError, match=f"image {index}:"):
        certify(broken, images, np.zeros(20), sigma=1e-4, n0=2, n=4, alpha=0.1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sigma": 0}, "sigma"),
        ({"sigma": np.nan}, "sigma"),
        ({"alpha": 0}, "alpha"),
        ({"alpha": 1}, "alpha"),
        ({"n": 0}, "n is 0"),
        ({"n0": 0}, "n0 is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"method": "magic"}, "cohen"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"radius": 0.5}, "Sequential"),
        ({"method": "incremental"}, "needs a cache"),
    ],
)
def test_arguments_out_of_range(images, change, message):
    with pytest.raises(ArqError, match=message):
        certify(halfspace, images, np.zeros(37), **SETTINGS | change)


def test_images_and_labels_out_of_range(images):
    with pytest.raises(ArqError, match=r"\[0, 1\]"):
        certify(halfspace, images * 255, np.zeros(37), **SETTINGS)
    with pytest.raises(ArqError, match=r"\[0, 1\]"):
        certify(halfspace, images * np.nan, np.zeros(37), **SETTINGS)
    with pytest.raises(ArqError, match="one label an image"):
        certify(halfspace, images, np.zeros(36), **SETTINGS)
    with pytest.raises(ArqError, match="one label an image"):
        certify(halfspace, images, [0] * 38, **SETTINGS)
    for bad in (0.9, -2, np.nan):
        with pytest.raises(ArqError, match="whole numbers"):
            certify(halfspace, images, np.full(37, bad), **SETTINGS)
    with pytest.raises(ArqError, match="at least one image"):
        certify(halfspace, images[:0], np.zeros(0), **SETTINGS)


def test_a_coin_is_abstained_on():
    rng = np.random.default_rng(0)
    got = certify(lambda batch: rng.integers(0, 2, len(batch)), np.zeros((4, 1, 4, 4)), np.zeros(4), **SETTINGS)
    assert (got.prediction == ABSTAINED).all() and not got.radius.any() and got.acr == 0 and got.clean_accuracy == 0


def test_summary():
    got = Certificates(
        label=np.array([0, 1, 2, 3]),
        prediction=np.array([0, 1, 0, ABSTAINED]),
        radius=np.array([0.4, 0.2, 0.9, 0.0]),
        n=np.full(4, 100),
        seconds=np.zeros(4),
    )
    assert got.acr == pytest.approx(0.15)  # a wrong prediction's radius counts for nothing
    assert got.clean_accuracy == 0.5
    assert [got.certified_accuracy(r) for r in (0, 0.2, 0.3, 0.5)] == [0.5, 0.5, 0.25, 0]


def test_count_at_its_ends(images):
    """k = n gives the largest radius that n samples can, k = 0 none, with two classes and a single image."""
    one = images[:1]
    always = certify(lambda batch: np.ones(len(batch), int), one, [1], **SETTINGS)
    assert always.radius[0] == pytest.approx(0.5 * stats.norm.ppf(0.01 ** (1 / 200))) and always.prediction[0] == 1
    calls = []

    def turncoat(batch):  # class 0 while it is selected, never again
        calls.append(len(batch))
        return np.full(len(batch), int(sum(calls) > SETTINGS["n0"]))

    never = certify(turncoat, one, [0], batch_size=SETTINGS["n0"], **SETTINGS)
    assert never.prediction[0] == ABSTAINED and never.radius[0] == 0


def test_ties_select_the_smallest_class(images):
    alternate = itertools.cycle([2, 1])
    got = certify(lambda batch: np.array([next(alternate) for _ in batch]), images[:1], [1], sigma=0.5, n0=8, n=8, alpha=0.1)
    assert got.prediction[0] == ABSTAINED  # 4 of 8 for class 1


def test_table_comes_back_as_written(images, tmp_path):
    got = certify(halfspace, images, np.zeros(37), **SETTINGS)
    got.to_tsv(tmp_path / "table.tsv")
    assert (tmp_path / "table.tsv").read_text().splitlines()[0] == "idx\tlabel\tpredict\tradius\tcorrect\ttime"
    assert table(Certificates.from_tsv(tmp_path / "table.tsv")) == table(got)


def test_published_log_is_read(tmp_path):
    path = tmp_path / "published.tsv"
    path.write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t3\t3\t0.62\t1\t0:00:10.500000\n20\t1\t-1\t0.0\t0\t0:01:00\n")
    got = Certificates.from_tsv(path)
    assert got.acr == pytest.approx(0.31) and got.seconds.tolist() == [10.5, 60]
    path.write_text("nothing of the kind")
    with pytest.raises(ArqError, match="not a whole certification log"):
        Certificates.from_tsv(path)


@pytest.mark.parametrize(
    "output, message",
    [
        (lambda batch: np.zeros((len(batch), 1)), "two classes or more"),
        (lambda batch: np.full(len(batch), 0.9), "whole numbers"),
        (lambda batch: np.zeros((len(batch), 2, 2)), "logits"),
        (lambda batch: np.zeros((1, 2)), "for 32 images"),
        (lambda batch: np.full(len(batch), -1), "label -1"),
    ],
)
def test_output_that_is_neither_logits_nor_labels(images, output, message):
    with pytest.raises(ArqError, match=message):
        certify(output, images, np.zeros(37), **SETTINGS)


def test_modules_get_the_memory_layout_of_their_kernels():
    """An ordinary module may use view(); one that is channels-last gets such batches."""
    images, layouts = np.full((2, 3, 4, 4), 0.5), []

    class Views(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(16, 2)

        def forward(self, x):
            layouts.append(x.is_contiguous())
            return self.last(self.conv(x).view(len(x), -1) if x.is_contiguous() else self.conv(x).flatten(1))

    network = Views().eval()
    plain = certify(network, images, [0, 0], **SETTINGS)
    assert all(layouts)
    layouts.clear()
    assert table(certify(network.to(memory_format=torch.channels_last), images, [0, 0], **SETTINGS)) == table(plain)
    assert not any(layouts)
    kernel = network.conv.weight.detach()
    del network.conv.weight
    network.conv.register_buffer("weight", kernel)  # as in a quantized layer
    layouts.clear()
    assert table(certify(network, images, [0, 0], **SETTINGS)) == table(plain) and not any(layouts)


def test_numpy_numbers_and_unusual_modules_can_be_logged(images, tmp_path):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2)).eval()
    numbers = {"sigma": np.float32(0.5), "n0": np.int64(20), "n": np.int64(50), "alpha": np.float64(0.01), "seed": np.int64(1)}
    certify(network, images, np.zeros(37), log=tmp_path / "numbers.tsv", **numbers)
    half = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2).bfloat16()).eval()
    with torch.autocast("cpu", torch.bfloat16):
        certify(half, images, np.zeros(37), log=tmp_path / "half.tsv", **SETTINGS)


def test_published_log_with_an_image_twice_is_refused(tmp_path):
    header, row = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n", "\t3\t3\t0.62\t1\t0.1\n"
    (tmp_path / "log.tsv").write_text(header + "20" + row + "0" + row.replace("3", "5"))
    assert Certificates.from_tsv(tmp_path / "log.tsv").label.tolist() == [5, 3]
    (tmp_path / "log.tsv").write_text(header + "0" + row + "0" + row)
    with pytest.raises(ArqError, match="twice"):
        Certificates.from_tsv(tmp_path / "log.tsv")


def test_training_mode_is_an_error():
    classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(48, 2))
    images = np.full((2, 3, 4, 4), 0.5)
    with pytest.raises(ArqError, match="eval()"):
        certify(classifier, images, [0, 0], **SETTINGS)
    classifier.eval()[1].train()
    with pytest.raises(ArqError, match="eval()"):
        certify(classifier, images, [0, 0], **SETTINGS)
    assert len(certify(classifier.eval(), images, [0, 0], **SETTINGS)) == 2


@pytest.mark.slow
def test_agreement_with_another_implementation():
    """adversarial-robustness-toolbox's randomized smoothing of the same network: radii agree within the sampling error."""
    from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing  # takes two seconds

    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3)).eval()
    rng = np.random.default_rng(0)
    images = rng.random((24, 3, 4, 4)).astype(np.float32)
    sigma, n0, n, alpha = 0.25, 100, 4_000, 0.001
    ours = certify(network, images, np.zeros(24), sigma=sigma, n0=n0, n=n, alpha=alpha)
    other = PyTorchRandomizedSmoothing(
        model=network,
        loss=torch.nn.CrossEntropyLoss(),
        input_shape=(3, 4, 4),
        nb_classes=3,
        device_type="cpu",
        sample_size=n0,
        scale=sigma,
        alpha=alpha,
    )
    np.random.seed(0)
    prediction, radius = other.certify(images, n=n, batch_size=500)
    both = (prediction >= 0) & (ours.prediction >= 0)
    assert both.sum() > 15 and (prediction[both] == ours.prediction[both]).all()
    assert ((prediction < 0) == (ours.prediction < 0)).mean() > 0.9
    # the counts behind both are independent draws of B(n, p): compare the bounds they were turned into
    ours_p, other_p = (stats.norm.cdf(r[both] / sigma) for r in (ours.radius, radius))
    spread = np.sqrt(2 * ours_p * (1 - ours_p) / n)
    assert (np.abs(ours_p - other_p) < 5 * spread + 2e-3).all()
    assert np.abs(ours_p - other_p).mean() < 1.5 * spread.mean()
