"""Intervals of means against SciPy's bootstrap, and by what they should cover."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from stages.scoring import intervals, metrics
from stages.scoring.intervals import Interval, blocks, difference, interval, jackknife


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


def drawn(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of targets and of images that were generated for them: correlated, and none below 0."""
    noise = rng.normal(size=(2, count, FEATURES))
    spread = np.arange(1, FEATURES + 1) ** -0.7
    real = noise[0] * spread
    fake = (0.8 * noise[0] + 0.6 * noise[1]) * spread * (1 + 0.3 * np.sin(np.arange(FEATURES))) + 0.2
    return np.maximum(0, fake), np.maximum(0, real + 0.1)


FEATURES = 24


@pytest.mark.parametrize("count", [20, 40, 150])
def test_intervals_of_set_distances_hold_what_as_many_other_images_would_give(count: int) -> None:
    """With fewer images than features, and with more: the truth is the mean of 200 other sets."""
    rng = np.random.default_rng(0)
    found: dict[str, list[Interval | None]] = {"frechet": [], "kernel": []}
    for _ in range(200):
        fake, real = drawn(rng, count)
        block = blocks(np.zeros(count))

        def frechet(kept: np.ndarray, sides: tuple[np.ndarray, np.ndarray] = (fake, real)) -> float:
            return metrics.frechet_distance_of(*(side[kept[block]] for side in sides))  # noqa: B023 - at once

        found["frechet"].append(jackknife(frechet, block))
        found["kernel"].append(jackknife(metrics.KernelDistance(fake, real, block), block))
    for name, every in found.items():
        bounds = np.array(every, float)
        truth = bounds[:, 0].mean()
        held = ((bounds[:, 1] < truth) & (truth < bounds[:, 2])).mean()
        assert 0.9 < held < 0.99, (name, held)


def test_the_jackknife_of_a_mean_is_its_standard_error_with_blocks_of_any_size() -> None:
    values = skewed(20)
    found = jackknife(lambda kept: float(values[kept].mean()), np.arange(20))
    assert found is not None
    expected = stats.t.interval(0.95, 19, values.mean(), stats.sem(values))
    assert found[1:] == pytest.approx(expected, abs=1e-4)
    held = 0
    sizes = np.array([1, 2, 3, 5, 8, 13, 2, 2, 4, 9])
    block = np.repeat(np.arange(10), sizes)
    for seed in range(400):
        drawn = np.random.default_rng(seed).normal(1, 2, len(block))
        found = jackknife(lambda kept, drawn=drawn: float(drawn[kept[block]].mean()), block)  # type: ignore[misc]
        assert found is not None
        held += found.low < 1 < found.high
    assert 0.9 < held / 400 < 0.99


def test_images_without_a_group_are_drawn_by_themselves_beside_those_that_have_one() -> None:
    names = pa.chunked_array([["a", "", "a"], ["b", None, ""]])
    numbers = intervals.group_numbers(names)
    assert numbers[0] == numbers[2]
    assert len(np.unique(numbers)) == 5
    alone = intervals.group_numbers(pa.chunked_array([["", None, ""]]))
    assert (np.diff(alone) > 0).all()  # in their order: as without groups
    assert len(np.unique(blocks(numbers))) == 5


def test_a_block_has_whole_groups_and_a_set_of_too_few_images_has_no_interval() -> None:
    groups = np.repeat(np.arange(50), 3)
    block = blocks(groups)
    assert len(np.unique(block)) == intervals.BLOCKS
    assert all(len(np.unique(block[groups == group])) == 1 for group in range(50))
    assert blocks(np.zeros(7)).tolist() == list(range(7))
    assert blocks(np.array([4, 4, 9])).tolist() == [0, 0, 1]
    assert jackknife(lambda _: 1.0, np.array([0, 0, 1])) is None
    assert jackknife(lambda _: 1.0, np.array([], np.int64)) is None
