"""Every method certifies too much in at most alpha of all images: simulated, with the true probabilities known."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from arq_env.certification import (
    Cohen,
    Incremental,
    Paired,
    PredictionCache,
    Randomized,
    Request,
    Sequential,
    betting_lower,
    clopper_pearson_lower,
)
from arq_env.certification.sampling import DRAW, ESTIMATION, SELECTION

ALPHA = 0.01
REQUEST = Request(sigma=1.0, n0=100, n=1_000, alpha=ALPHA, seed=0)
PROBABILITIES = (0.5, 0.6, 0.9, 0.99, 0.9999, 1 - 1e-5)


class Simulated:
    """In place of a sampler: images whose class 0 has a known probability, and class 1 the rest.

    With ``before``, predictions of the original network on the estimation noise, f' differs from them at known rates.
    """

    def __init__(self, probability, *, seed=0, before=None, harmful=0.0, helpful=0.0):
        self.probability, self.rng = np.asarray(probability, float), np.random.default_rng(seed)
        self.before, self.harmful, self.helpful = before, harmful, helpful
        self.digests = [str(i) for i in range(len(self.probability))]

    def __len__(self):
        return len(self.probability)

    def stream(self, purpose, row):
        assert purpose == DRAW
        return self.rng

    def select(self, n):
        votes = self.rng.binomial(n, self.probability)
        return np.where(2 * votes >= n, 0, 1), np.maximum(votes, n - votes)

    def count(self, purpose, n, classes, rows=None):
        assert purpose != SELECTION
        probability = self.probability if rows is None else self.probability[rows]
        return self.rng.binomial(n, np.where(classes == 0, probability, 1 - probability))

    def predict(self, purpose, n, rows=None):
        assert purpose == ESTIMATION  # the cached noise is replayed from its start
        before = self.before[np.arange(len(self)) if rows is None else rows, :n]
        chance = self.rng.random(before.shape)
        return np.where(before == 0, chance < self.harmful, chance >= self.helpful).astype(int)


def failures(sampler, method, request, labels=0):
    """How many bounds are above the true probability of the class they are for."""
    selected, lower, _, _ = method.bound(sampler, np.full(len(sampler), labels), request)
    return int((lower > np.where(selected == 0, sampler.probability, 1 - sampler.probability)).sum())


def assert_at_most(alpha, failed, trials):
    assert stats.binom.sf(failed - 1, trials, alpha) > 1e-6, (failed, trials)


@pytest.mark.parametrize("method", [Cohen(), Randomized(), Sequential(), Sequential(radius=0.1), Sequential(radius=1.0)], ids=str)
def test_coverage(method):
    """18 settings of 1,200 images each: over 100,000 for the methods together."""
    images, all_failed = 1_200, 0
    for p in PROBABILITIES:
        for n in (100, 1_000, 10_000):
            failed = failures(Simulated(np.full(images, p), seed=n), method, replace(REQUEST, n=n))
            assert_at_most(ALPHA, failed, images)
            all_failed += failed
    assert_at_most(ALPHA, all_failed, 18 * images)


@pytest.mark.parametrize("p, n", [(0.6, 100), (0.9, 1_000), (0.99, 1_000), (0.999, 10_000)])
def test_randomized_spends_all_of_alpha(p, n):
    images, alpha = 40_000, 0.05
    request = replace(REQUEST, n=n, alpha=alpha)
    exact = failures(Simulated(np.full(images, p)), Randomized(), request)
    assert abs(exact / images - alpha) < 5 * np.sqrt(alpha * (1 - alpha) / images)
    if p == 0.999:  # where Clopper-Pearson stays clearly below
        assert failures(Simulated(np.full(images, p)), Cohen(), request) < 0.9 * exact


@pytest.mark.parametrize("p", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("prior", [(0.5, 0.5), (90.5, 10.5)])
def test_betting_holds_under_an_adversary_who_stops_at_the_best_moment(p, prior):
    images, alpha = 4_000, 0.05
    rng = np.random.default_rng(1)
    n, best, best_fixed = 0, np.zeros(images), np.zeros(images)
    successes = np.zeros(images, int)
    for step in np.diff(np.unique(np.geomspace(1, 10_000, 120).astype(int)), prepend=0):
        successes += rng.binomial(step, p, images)
        n += step
        best = np.maximum(best, betting_lower(successes, n, alpha, prior))
        best_fixed = np.maximum(best_fixed, clopper_pearson_lower(successes, n, alpha))
    assert_at_most(alpha, int((best > p).sum()), images)
    # the adversary is no straw man: it breaks a bound for one fixed n
    assert (best_fixed > p).mean() > 2 * alpha


def cached(before):
    """A cache of these predictions, for class 0."""
    images = len(before)
    counts = (before == 0).sum(1)
    return PredictionCache(np.zeros(images, int), counts, before, [str(i) for i in range(images)], 1.0, 0, 100, "")


@pytest.mark.parametrize("method", [Incremental, Paired])
@pytest.mark.parametrize("p, harmful, helpful", [(0.6, 0.01, 0.02), (0.9, 0.05, 0.0), (0.9, 0.001, 0.2), (0.985, 0.01, 0.5)])
def test_coverage_of_replaying(method, p, harmful, helpful):
    """f' misses class 0 in a share ``harmful`` of f's hits, and hits it in a share ``helpful`` of f's misses."""
    images, n, cached_n, alpha = 3_000, 100, 400, 0.05
    before = (np.random.default_rng(2).random((images, cached_n)) >= p).astype(np.uint8)
    cache = cached(before)
    sampler = Simulated(np.full(images, p * (1 - harmful) + (1 - p) * helpful), before=before, harmful=harmful, helpful=helpful)
    for gamma in (0.95, 1.0):
        assert_at_most(alpha, failures(sampler, method(cache, gamma), replace(REQUEST, n=n, alpha=alpha)), images)


def test_paired_is_never_worse_than_incremental():
    images, n = 500, 200
    before = (np.random.default_rng(2).random((images, 1_000)) >= 0.9).astype(np.uint8)
    lower = {}
    for method in (Incremental, Paired):
        sampler = Simulated(np.full(images, 0.9), before=before, harmful=0.02, helpful=0.3)
        _, lower[method], _, _ = method(cached(before)).bound(sampler, np.zeros(images), replace(REQUEST, n=n))
    assert (lower[Paired] >= lower[Incremental]).all() and (lower[Paired] > lower[Incremental]).mean() > 0.9
