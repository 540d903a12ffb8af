"""Means over seeds and the paired interval."""

import math

import pytest
from scipy import stats

from focal_plugin.experiments.statistics import paired_difference, signed, summarize


def test_paired_interval_by_hand():
    # Differences 1, 2, 3: mean 2, deviation 1, t(.975, 2 degrees) = 4.30265.
    paired = paired_difference({1: 31.0, 2: 33.0, 3: 34.0}, {1: 30.0, 2: 31.0, 3: 31.0})
    assert paired.by_seed == {1: 1, 2: 2, 3: 3} and paired.mean == 2
    assert (paired.low, paired.high) == pytest.approx((2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5), abs=1e-5)
    assert paired.excludes_zero is False and paired.holds(3.2) is True and paired.holds(4.6) is False


def test_paired_interval_is_scipys():
    first, second = {1: 40.1, 2: 41.3, 4: 39.2, 5: 44.0}, {1: 38.0, 2: 39.9, 4: 36.1, 5: 41.8}
    paired = paired_difference(first, second)
    theirs = stats.ttest_rel(list(first.values()), list(second.values())).confidence_interval(0.95)
    assert (paired.low, paired.high) == pytest.approx((theirs.low, theirs.high)) and paired.excludes_zero is True


def test_only_seeds_that_both_have_are_compared():
    paired = paired_difference({1: 10.0, 2: 20.0, 3: 30.0}, {3: 25.0, 4: 0.0})
    assert paired.by_seed == {3: 5.0} and paired.low is None and paired.excludes_zero is None
    assert paired.holds(5.0) is None
    nothing = paired_difference({1: 10.0}, {2: 10.0})
    assert nothing.by_seed == {} and math.isnan(nothing.mean)


def test_equal_differences_make_an_interval_without_width():
    paired = paired_difference({1: 2.0, 2: 3.0}, {1: 1.0, 2: 2.0})
    assert (paired.low, paired.high, paired.excludes_zero) == (1.0, 1.0, True)


def test_summaries_skip_what_is_no_number():
    summary = summarize([30.0, None, float("nan"), 34.0])
    assert (summary.count, summary.mean, summary.deviation) == (2, 32, pytest.approx(8**0.5))
    assert math.isnan(summarize([1.0]).deviation) and math.isnan(summarize([]).mean)


@pytest.mark.parametrize(("number", "text"), [(1.44, "+1.4"), (-3.2, "−3.2"), (-0.04, "0.0"), (0.0, "0.0")])
def test_signed(number, text):
    assert signed(number) == text
