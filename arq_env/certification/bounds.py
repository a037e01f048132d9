"""Lower and upper confidence bounds on a binomial proportion, and the radius they give.

Arguments are numbers or arrays that broadcast against each other. All functions raise an ArqError that names the argument which
is out of its range.
"""

import numpy as np
from scipy import special, stats

from arq_env.certification.inputs import checked_alpha, checked_sigma, reals
from arq_env.support.errors import ArqError

#: Counts above this are not exact in float64.
_MOST = 2.0**53


def clopper_pearson_lower(successes, n, alpha):
    """One-sided lower bound: P(bound > p) <= alpha for k ~ B(n, p) (Clopper and Pearson 1934).

    :param successes: k, any shape, 0 <= k <= n
    :param n: number of draws, broadcast against ``successes``
    :param alpha: probability of failure, one number in (0, 1)
    :return: float64 of the same shape, in [0, 1]

    >>> round(float(clopper_pearson_lower(100, 100, 0.001)), 4)  # alpha ** (1 / n)
    0.9333
    """
    successes, n = _counts(successes, n)
    alpha = checked_alpha(alpha)
    # scipy's quantile is undefined at k = 0, where the bound is 0
    quantile = stats.beta.ppf(alpha, np.maximum(successes, 1), n - successes + 1)
    return np.where(successes > 0, quantile, 0.0)


def clopper_pearson_upper(successes, n, alpha):
    """One-sided upper bound: P(bound < p) <= alpha.

    >>> round(float(clopper_pearson_upper(0, 100, 0.001)), 4)
    0.0667
    """
    successes, n = _counts(successes, n)
    return 1 - clopper_pearson_lower(n - successes, n, alpha)


def randomized_clopper_pearson_lower(successes, n, draw, alpha):
    """Lower bound that fails with probability alpha exactly: inf{p : P(B > k) + W P(B = k) > alpha}, B ~ B(n, p).

    Voracek, Treatment of Statistical Estimation Problems in Randomized Smoothing (NeurIPS 2024). Never below
    Clopper-Pearson's, which is W = 1. At k = n and W <= alpha the bound is 1 and the radius would be infinite.

    :param draw: W, one uniform draw from [0, 1] an entry, drawn before the count is known

    >>> round(float(randomized_clopper_pearson_lower(100, 100, 0.5, 0.001)), 4)  # (alpha / W) ** (1 / n)
    0.9397
    """
    successes, n = _counts(successes, n)
    alpha, draw = checked_alpha(alpha), reals("draw", draw, 0, 1, "uniform draws from [0, 1]")
    _broadcast(successes=successes, draw=draw)

    def exceeds(p):
        above = np.where(successes < n, special.betainc(successes + 1, np.maximum(n - successes, 1), p), 0.0)
        from_here = np.where(successes > 0, special.betainc(np.maximum(successes, 1), n - successes + 1, p), 1.0)
        return (1 - draw) * above + draw * from_here > alpha

    # The bounds at W = 1 and at W = 0, Clopper and Pearson's for k and for k + 1, hold the answer between them.
    low = clopper_pearson_lower(successes, n, alpha)
    high = np.where(successes < n, clopper_pearson_lower(np.minimum(successes + 1, n), n, alpha), 1.0)
    return _bisect(exceeds, low, high)


def betting_lower(successes, n, alpha, prior=(0.5, 0.5)):
    """Lower end of a confidence sequence: P(bound > p at any n) <= alpha, so sampling may stop whenever it likes.

    A bettor predicts each draw and pays for it at the odds of p; p is rejected when the bettor's wealth reaches 1 / alpha
    (Ville's inequality; Voracek, NeurIPS 2024, section 4). Predicting (a + successes) / (a + b + draws) the wealth is
    B(a + k, b + n - k) / B(a, b) / (p^k (1-p)^(n-k)); (1/2, 1/2) is the published bettor. What was known before the first
    draw that counts, such as an earlier sample, may go into the prior without touching validity.

    :param prior: (a, b), positive numbers or arrays

    >>> float(betting_lower(1000, 1000, 0.001)) < float(clopper_pearson_lower(1000, 1000, 0.001))
    True
    """
    successes, n = _counts(successes, n)
    alpha, (a, b) = checked_alpha(alpha), _prior(prior)
    _broadcast(successes=successes, a=a, b=b)
    failures = n - successes
    log_bets = special.betaln(a + successes, b + failures) - special.betaln(a, b)

    def not_rejected(p):
        return log_bets - special.xlogy(successes, p) - special.xlog1py(failures, -p) <= np.log(1 / alpha)

    # The wealth falls in p up to the observed share, where it is least.
    return _bisect(not_rejected, np.zeros_like(successes), successes / np.maximum(n, 1))


def _counts(successes, n) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 arrays of one shape."""
    n = reals("n", n, 0, _MOST, "a number of draws, not negative")
    successes, n = _broadcast(successes=reals("successes", successes, 0, _MOST, "counts from 0 to n"), n=n)
    if not (successes <= n).all():
        raise ArqError(f"successes are up to {np.max(successes - n):g} above n: give counts from 0 to n")
    return successes, n


def _prior(prior) -> tuple[np.ndarray, np.ndarray]:
    try:
        a, b = prior
    except (TypeError, ValueError) as error:
        raise ArqError("prior is not a pair: give (a, b), two positive numbers or arrays") from error
    a, b = (reals("prior", end, np.finfo(float).tiny, _MOST, "two positive numbers or arrays") for end in (a, b))
    return a, b


def _broadcast(**arrays) -> tuple[np.ndarray, ...]:
    try:
        return np.broadcast_arrays(*arrays.values())
    except ValueError as error:
        shapes = " and ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ArqError(f"the shapes {shapes} do not broadcast: give numbers, or arrays of one shape") from error


def _bisect(holds, low, high):
    """The point in [low, high] from which on ``holds`` is true, rounded towards ``low``; elementwise."""
    low, high = np.broadcast_arrays(low, high)
    for _ in range(60):
        middle = (low + high) / 2
        there = holds(middle)
        low, high = np.where(there, low, middle), np.where(there, middle, high)
    return low


def smoothing_radius(sigma: float, lower):
    """L2 radius within which g's class cannot change: sigma Phi^-1(lower), 0 where lower <= 1/2.

    Cohen et al. 2019, theorem 1 and the remark after it (bound of the runner-up by 1 - lower).

    :param sigma: standard deviation of the noise, in the units of the pixels; as everywhere from 1e-6 to 1e6
    :param lower: lower bound on the probability of the top class, at most 1 (where the radius is infinite)
    :return: float64 of the shape of ``lower``, in the units of sigma
    """
    sigma, lower = checked_sigma(sigma), reals("lower", lower, -np.inf, 1, "bounds on a probability, at most 1")
    return np.where(lower > 0.5, sigma * stats.norm.ppf(np.maximum(lower, 0.5)), 0.0)
