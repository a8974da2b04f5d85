"""What runs of two variants with the same seeds say of their difference: intervals, p-values, how
many seeds a difference needs, and one classifier's right answers against another's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from cifar_jax.replicas.statistics import spread

LEVEL = 0.05
POWER = 0.8
POINTS = (0.1, 0.3, 1.0)  # differences of which is said how many seeds would show them
RESAMPLES = 99_999  # of the permutation test; up to 16 seeds it goes through all sign changes
# Variance of the normal mixture over effects, in variances of a difference: the unit information
# prior. It is fixed before there are data; another one is as honest, and wider or narrower.
MIXTURE = 1.0
TEST = (
    "paired Student t test; permutation test of the mean with the signs of the differences changed"
)
SEQUENTIAL = (
    "confidence sequence of the t test with a normal mixture over the effect (variance 1), valid "
    "at all looks together: Wang and Ramdas 2023, Anytime-valid t-tests and confidence sequences "
    "for Gaussian means with unknown variance, arXiv:2310.03722; its statistic is the Bayes factor "
    "of Gonen et al. 2005, The American Statistician 59"
)


def difference(first: Sequence[float], second: Sequence[float]) -> dict:
    """Returns what is known of `second - first`, two variants' figures by seed.

    Args:
      first, second: float [n], n at least 2, one a seed, in the same order.

    Returns:
      `statistics.spread` of the differences (with their mean's 95 % interval), "reach" (half that
      interval's width), "p_t" (paired t test) and "p_permutation", both two-sided, and "seeds_to_
      show": {points: n}, see `seeds_to_show`, for figures in points.
    """
    differences = np.asarray(second, float) - np.asarray(first, float)
    found = spread(differences.tolist())
    return {
        **found,
        "reach": (found["interval_95"][1] - found["interval_95"][0]) / 2,
        "p_t": p_of_t(differences),
        "p_permutation": p_of_permutations(differences),
        "seeds_to_show": {f"{points:g}": seeds_to_show(points, found["std"]) for points in POINTS},
    }


def has_spread(differences: np.ndarray) -> bool:
    """Whether differences differ, by more than rounding."""
    return float(np.ptp(differences)) > 1e-12 * float(np.abs(differences).max(initial=0.0))


def t_statistic(differences: np.ndarray) -> float:
    """Returns mean / (std / sqrt(n)): of differences that are all the same 0 where they are 0,
    otherwise infinite."""
    mean = float(differences.mean())
    if not has_spread(differences):
        return math.copysign(math.inf, mean) if mean else 0.0
    return mean / (float(differences.std(ddof=1)) / math.sqrt(len(differences)))


def p_of_t(differences: np.ndarray) -> float:
    """Returns the two-sided p-value of the paired t test: exact for normal differences."""
    from scipy.special import stdtr

    return float(2 * stdtr(len(differences) - 1, -abs(t_statistic(differences))))


def p_of_permutations(differences: np.ndarray) -> float:
    """Returns the two-sided p-value of the permutation test: how often the mean lies as far from 0
    when every difference's sign is chance, as it would be if the variants were the same thing.
    No smaller than 2 / 2**n, and of more than 16 differences drawn `RESAMPLES` times."""
    from scipy.stats import permutation_test

    found = permutation_test(
        (differences,),
        lambda x, axis: x.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=10_000,
        random_state=np.random.default_rng(0),
    )
    return float(found.pvalue)


def seeds_to_show(points: float, std: float) -> int | None:
    """Returns how many seeds find a true difference of `points` in four of five experiments.

    The smallest n at which the two-sided paired t test at 0.05 has a power of 0.8, by the
    noncentral t distribution, if `std` is the standard deviation of a difference; None if that is
    not known.
    """
    from scipy.special import nctdtr, ndtri, stdtrit

    if not math.isfinite(std):
        return None
    if std == 0:
        return 2
    effect = points / std
    n = max(math.floor(((ndtri(1 - LEVEL / 2) + ndtri(POWER)) / effect) ** 2), 2)  # from below
    while True:
        critical, shift = stdtrit(n - 1, 1 - LEVEL / 2), effect * math.sqrt(n)
        if shift > 20:  # nctdtr ends there; the power is 1
            return n
        power = 1 - nctdtr(n - 1, shift, critical) + nctdtr(n - 1, shift, -critical)
        if power >= POWER:
            return n
        n += 1


def anytime(differences: Sequence[float]) -> dict:
    """Returns what may be said of the mean difference by who stops when it pleases (`SEQUENTIAL`).

    Of differences that are normal, with a variance nobody knows, all intervals together, of every
    number of seeds, hold the true mean with 95 %; so does the one at which somebody stops. Likewise
    the p-value, the reciprocal of the Bayes factor.

    Args:
      differences: float [n], n at least 2, in the order of the seeds.

    Returns:
      {"n", "mean", "interval_95", "reach" (half its width, infinite where n is too small or all
      differences are equal: accuracies are steps, and such a chance is no certainty), "p"}.
    """
    values = np.asarray(differences, float)
    n, mean = len(values), float(values.mean())
    known = has_spread(values)
    error = float(values.std(ddof=1)) / math.sqrt(n)
    reach = _anytime_quantile(n) * error if known else math.inf
    return {
        "n": n,
        "mean": mean,
        "interval_95": [mean - reach, mean + reach],
        "reach": reach,
        "p": math.exp(min(0.0, -_log_bayes_factor(values))) if known else 1.0,
    }


def _anytime_quantile(n: int) -> float:
    """|t| at which the Bayes factor is 1 / LEVEL."""
    r = 1 + n * MIXTURE
    k = (math.sqrt(r) / LEVEL) ** (2 / n)
    return math.sqrt((n - 1) * (k - 1) / (1 - k / r)) if k < r else math.inf


def _log_bayes_factor(values: np.ndarray) -> float:
    """Log of (1 + ng)^(-1/2) ((1 + t²/ν) / (1 + t²/(ν (1 + ng))))^(n/2), ν = n - 1."""
    n, t = len(values), t_statistic(values)
    r = 1 + n * MIXTURE
    odds = math.log1p(t * t / (n - 1)) - math.log1p(t * t / ((n - 1) * r))
    return n / 2 * odds - math.log(r) / 2


def mcnemar(first: np.ndarray, second: np.ndarray) -> dict:
    """Returns McNemar's exact test of two classifiers on the same images: whether those that one
    alone has right are more than those that the other alone has right, of which chance would give
    each half (McNemar 1947; two-sided, binomial).

    Args:
      first, second: bool [N], which images each has right.

    Returns:
      {"both", "only_first", "only_second", "neither", "p"}.
    """
    from scipy.stats import binomtest

    one, other = int((first & ~second).sum()), int((second & ~first).sum())
    return {
        "both": int((first & second).sum()),
        "only_first": one,
        "only_second": other,
        "neither": int((~first & ~second).sum()),
        "p": float(binomtest(one, one + other).pvalue) if one + other else 1.0,
    }
