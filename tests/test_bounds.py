import numpy as np
import pytest
from scipy import stats

from arq_env import ArqError
from arq_env.certification import (
    betting_lower,
    clopper_pearson_lower,
    clopper_pearson_upper,
    randomized_clopper_pearson_lower,
    smoothing_radius,
)


def test_bound_at_its_ends():
    assert clopper_pearson_lower(0, 100, 0.001) == 0
    assert clopper_pearson_lower(100, 100, 0.001) == pytest.approx(0.001 ** (1 / 100))


@pytest.mark.parametrize("k, n", [(1, 10), (55, 100), (999, 1000), (9_990, 10_000)])
def test_bound_solves_its_equation(k, n):
    bound = clopper_pearson_lower(k, n, 0.001)
    assert stats.binom.sf(k - 1, n, bound) == pytest.approx(0.001, rel=1e-6)


@pytest.mark.parametrize("p", [0.5, 0.6, 0.9, 0.99, 0.9999, 1 - 1e-5])
@pytest.mark.parametrize("n", [100, 1_000, 10_000])
def test_coverage(p, n):
    """The bound exceeds p in at most alpha of all draws, up to the sampling error of the simulation."""
    alpha, draws = 0.01, 20_000
    counts = np.random.default_rng(0).binomial(n, p, draws)
    failures = int((clopper_pearson_lower(counts, n, alpha) > p).sum())
    assert stats.binom.sf(failures - 1, draws, alpha) > 1e-6, failures


def test_radius_is_the_quantile_and_never_negative():
    lower = np.array([0.0, 0.3, 0.5, 0.8, 0.999])
    expected = [0, 0, 0, 0.25 * stats.norm.ppf(0.8), 0.25 * stats.norm.ppf(0.999)]
    np.testing.assert_allclose(smoothing_radius(0.25, lower), expected)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: clopper_pearson_lower(11, 10, 0.01), "successes are up to 1 above n"),
        (lambda: clopper_pearson_lower(-1, 10, 0.01), "successes is -1"),
        (lambda: clopper_pearson_lower([1, np.nan], 10, 0.01), "successes is"),
        (lambda: clopper_pearson_lower([1, 2], [10, 10, 10], 0.01), r"successes \(2,\) and n \(3,\)"),
        (lambda: clopper_pearson_lower(1, np.inf, 0.01), "n is inf"),
        (lambda: clopper_pearson_lower("1", 10, 0.01), "successes are of type <U1"),
        (lambda: clopper_pearson_upper(11, 10, 0.01), "successes are up to"),
        (lambda: clopper_pearson_upper(1, 10, 0), "alpha is 0"),
        (lambda: randomized_clopper_pearson_lower(1, 10, 1.5, 0.01), "draw is 1.5"),
        (lambda: betting_lower(1, 10, 0.01, (0, 1)), "prior is 0"),
        (lambda: betting_lower(1, 10, 0.01, 3), "prior is not a pair"),
        (lambda: smoothing_radius(-0.5, 0.9), "sigma is -0.5"),
        (lambda: smoothing_radius(0.5, 1.01), "lower is 1.01"),
        (lambda: smoothing_radius(0.5, np.nan), "lower is nan"),
    ],
)
def test_what_is_no_count_and_no_probability_is_named(call, message):
    with pytest.raises(ArqError, match=message):
        call()


def test_counts_of_small_integers_do_not_overflow():
    counts = np.array([0, 3, 200], np.uint8)
    np.testing.assert_array_equal(
        clopper_pearson_lower(counts, 1_000, 0.01), clopper_pearson_lower(counts.astype(int), 1_000, 0.01)
    )
