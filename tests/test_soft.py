import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from arq_env import ArqError
from arq_env.certification import certify, soft_radius, softmax_entropy
from tests.toy import toy_network, toy_problem

SIGMA = 0.5


class Hyperplane(nn.Module):
    """Two classes on the two sides of a plane, the sharper the more certain."""

    def __init__(self, sharpness: float):
        super().__init__()
        self.normal = nn.Parameter(torch.ones(3 * 8 * 8) / np.sqrt(3 * 8 * 8))
        self.sharpness = sharpness
        self.eval()

    def forward(self, images):
        distance = (images.flatten(1) - 0.5) @ self.normal
        return self.sharpness * torch.stack([-distance, distance], 1)


def test_the_soft_radius_of_a_sharp_classifier_is_the_distance_to_its_boundary():
    images = torch.full((2, 3, 8, 8), 0.5) + torch.tensor([0.02, -0.03])[:, None, None, None]
    distance = np.array([0.02, -0.03]) * np.sqrt(3 * 8 * 8)
    got = soft_radius(Hyperplane(1e4), images, np.array([1, 1]), sigma=SIGMA, n=20_000)
    np.testing.assert_allclose(got, distance, atol=0.02)


def test_a_soft_classifier_has_the_radius_of_its_mean_probability():
    """Whatever the noise, this network says 0.2, 0.5, 0.3."""

    class Constant(Hyperplane):
        def forward(self, images):
            return torch.tensor([0.2, 0.5, 0.3]).log().expand(len(images), 3)

    got = soft_radius(Constant(1), torch.rand(3, 3, 8, 8), np.array([0, 1, 2]), sigma=SIGMA, n=2)
    quantiles = stats.norm.ppf([0.2, 0.5, 0.3])
    expected = SIGMA / 2 * (quantiles - quantiles[[1, 2, 1]])
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_no_step_changes_the_radius_by_more_than_its_length():
    """What makes it a certificate: sigma Phi^-1 of a mean softmax is 1-Lipschitz, here on a trained network."""
    images, labels = toy_problem().test_images(every=10)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(images.shape, generator=generator)
    direction /= direction.flatten(1).norm(dim=1)[:, None, None, None]
    here, there = (soft_radius(toy_network(), images + step * direction, labels, sigma=SIGMA, n=4_000) for step in (0.0, 0.3))
    assert (np.abs(here - there) < 0.3).all() and (here != there).any()


def test_the_noise_follows_the_seed_and_the_radius_the_certified_one():
    images, labels = toy_problem().test_images(every=1)
    radius = soft_radius(toy_network(), images, labels, sigma=SIGMA, n=4)
    assert (radius == soft_radius(toy_network(), images, labels, sigma=SIGMA, n=4)).all()
    assert (radius != soft_radius(toy_network(), images, labels, sigma=SIGMA, n=4, seed=1)).any()
    certified = certify(toy_network(), images, labels, sigma=SIGMA, n0=20, n=500).certified_radius
    many = soft_radius(toy_network(), images, labels, sigma=SIGMA, n=500)
    assert stats.spearmanr(np.maximum(many, 0), certified).statistic > 0.8


class Scaled(nn.Module):
    """A network that is surer of the same answers, or less sure."""

    def __init__(self, network, scale: float):
        super().__init__()
        self.network, self.scale = network, scale
        self.eval()

    def forward(self, images):
        return self.scale * self.network(images)


@pytest.mark.parametrize("scale", [0.2, 5])
def test_at_one_entropy_confidence_wins_nothing(scale):
    images, labels = toy_problem().test_images(every=1)
    noise = {"sigma": SIGMA, "n": 8}
    entropy = softmax_entropy(toy_network(), images, **noise)
    plain, surer = toy_network(), Scaled(toy_network(), scale)
    before = soft_radius(plain, images, labels, **noise)
    assert np.abs(before - soft_radius(surer, images, labels, **noise)).mean() > 0.05
    for network in (plain, surer):
        np.testing.assert_allclose(soft_radius(network, images, labels, **noise, entropy=entropy), before, atol=1e-5)


def test_an_entropy_out_of_reach_is_approached():
    """Logits that are all alike have no scale, and no network is less sure than that."""

    class Alike(Hyperplane):
        def forward(self, images):
            return torch.zeros(len(images), 2)

    images, labels = torch.rand(2, 3, 8, 8), np.array([0, 1])
    assert (soft_radius(Alike(1), images, labels, sigma=SIGMA, n=2, entropy=0.1) == 0).all()
    sharp = soft_radius(Hyperplane(1), images, labels, sigma=SIGMA, n=200, entropy=1.0)
    assert np.abs(sharp).max() < 0.02


def test_nan_logits_are_an_error():
    network = toy_network()
    with torch.no_grad():
        network.last.bias[0] = torch.nan
    images, labels = toy_problem().test_images(every=20)
    with pytest.raises(ArqError, match="NaN"):
        soft_radius(network, images, labels, sigma=SIGMA, n=2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": np.array([-1, 0])}, "whole numbers from 0$"),
        ({"labels": np.array([0, 2])}, "label 2 and logits of 2 classes"),
        ({"labels": np.array([[0], [1]])}, "one label an image"),
        ({"labels": np.array([0.5, 1])}, "whole numbers"),
        ({"images": torch.full((2, 3, 8, 8), 200, dtype=torch.uint8)}, "images are uint8"),
        ({"images": torch.full((2, 3, 8, 8), 200.0)}, r"give images in \[0, 1\]"),
        ({"images": torch.rand(2, 3 * 8 * 8)}, "as \\[n, c, h, w\\]"),
        ({"network": Hyperplane(1).train()}, "training mode"),
        ({"network": len}, "torch module"),
        ({"network": nn.Sequential(nn.Flatten(), nn.Linear(192, 1)).eval()}, "two classes or more"),
        ({"network": nn.Sequential(nn.Flatten(), nn.Linear(192, 2), nn.Flatten(0)).eval()}, "for 4 images"),
        ({"sigma": 0}, "sigma is 0"),
        ({"n": 0.5}, "n is 0.5"),
        ({"n": 1e8}, "smaller n or fewer images"),
        ({"seed": -1}, "seed is -1"),
        ({"entropy": -0.1}, "entropy is -0.1"),
    ],
)
def test_what_has_no_soft_radius(change, message):
    arguments = {"network": Hyperplane(1), "images": torch.rand(2, 3, 8, 8), "labels": np.array([0, 1]), "sigma": SIGMA, "n": 2}
    with pytest.raises(ArqError, match=message):
        soft_radius(**arguments | change)


def test_arrays_and_other_types_are_taken():
    images, labels = torch.rand(2, 3, 8, 8), np.array([0, 1])
    expected = soft_radius(Hyperplane(1), images, labels, sigma=SIGMA, n=2).tolist()
    others = [(images.numpy(), [0, 1]), (images.double().requires_grad_(), torch.ones(2).cumsum(0) - 1)]
    for same in others:
        assert soft_radius(Hyperplane(1), *same, sigma=SIGMA, n=2.0).tolist() == expected
