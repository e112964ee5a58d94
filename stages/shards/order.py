"""In which order training sees the pairs: exact, and the same global batches for any number of workers.

in:  the rows of each row group of a split; seed, epoch, global batch size, rank, world size, first step
out: the row groups a worker has to read, in order of need, and which of their rows make up each of its steps

An epoch's sequence of all n rows is made of row groups in random order; rows are mixed within windows of
`window` row groups. A batch has B slots, and slot s owns the s-th of B contiguous, near-equal stretches of
the sequence: step k takes the k-th row of every slot. So

- every pair comes exactly once an epoch, in ceil(n / B) steps, of which the last may be short (its rows are
  those of the first n mod B slots);
- a batch's rows come from B far-apart places, each mixed over a window;
- rank r of W owns slots r*B//W to (r+1)*B//W: the global batch does not depend on W, and no row group is
  read by more workers than the ends of stretches make necessary;
- any step of any epoch can be the first: the order is a function of its arguments alone.

Pure, numpy only. A worker plans its own share: of 100 million rows for 64 workers in 2 to 4 s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

WINDOW = 8
"""Row groups among which rows are mixed. With 17 rows a group (286 px, raw) that is a window of 136."""


@dataclass(frozen=True, slots=True)
class ReadUnit:
    """Rows of one row group (numbered over the split) that are read together; `rows` ascend."""

    group: int
    rows: Ints


@dataclass(frozen=True, slots=True)
class Plan:
    """What one worker reads in one epoch, from its first step on.

    units     read units, in the order of their first need
    unit      of each row of each step, in order: the index of its unit ...
    row       ... and the row's index within `ReadUnit.rows`
    offsets   the rows of step i are `unit[offsets[i]:offsets[i+1]]`, `row[offsets[i]:offsets[i+1]]`
    """

    units: tuple[ReadUnit, ...]
    unit: Ints
    row: Ints
    offsets: Ints

    @property
    def steps(self) -> int:
        """Steps left in the epoch."""
        return len(self.offsets) - 1


def num_steps(rows: int, batch: int) -> int:
    """Steps that see every pair once; the last may be short."""
    return math.ceil(rows / batch)


def slot_starts(rows: int, batch: int) -> Ints:
    """The first place of each slot's stretch of the sequence, and the end of the last one."""
    slots = np.arange(batch + 1, dtype=np.int64)
    return slots * (rows // batch) + np.minimum(slots, rows % batch)


def plan_epoch(
    groups: Sequence[int] | npt.NDArray[np.integer[Any]],
    *,
    seed: int,
    epoch: int,
    batch: int,
    rank: int = 0,
    world: int = 1,
    start_step: int = 0,
    window: int = WINDOW,
) -> Plan:
    """The plan of one worker. `groups`: rows of every row group of the split; `world` is at most `batch`."""
    assert world <= batch, "the config checks that every worker has a pair"
    sizes = np.asarray(groups, np.int64)
    rows = int(sizes.sum())
    steps = num_steps(rows, batch)
    assert 0 <= start_step <= steps
    sequence = _Sequence.of(sizes, seed=seed, epoch=epoch, window=window)
    starts = slot_starts(rows, batch)
    stretches = [
        sequence.stretch(int(starts[slot]) + start_step, int(starts[slot + 1]))
        for slot in range(rank * batch // world, (rank + 1) * batch // world)
    ]
    lengths = [len(groups) for groups, _ in stretches]
    group = np.concatenate([groups for groups, _ in stretches])
    row = np.concatenate([rows for _, rows in stretches])
    step = np.concatenate([np.arange(length) for length in lengths])
    slot = np.repeat(np.arange(len(lengths)), lengths)
    by_step = np.lexsort((slot, step))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(step, minlength=steps - start_step))])
    reach = max(1, int(window * sizes.mean())) if len(sizes) else 1
    units, unit, at = _units(group[by_step], row[by_step], step[by_step], reach)
    return Plan(units, unit, at, offsets.astype(np.int64))


def _generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    return np.random.default_rng([seed & (2**64 - 1), epoch, index])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sequence:
    """An epoch's sequence of all rows.

    order    row groups, in the epoch's order
    sizes    rows of each row group
    ends     place in the sequence where each group of `order` begins; last, the end
    edges    place where each window begins; last, the end
    """

    seed: int
    epoch: int
    window: int
    order: Ints
    sizes: Ints
    ends: Ints
    edges: Ints

    @classmethod
    def of(cls, sizes: Ints, *, seed: int, epoch: int, window: int) -> _Sequence:
        """The sequence of an epoch."""
        order = _generator(seed, epoch, 0).permutation(len(sizes))
        ends = np.concatenate([[0], np.cumsum(sizes[order])])
        edges = np.unique(np.append(ends[:-1:window], ends[-1]))
        return cls(seed=seed, epoch=epoch, window=window, order=order, sizes=sizes, ends=ends, edges=edges)

    def stretch(self, first: int, last: int) -> tuple[Ints, Ints]:
        """Row group, and row in it, of each place from `first` up to `last`."""
        groups: list[Ints] = [np.empty(0, np.int64)]
        rows: list[Ints] = [np.empty(0, np.int64)]
        if first < last:
            for index in range(int(np.searchsorted(self.edges, first, "right")) - 1, len(self.edges) - 1):
                begin, end = int(self.edges[index]), int(self.edges[index + 1])
                if begin >= last:
                    break
                members = self.order[np.searchsorted(self.ends, begin) :][: self.window]
                filled = np.searchsorted(np.cumsum(self.sizes[members]), end - begin)
                members = members[: int(filled) + 1]
                mixed = _generator(self.seed, self.epoch, index + 1).permutation(end - begin)
                mixed = mixed[max(first, begin) - begin : min(last, end) - begin]
                inner = np.concatenate([[0], np.cumsum(self.sizes[members])])
                member = np.searchsorted(inner, mixed, "right") - 1
                groups.append(members[member])
                rows.append(mixed - inner[member])
        return np.concatenate(groups), np.concatenate(rows)


def _units(group: Ints, row: Ints, step: Ints, reach: int) -> tuple[tuple[ReadUnit, ...], Ints, Ints]:
    """Read units for these rows, which come in order of need; and each row's unit and its index there.

    Rows of one row group needed within `reach` steps of each other are read together, for whichever slots:
    in small data sets several slots share a window.
    """
    if not len(group):
        return (), np.empty(0, np.int64), np.empty(0, np.int64)
    ordered = np.lexsort((row, step, group))  # by group, then by need
    g, s = group[ordered], step[ordered]
    fresh = np.append(True, g[1:] != g[:-1])
    begins = np.flatnonzero(fresh)
    for begin, end in zip(begins, np.append(begins[1:], len(g)), strict=True):
        if s[end - 1] - s[begin] > reach:  # needed again much later: it is read again, not cached
            since = s[begin]
            for i in range(begin, end):
                if s[i] - since > reach:
                    fresh[i], since = True, s[i]
    number = np.cumsum(fresh) - 1
    begins = np.flatnonzero(fresh)
    place = np.empty(len(group), np.int64)
    place[ordered] = np.arange(len(group))
    # Units in order of their first need: of the index of each one's first row.
    by_need = np.argsort(np.minimum.reduceat(ordered, begins))
    rank = np.empty(len(begins), np.int64)
    rank[by_need] = np.arange(len(begins))
    chunks = np.split(row[ordered], begins[1:])
    at = np.concatenate([np.argsort(np.argsort(chunk)) for chunk in chunks])
    units = tuple(ReadUnit(int(g[begins[index]]), np.sort(chunks[index])) for index in by_need)
    return units, rank[number][place], at[place]
