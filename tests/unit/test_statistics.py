"""Intervals, paired differences and rank agreement: ties, nothing, one item.

pytest tests/unit/test_statistics.py
"""

import numpy as np
import pytest

from models.statistics import auc, kendall, paired_bootstrap, ranks, spearman, wilson, within_groups


def test_wilson_matches_scipy_and_holds_at_the_ends():
    from scipy.stats import binomtest

    for right, n in [(0, 1), (1, 1), (7, 20), (50, 50), (600, 1500)]:
        expected = binomtest(right, n).proportion_ci(method="wilson")
        found = wilson(right, n)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
        assert found.mean == right / n


def test_wilson_of_nothing_is_none_and_of_nonsense_an_error():
    assert wilson(0, 0).mean is None and wilson(0, 0).n == 0
    with pytest.raises(ValueError, match="between 0 and n"):
        wilson(3, 2)


def test_bootstrap_interval_holds_the_difference_and_is_repeatable():
    rng = np.random.default_rng(1)
    a, b = rng.random(800) < 0.7, rng.random(800) < 0.6
    first, again = paired_bootstrap(a, b), paired_bootstrap(a, b)
    assert first == again
    assert first.low < first.mean < first.high and first.low > 0 and first.p < 0.01
    mirrored = paired_bootstrap(b, a)
    assert mirrored.mean == pytest.approx(-first.mean) and mirrored.high < 0


def test_bootstrap_agrees_with_resampling_items_one_by_one():
    rng = np.random.default_rng(2)
    d = rng.normal(0.1, 1, 300)
    slow = np.array([d[rng.integers(0, 300, 300)].mean() for _ in range(4000)])
    fast = paired_bootstrap(d, np.zeros(300))
    assert (fast.low, fast.high) == pytest.approx(tuple(np.quantile(slow, [0.025, 0.975])), abs=0.02)


def test_bootstrap_of_equal_none_and_one():
    equal = paired_bootstrap([1, 0, 1], [1, 0, 1])
    assert (equal.mean, equal.low, equal.high, equal.p) == (0, 0, 0, 1)
    assert paired_bootstrap([], []).mean is None
    one = paired_bootstrap([1], [0])
    assert (one.mean, one.n) == (1, 1)
    with pytest.raises(ValueError, match="must match"):
        paired_bootstrap([1], [])


def test_bootstrap_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(3)
    hits = 0
    for trial in range(200):
        a, b = rng.random(300) < 0.65, rng.random(300) < 0.55
        found = paired_bootstrap(a, b, resamples=1000, seed=trial)
        hits += found.low <= 0.10 <= found.high
    assert 180 <= hits <= 199


def test_auc_counts_ties_half_and_needs_both_kinds():
    assert auc([1, 2, 3], [False, False, True]) == 1.0
    assert auc([3, 2, 1], [False, False, True]) == 0.0
    assert auc([5, 5, 5, 5], [True, False, True, False]) == 0.5
    assert auc([1, 2, 2, 3], [False, True, False, True]) == pytest.approx(3.5 / 4)
    assert auc([1, 2], [True, True]) is None and auc([], []) is None and auc([4], [False]) is None


def test_rank_correlations_match_scipy_with_ties():
    from scipy import stats

    rng = np.random.default_rng(4)
    for _ in range(20):
        a, b = rng.integers(0, 4, 8), rng.integers(0, 4, 8)
        if len(set(a)) > 1 and len(set(b)) > 1:
            assert kendall(a, b) == pytest.approx(stats.kendalltau(a, b).statistic)
            assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert list(ranks([10, 20, 20, 5])) == [2, 3.5, 3.5, 1]


def test_rank_correlation_without_variation_is_none():
    assert kendall([1, 1], [1, 2]) is None and spearman([1, 2], [3, 3]) is None
    assert kendall([], []) is None and spearman([], []) is None and kendall([1], [1]) is None


def test_within_groups_averages_only_questions_that_vary():
    groups = ["a", "a", "b", "b", "c", "c", "d"]
    found = within_groups(groups, [1, 2, 1, 2, 5, 5, 1], [1, 2, 2, 1, 1, 2, 1])
    assert (found.kendall, found.spearman, found.questions) == (0, 0, 2)
    assert within_groups([], [], []).kendall is None
