"""CERTIFY written down as in the paper, and the certifier beside it: the same predictions and radii, to the last bit."""

import hashlib

import numpy as np
import pytest
from scipy import stats

from arq_env.certification import ABSTAINED, Cohen, certify
from arq_env.certification.sampling import ESTIMATION, SELECTION
from tests.test_certify import halfspace

WEIGHTS = np.random.default_rng(1).normal(size=(48, 4)).astype(np.float32)


def four_classes(images):
    return (images.reshape(len(images), -1) - 0.5) @ WEIGHTS


def sample_under_noise(f, x, num, sigma, noise):
    """SampleUnderNoise (Cohen et al. 2019, section 3.2): how often each class is predicted for num noisy copies of x."""
    counts = {}
    for _ in range(num):
        predicted = int(np.argmax(f((x + sigma * next(noise))[None])[0]))
        counts[predicted] = counts.get(predicted, 0) + 1
    return counts


def reference_certify(f, sigma, x, n0, n, alpha, noise0, noise):
    """Certify (Cohen et al. 2019, section 3.2.2), line by line."""
    counts0 = sample_under_noise(f, x, n0, sigma, noise0)
    top = max(sorted(counts0), key=counts0.get)
    counts = sample_under_noise(f, x, n, sigma, noise)
    k = counts.get(top, 0)
    lower = stats.beta.ppf(alpha, k, n - k + 1) if k > 0 else 0.0  # LowerConfBound: Clopper and Pearson's, one-sided
    if lower > 0.5:
        return top, sigma * stats.norm.ppf(lower)
    return ABSTAINED, 0.0


def noise_of(x, seed, purpose):
    """The image's noise for one purpose, copy by copy: it follows from the seed and the pixels."""
    digest = int(hashlib.sha256(x.tobytes()).hexdigest(), 16)
    generator = np.random.Generator(np.random.SFC64([seed, purpose, digest]))
    while True:
        yield np.moveaxis(generator.standard_normal((4, 4, 3), np.float32), -1, 0)


@pytest.mark.parametrize("f, towards", [(halfspace, np.full(48, 0.06)), (four_classes, 0.3 * np.sign(WEIGHTS[:, 0]))])
@pytest.mark.parametrize("n0, n, alpha, seed", [(20, 150, 0.01, 0), (7, 40, 0.1, 3)])
def test_the_certifier_is_the_published_algorithm(f, towards, n0, n, alpha, seed):
    sigma = np.float32(0.5)
    images = 0.5 + np.linspace(0, 1, 12)[:, None, None, None] * towards.reshape(3, 4, 4)  # from the boundary on
    images = (images + np.random.default_rng(0).normal(scale=0.01, size=images.shape)).astype(np.float32)
    streams = ([noise_of(x, seed, purpose) for purpose in (SELECTION, ESTIMATION)] for x in images)
    expected = [reference_certify(f, sigma, x, n0, n, alpha, *noise) for x, noise in zip(images, streams, strict=True)]
    labels = np.arange(12) % 2
    got = certify(f, images, labels, sigma=0.5, n0=n0, n=n, alpha=alpha, seed=seed, batch_size=13)
    assert list(zip(got.prediction.tolist(), got.radius.tolist(), strict=True)) == expected
    assert 0 < sum(prediction == ABSTAINED for prediction, _ in expected) < 12
    right = [radius * (said == label) for (said, radius), label in zip(expected, labels, strict=True)]
    skipped = certify(f, images, labels, sigma=0.5, n0=n0, n=n, alpha=alpha, seed=seed, method=Cohen(skip_wrong=True))
    assert skipped.certified_radius.tolist() == right
