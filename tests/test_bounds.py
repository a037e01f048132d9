import numpy as np
import pytest
from scipy import stats

from arq_env.certification import clopper_pearson_lower, smoothing_radius


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
