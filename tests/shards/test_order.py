"""The order of training: exact, once each, the same for any number of workers, resumable."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings, strategies as st

from stages.shards.order import Plan, num_steps, plan_epoch, slot_starts

groups_of = st.lists(st.integers(1, 9), min_size=1, max_size=40)


def rows_of(plan: Plan) -> list[list[tuple[int, int]]]:
    """(row group, row) of every step of a plan."""
    return [
        [
            (plan.units[u].group, int(plan.units[u].rows[r]))
            for u, r in zip(plan.unit[a:b], plan.row[a:b], strict=True)
        ]
        for a, b in zip(plan.offsets, plan.offsets[1:], strict=False)
    ]


@settings(max_examples=150, deadline=None)
@given(groups_of, st.integers(0, 5), st.integers(0, 3), st.integers(1, 12), st.integers(1, 5))
def test_every_pair_comes_exactly_once_and_only_the_last_batch_is_short(groups, seed, epoch, batch, window):
    steps = rows_of(plan_epoch(groups, seed=seed, epoch=epoch, batch=batch, window=window))
    flat = [row for step in steps for row in step]
    assert sorted(flat) == [(g, r) for g, size in enumerate(groups) for r in range(size)]
    total = sum(groups)
    assert len(steps) == num_steps(total, batch)
    assert [len(step) for step in steps[:-1]] == [batch] * (len(steps) - 1)
    assert len(steps[-1]) == (total % batch or batch)


@settings(max_examples=100, deadline=None)
@given(
    groups_of,
    st.integers(0, 5),
    st.sampled_from([(4, 2), (4, 4), (4, 3), (6, 3), (12, 5), (8, 8), (7, 4)]),
    st.integers(1, 5),
)
def test_the_global_batches_do_not_depend_on_the_number_of_workers(groups, seed, sizes, window):
    batch, world = sizes
    alone = rows_of(plan_epoch(groups, seed=seed, epoch=1, batch=batch, window=window))
    each = [
        rows_of(plan_epoch(groups, seed=seed, epoch=1, batch=batch, rank=r, world=world, window=window))
        for r in range(world)
    ]
    assert [[row for part in parts for row in part] for parts in zip(*each, strict=True)] == alone


@settings(max_examples=100, deadline=None)
@given(groups_of, st.integers(1, 6), st.integers(1, 5), st.data())
def test_a_plan_from_any_step_is_the_rest_of_the_whole_plan(groups, batch, window, data):
    whole = rows_of(plan_epoch(groups, seed=0, epoch=2, batch=batch, window=window))
    start = data.draw(st.integers(0, len(whole)))
    assert (
        rows_of(plan_epoch(groups, seed=0, epoch=2, batch=batch, window=window, start_step=start))
        == whole[start:]
    )


@settings(max_examples=60, deadline=None)
@given(groups_of, st.integers(1, 8), st.integers(1, 5))
def test_units_come_in_the_order_of_need_and_no_row_is_read_twice(groups, batch, window):
    plan = plan_epoch(groups, seed=3, epoch=0, batch=batch, window=window)
    first = [int(np.flatnonzero(plan.unit == u)[0]) for u in range(len(plan.units))]
    assert first == sorted(first)
    assert sum(len(u.rows) for u in plan.units) == sum(groups)
    assert all((np.diff(u.rows) > 0).all() for u in plan.units)


def test_slots_own_near_equal_stretches():
    assert slot_starts(10, 4).tolist() == [0, 3, 6, 8, 10]
    assert slot_starts(2, 4).tolist() == [0, 1, 2, 2, 2]


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {
        str(rows_of(plan_epoch([8] * 10, seed=seed, epoch=epoch, batch=4)))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


def test_the_shuffle_is_good():
    """Neighbours in storage are far apart in training, and a batch is nearly a random sample."""
    groups = [16] * 64
    base = np.concatenate([[0], np.cumsum(groups)])
    for batch in (1, 8):
        steps = rows_of(plan_epoch(groups, seed=0, epoch=0, batch=batch))
        flat = np.array([base[g] + r for step in steps for g, r in step])
        apart = np.abs(np.diff(flat))
        assert (apart <= 16).mean() < 0.15  # in one row group or its neighbour: 0.03 for a full shuffle
        assert abs(np.corrcoef(flat[:-1], flat[1:])[0, 1]) < 0.15
        assert abs(np.corrcoef(np.arange(len(flat)), flat)[0, 1]) < 0.2


def test_small_data_is_not_read_over_and_over():
    plan = plan_epoch([17] * 24, seed=0, epoch=0, batch=16)
    assert len(plan.units) <= 2 * 24


def test_a_worker_plans_only_what_it_reads():
    import time

    groups = np.full(300_000, 17)
    start = time.perf_counter()
    plan = plan_epoch(groups, seed=0, epoch=0, batch=64, rank=5, world=64)
    assert time.perf_counter() - start < 20  # about half a second; the bound only tells it from hours
    assert sum(len(u.rows) for u in plan.units) == 300_000 * 17 // 64 + (5 < 300_000 * 17 % 64)
