"""Exact intervals and tests of shares, such as accuracies: equal to SciPy's, and wrong as often as they state."""

import pytest

from clipfast.evaluate.significance import binomial_tail, clopper_pearson, independence

CASES = [(0, 7, 0.3), (7, 7, 0.3), (3, 10, 0.0), (3, 10, 1.0), (1, 1, 0.5), (130, 400, 0.288), (49_000, 50_000, 0.97)]


def test_tails_and_intervals_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for hits, count, share in CASES:
        expected = stats.binomtest(hits, count, share, alternative="greater").pvalue
        assert binomial_tail(hits, count, share) == pytest.approx(expected, rel=1e-6)
        for level in (0.95, 0.995):
            interval = stats.binomtest(hits, count).proportion_ci(level, method="exact")
            assert clopper_pearson(hits, count, level) == pytest.approx(tuple(interval), rel=1e-6, abs=1e-12)


def test_independence_is_exact_for_small_groups():
    """For 3 of 3 against 0 of 3 hits, p is 2/20: of 20 ways to deal three hits to six people, two are as far apart."""
    assert independence([3, 0], [3, 3]) == pytest.approx(0.1, abs=0.01)
    assert independence([2, 1], [4, 2]) == 1.0
    assert independence([0, 0], [4, 2]) == independence([4, 2], [4, 2]) == 1.0
    assert independence([90, 10], [100, 100]) == 1 / 10_000
    assert independence([9, 3], [20, 20]) == independence([9, 3], [20, 20])
