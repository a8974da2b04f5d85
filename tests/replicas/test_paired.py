"""Paired statistics: against SciPy's own, their definitions, and their promised rates."""

import math

import numpy as np
import pytest
from scipy import stats

from cifar_jax.replicas import paired


def drawn(n, shift=0.3, std=0.8, seed=0):
    rng = np.random.default_rng(seed)
    first = rng.normal(60, 1, n)
    return first, first + rng.normal(shift, std, n)


def test_a_difference_is_scipys_paired_t_test():
    first, second = drawn(20)
    found, want = paired.difference(first, second), stats.ttest_rel(second, first)
    assert found["p_t"] == pytest.approx(want.pvalue, rel=1e-9)
    low, high = want.confidence_interval(0.95)
    assert found["interval_95"] == pytest.approx([low, high], rel=1e-9)
    assert found["reach"] == pytest.approx((high - low) / 2)
    assert found["mean"] == pytest.approx((second - first).mean())


def test_the_permutation_test_goes_through_all_signs():
    differences = np.array([0.3, -0.1, 0.4, 0.2, 0.5])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 5)).reshape(5, -1)
    means = np.abs((signs * differences[:, None]).mean(axis=0))
    want = (means >= abs(differences.mean()) - 1e-12).mean()
    assert paired.p_of_permutations(differences) == pytest.approx(want)


def test_equal_differences_need_no_division_by_zero():
    assert paired.difference([1, 2, 3], [1, 2, 3])["p_t"] == 1
    assert paired.difference([1, 2, 3], [2, 3, 4])["p_t"] == 0
    assert paired.anytime([0.0, 0.0, 0.0])["p"] == 1
    assert paired.anytime([0.5] * 12)["p"] == 1, "steps of an accuracy are no certainty"
    assert paired.anytime([0.5] * 12)["reach"] == math.inf


@pytest.mark.parametrize(("points", "std"), [(1.0, 0.8), (0.3, 0.5), (0.1, 0.05)])
def test_the_seeds_it_asks_for_have_the_power_it_says(points, std):
    def power(n):
        critical = stats.t.ppf(0.975, n - 1)
        shift = points / std * math.sqrt(n)
        return stats.nct.sf(critical, n - 1, shift) + stats.nct.cdf(-critical, n - 1, shift)

    n = paired.seeds_to_show(points, std)
    assert power(n) >= 0.8
    assert n == 2 or power(n - 1) < 0.8
    assert paired.seeds_to_show(points, math.nan) is None


def test_a_confidence_sequence_is_where_its_bayes_factor_is_twenty():
    values = np.random.default_rng(3).normal(0.2, 1.3, 24)
    found = paired.anytime(values)
    for end in found["interval_95"]:
        n, t = 24, paired.t_statistic(values - end)
        # Rouder et al. 2009, equation 1, of an effect drawn from N(0, 1), by integration.
        effects = np.linspace(-8, 8, 20_001)
        density = stats.nct.pdf(t, n - 1, effects * math.sqrt(n)) * stats.norm.pdf(effects)
        factor = np.trapezoid(density, effects) / stats.t.pdf(t, n - 1)
        assert factor == pytest.approx(20, rel=1e-4)


def test_looking_often_deceives_the_t_interval_but_not_the_sequence():
    rng, looks = np.random.default_rng(1), range(8, 97, 8)
    missed = {"t": 0, "sequence": 0}
    for _ in range(400):
        values = rng.normal(0, 1.3, 96)
        intervals = {"t": [], "sequence": []}
        for n in looks:
            intervals["sequence"].append(paired.anytime(values[:n])["interval_95"])
            reach = stats.t.ppf(0.975, n - 1) * values[:n].std(ddof=1) / math.sqrt(n)
            intervals["t"].append([values[:n].mean() - reach, values[:n].mean() + reach])
        for name, ends in intervals.items():
            missed[name] += any(low > 0 or high < 0 for low, high in ends)
    # Of 400, 20 are promised; 35 is three standard errors more.
    assert missed["sequence"] <= 35
    assert missed["t"] > 60, "the correction is not idle"


def test_mcnemar_counts_images_and_halves_them():
    first = np.array([True] * 12 + [False] * 8)
    second = np.array([True] * 6 + [False] * 6 + [True] * 1 + [False] * 7)
    found = paired.mcnemar(first, second)
    assert (found["both"], found["only_first"]) == (6, 6)
    assert (found["only_second"], found["neither"]) == (1, 7)
    assert found["p"] == pytest.approx(2 * (1 + 7) / 2**7)
    assert paired.mcnemar(first, first)["p"] == 1
