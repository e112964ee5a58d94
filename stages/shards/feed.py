"""Training input: shards in, batches on the device out, ready before the step asks for them.

in:  a shards folder (see `stages.shards.dataset`), a split, seed, global batch size, rank and world size
out: per epoch an iterator of `Batch`es of this rank, in the order that `stages.shards.order` defines

A reader gives the rows of row groups, a few ahead: local files are mapped. Threads verify checksums, decode,
crop and mirror straight into the batch's memory (Pillow, numpy and isal release the GIL). Colours stay uint8
until they are on the device.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from stages.base import Role, Split
from stages.config.augment import AugmentConfig
from stages.errors import UserError
from stages.images.augment import NONE
from stages.models.step import Batch
from stages.parallel.threads import Prefetch, own_cores, prefetch_map
from stages.shards.dataset import DatasetSpec
from stages.shards.order import Plan, ReadUnit, num_steps, plan_epoch
from stages.shards.prepare import Preparation, StoredPair, Unit, dtype_of
from stages.shards.row_groups import read_unit

AHEAD = 4  # batches that are ready before the step asks for them

Read = Callable[[Preparation, Iterator[Unit]], Iterator[StoredPair]]
"""The pairs of read units, in order."""


def read_here(preparation: Preparation, units: Iterator[Unit]) -> Iterator[StoredPair]:
    """The pairs of each unit, read in this thread: local files are mapped, and read when they are decoded."""
    columns = preparation.columns()
    for unit in units:
        yield from preparation.pairs(unit, read_unit(preparation.folder, unit, columns))


class Feed(AbstractContextManager["Feed"]):
    """Batches of one training worker.

    scale      1, 2, 4 ...: images come at 1/scale of the resolution (`Preparation`)
    threads    that decode
    epochs     the feed does not read ahead beyond the last one; None: it does not end
    read       `read_here`, or `stages.train.read_with_ray`

    Raises UserError if the split is empty or a batch has fewer pairs than there are workers.
    """

    def __init__(
        self,
        folder: str,
        spec: DatasetSpec,
        *,
        split: Split = "train",
        seed: int = 0,
        batch: int = 1,
        rank: int = 0,
        world: int = 1,
        augment: AugmentConfig = NONE,
        scale: int = 1,
        device: torch.device | str = "cpu",
        threads: int | None = None,
        epochs: int | None = None,
        read: Read = read_here,
    ) -> None:
        self.preparation = Preparation(
            folder=folder,
            spec=replace(spec, splits={}),  # small, wherever it is sent
            seed=seed,
            augment=augment,
            scale=scale,
        )
        self.seed, self.batch, self.rank, self.world = seed, batch, rank, world
        self.device, self.epochs = torch.device(device), epochs
        self.read, self.threads = read, threads or min(4, own_cores())
        self.rows = spec.rows(split)
        if not self.rows:
            raise UserError(f"{folder}: there are no pairs in split '{split}'")
        if world > batch:
            raise UserError(f"a batch of {batch} is too small for {world} workers")
        self.steps_per_epoch = num_steps(self.rows, batch)
        self._files = spec.splits[split]
        self._sizes = self._files.sizes()
        self._stream: Prefetch[tuple[Batch, torch.cuda.Event | None]] | None = None
        self._next = (-1, -1)  # epoch and step of the stream's next batch

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from a step on; every rank gets as many, the last may be short or empty."""
        if self._next != (epoch, start_step) or self._stream is None:
            self.close()
            self._stream = Prefetch([lambda: self._batches(epoch, start_step)], depth=AHEAD, name="feed")
            self._next = (epoch, start_step)
        for step in range(start_step, self.steps_per_epoch):
            batch, sent = next(self._stream)
            last = step + 1 == self.steps_per_epoch
            self._next = (epoch + 1, 0) if last else (epoch, step + 1)
            yield batch if sent is None else _arrived(batch, sent)

    def whole_epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch with the pairs of all ranks."""
        alone = copy.copy(self)
        alone.rank, alone.world, alone._stream = 0, 1, None
        with alone:
            yield from alone.epoch(epoch)

    def close(self) -> None:
        """Stop reading ahead. Only needed before the process ends: its threads end with it."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- in the feed's threads -----------------------------------------------------

    def _batches(self, epoch: int, start_step: int) -> Iterator[tuple[Batch, torch.cuda.Event | None]]:
        """All batches from a step on, over the ends of epochs; on the device or on their way there."""
        stream = torch.cuda.Stream(self.device) if self.device.type != "cpu" else None  # type: ignore[no-untyped-call]
        steps = self._steps(epoch, start_step)
        with ThreadPoolExecutor(self.threads, thread_name_prefix="decode") as threads:
            for batch in prefetch_map(threads, self._make, steps, ahead=self.threads + 1):
                yield (batch, None) if stream is None else _send(batch, self.device, stream)

    def _steps(self, first_epoch: int, start_step: int) -> Iterator[tuple[list[StoredPair], int]]:
        """The pairs of every step, and how many all ranks have in it. Reads on over the ends of epochs."""
        epochs = range(first_epoch, sys.maxsize if self.epochs is None else self.epochs)

        @lru_cache(maxsize=2)  # reading needs an epoch's plan first, then its steps do
        def plan_of(epoch: int) -> tuple[int, Plan]:
            start = start_step if epoch == first_epoch else 0
            return start, plan_epoch(
                self._sizes,
                seed=self.seed,
                epoch=epoch,
                batch=self.batch,
                rank=self.rank,
                world=self.world,
                start_step=start,
            )

        units = (self._unit(epoch, unit) for epoch in epochs for unit in plan_of(epoch)[1].units)
        read = self.read(self.preparation, units)
        for epoch in epochs:
            start, plan = plan_of(epoch)
            cache: dict[tuple[int, int], StoredPair] = {}  # by unit and row, each until its step
            next_unit = 0  # units come in the order of their first need
            for step in range(plan.steps):
                pairs: list[StoredPair] = []
                for at in range(int(plan.offsets[step]), int(plan.offsets[step + 1])):
                    place = int(plan.unit[at]), int(plan.row[at])
                    while next_unit <= place[0]:
                        rows = len(plan.units[next_unit].rows)
                        for index, pair in enumerate(itertools.islice(read, rows)):
                            cache[next_unit, index] = pair
                        next_unit += 1
                    pairs.append(cache.pop(place))
                yield pairs, min(self.batch, self.rows - (start + step) * self.batch)

    def _unit(self, epoch: int, unit: ReadUnit) -> Unit:
        """A read unit as plain values."""
        size = int(self._sizes[unit.group])
        rows = None if len(unit.rows) == size else unit.rows.tolist()
        file, group = self._files.place(unit.group)
        return {"epoch": epoch, "file": file, "group": group, "rows": rows, "size": size}

    def _make(self, step: tuple[list[StoredPair], int]) -> Batch:
        """Verify, decode, crop and mirror the rows of a step into fresh memory."""
        pairs, total = step
        tensors = {role: self._empty(role, len(pairs)) for role in self.preparation.roles}
        arrays = {role: tensor.permute(0, 2, 3, 1).numpy() for role, tensor in tensors.items()}
        for index, pair in enumerate(pairs):
            pair.copy_to({role: array[index] for role, array in arrays.items()})
        return Batch(
            source=tensors["source"],
            target=tensors["target"],
            instance=tensors.get("instance"),
            keys=[pair.key for pair in pairs],
            share=self.world * len(pairs) / total,
        )

    def _empty(self, role: Role, rows: int) -> Tensor:
        """Memory (N, C, H, W) for a role of a batch."""
        shape, planar = self.preparation.layout(role)
        dtype = getattr(torch, np.dtype(dtype_of(self.preparation.roles[role])).name)
        tensor = torch.empty((rows, *shape), dtype=dtype, pin_memory=self.device.type != "cpu")
        return tensor if planar else tensor.permute(0, 3, 1, 2)


def _send(
    batch: Batch, device: torch.device, stream: torch.cuda.Stream
) -> tuple[Batch, torch.cuda.Event | None]:
    """Copy to the device while it computes; `_arrived` makes the step wait for the copy."""
    with torch.cuda.stream(stream):
        sent = batch.to(device, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return sent, event


def _arrived(batch: Batch, sent: torch.cuda.Event) -> Batch:
    current = torch.cuda.current_stream(batch.source.device)
    current.wait_event(sent)
    for tensor in (batch.source, batch.target, batch.instance):
        if tensor is not None:
            tensor.record_stream(current)  # its memory is not reused before the step is done with it
    return batch
