"""Intervals of means against SciPy's bootstrap, and by what they should cover."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from stages.scoring import intervals
from stages.scoring.intervals import Interval, difference, interval


def skewed(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).gamma(2.0, 0.1, count)


@pytest.mark.parametrize("count", [12, 300])
def test_an_interval_is_that_of_scipys_bootstrap(count: int) -> None:
    values = skewed(count)
    found = interval(values)
    other = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    )
    assert found is not None
    assert found.mean == pytest.approx(values.mean())
    width = other.confidence_interval.high - other.confidence_interval.low
    assert found[1:] == pytest.approx(other.confidence_interval, abs=0.06 * width)


def test_groups_are_drawn_whole_as_scipy_draws_pairs_of_sums_and_counts() -> None:
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(40), rng.integers(1, 9, 40))
    values = rng.normal(0, 1, 40)[groups] + rng.normal(0, 0.1, len(groups))
    totals, counts = np.bincount(groups, weights=values), np.bincount(groups).astype(float)
    other = stats.bootstrap(
        (totals, counts),
        lambda total, count, axis=-1: total.sum(axis) / count.sum(axis),
        paired=True,
        n_resamples=20_000,
        method="percentile",
        rng=rng,
    ).confidence_interval
    found, alone = interval(values, groups), interval(values)
    assert found is not None
    assert alone is not None
    assert found[1:] == pytest.approx(other, abs=0.06 * (other.high - other.low))
    assert found.high - found.low > 1.5 * (alone.high - alone.low)


def test_few_images_have_students_interval_and_one_has_none() -> None:
    for count in range(2, 10):
        values = skewed(count)
        found = interval(values)
        assert found is not None
        assert found[1:] == pytest.approx(
            stats.t.interval(0.95, count - 1, values.mean(), stats.sem(values)), abs=1e-4
        )
    assert interval(np.array([1.0, np.nan])) is None
    assert interval(np.array([])) is None


def test_many_images_have_the_normal_interval_which_the_bootstrap_agrees_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = skewed(6000)
    normal = interval(values)
    monkeypatch.setattr(intervals, "MANY", 10_000)
    drawn = interval(values)
    assert normal is not None
    assert drawn is not None
    assert normal != drawn
    assert normal[1:] == pytest.approx(drawn[1:], abs=0.1 * (normal.high - normal.low))


def test_an_interval_holds_the_true_mean_about_as_often_as_it_says() -> None:
    for count in (5, 30):
        held = 0
        for seed in range(400):
            found = interval(np.random.default_rng(seed).normal(1, 2, count))
            assert found is not None
            held += found.low < 1 < found.high
        assert 0.9 < held / 400 < 0.99


def test_a_difference_is_paired_by_key_and_told_apart_where_single_means_are_not() -> None:
    keys = [f"k{i}" for i in range(60)]
    hard = skewed(60)
    noise = np.random.default_rng(3).normal(0, 0.01, 60)

    def scored(keys: list[str], values: np.ndarray) -> pa.Table:
        return pa.table({"key": keys, "group": [""] * len(keys), "l1": values})

    one = scored(keys, hard)
    other = scored([*keys[::-1], "elsewhere"], np.append((hard + 0.01 + noise)[::-1], 9.0))
    apart, own, rival = difference(one, other, "l1"), interval(hard), interval(hard + 0.01 + noise)
    assert apart is not None
    assert own is not None
    assert rival is not None
    assert apart.mean == pytest.approx(-(0.01 + noise).mean())
    assert apart.excludes_zero
    assert own.high > rival.low  # the means' own intervals overlap
    assert not Interval(0.1, -0.1, 0.3).excludes_zero
