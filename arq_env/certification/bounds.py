"""Confidence bounds on a binomial proportion, and the radius they give."""

import numpy as np
from scipy import stats


def clopper_pearson_lower(successes, n, alpha):
    """One-sided lower bound: P(bound > p) <= alpha for k ~ B(n, p) (Clopper and Pearson 1934).

    :param successes: k, any shape, 0 <= k <= n
    :return: float64 of the same shape, in [0, 1]

    >>> round(float(clopper_pearson_lower(100, 100, 0.001)), 4)  # alpha ** (1 / n)
    0.9333
    """
    successes = np.asarray(successes)
    # scipy's quantile is undefined at k = 0, where the bound is 0
    quantile = stats.beta.ppf(alpha, np.maximum(successes, 1), n - successes + 1)
    return np.where(successes > 0, quantile, 0.0)


def smoothing_radius(sigma: float, lower):
    """L2 radius within which g's class cannot change: sigma Phi^-1(lower), 0 where lower <= 1/2.

    Cohen et al. 2019, theorem 1 and the remark after it (bound of the runner-up by 1 - lower).

    :param lower: lower bound on the probability of the top class
    """
    return np.where(lower > 0.5, sigma * stats.norm.ppf(np.maximum(lower, 0.5)), 0.0)
