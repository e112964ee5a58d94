"""Training input: shards in, batches on the device out, ready before the step asks for them.

in:  a shards folder (see `stages.shards.dataset`), a split, seed, global batch size, rank and world size
out: per epoch an iterator of `Batch`es of this rank, in the order that `stages.shards.order` defines

A reader gives the rows of row groups, a few ahead: local files are mapped. Threads verify checksums, decode,
crop and mirror straight into the batch's memory (Pillow, numpy and isal release the GIL). Colours stay uint8
until they are on the device.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from stages.base import Role, Split
from stages.config.shard import AugmentConfig
from stages.errors import UserError
from stages.images import geometry, kinds
from stages.images.augment import NONE, apply, draw
from stages.images.kinds import ImageRejected
from stages.models.step import Batch
from stages.parallel.threads import Prefetch, own_cores, prefetch_map
from stages.shards import dataset
from stages.shards.dataset import DatasetSpec, RoleSpec
from stages.shards.order import WINDOW, Plan, ReadUnit, num_steps, plan_epoch
from stages.shards.row_groups import read_unit

Unit = dict[str, Any]
"""What is read together: file, group and rows (`stages.shards.row_groups.read_unit`)."""

Read = Callable[[str, Iterator[Unit], list[str]], Iterator[pa.Table]]
"""The tables of read units of a shards folder, with these columns, in order; tables may be cut anywhere."""

Images = Mapping[Role, tuple[memoryview, int] | None]
"""Per role the stored bytes and their checksum, or None where the pair has none."""

MISSING_LABEL = 255  # the label map of a pair that has none


def read_here(folder: str, units: Iterator[Unit], columns: list[str]) -> Iterator[pa.Table]:
    """The rows of each unit, read in this thread: local files are mapped, and read when they are decoded."""
    for unit in units:
        yield read_unit(folder, unit, columns)


@dataclass(frozen=True, slots=True)
class StoredPair:
    """One pair as it is stored in a file of the shards folder."""

    key: str
    file: str
    images: Images


@dataclass(frozen=True, slots=True)
class RowsOfStep:
    """The pairs of one step of this rank, and how many all ranks have in it."""

    epoch: int
    pairs: list[StoredPair]
    total: int


class Feed:
    """Batches of one training worker.

    scale      1, 2, 4 ...: images come at 1/scale of the resolution; `augment.crop` is in stored pixels
    prefetch   batches that are ready ahead of the step
    threads    that decode
    epochs     the feed does not read ahead beyond the last one; None: it does not end
    read       `read_here`, or `stages.shards.readers.read_with_ray` for shards in a store

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
        prefetch: int = 4,
        threads: int | None = None,
        epochs: int | None = None,
        with_labels: bool = False,
        read: Read = read_here,
    ) -> None:
        self.folder, self.spec, self.seed, self.batch = folder, spec, seed, batch
        self.rank, self.world, self.augment, self.scale = rank, world, augment, scale
        self.device, self.prefetch, self.epochs = torch.device(device), prefetch, epochs
        self.read, self.threads = read, threads or min(4, own_cores())
        self.rows = spec.rows(split)
        if not self.rows:
            raise UserError(f"{folder}: there are no pairs in split '{split}'")
        if world > batch:
            raise UserError(f"a batch of {batch} is too small for {world} workers")
        self.steps_per_epoch = num_steps(self.rows, batch)
        self.roles = {r: s for r, s in spec.roles.items() if with_labels or r != "label"}
        files = spec.splits[split]
        self._names = [file.name for file in files for _ in file.row_groups]
        self._index = [index for file in files for index in range(len(file.row_groups))]
        self._sizes = np.array([rows for file in files for rows in file.row_groups], np.int64)
        width, height = augment.crop or spec.size
        if width > spec.size[0] or height > spec.size[1]:
            raise UserError(f"augment.crop: {width}x{height} does not fit images of {spec.size}")
        self.size = (width // scale, height // scale)
        self._stream: Prefetch[tuple[Batch, torch.cuda.Event | None]] | None = None
        self._next = (-1, -1)  # epoch and step of the stream's next batch

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from a step on; every rank gets as many, the last may be short or empty."""
        if self._next != (epoch, start_step) or self._stream is None:
            self.close()
            self._stream = Prefetch(
                [lambda: self._batches(epoch, start_step)], depth=self.prefetch, name="feed"
            )
            self._next = (epoch, start_step)
        for step in range(start_step, self.steps_per_epoch):
            batch, sent = next(self._stream)
            last = step + 1 == self.steps_per_epoch
            self._next = (epoch + 1, 0) if last else (epoch, step + 1)
            yield batch if sent is None else _arrived(batch, sent)

    def close(self) -> None:
        """Stop reading ahead. Only needed before the process ends: its threads end with it."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- in the feed's threads -----------------------------------------------------

    def _batches(self, epoch: int, start_step: int) -> Iterator[tuple[Batch, torch.cuda.Event | None]]:
        """All batches from a step on, over the ends of epochs; on the device or on their way there."""
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        steps = self._steps(epoch, start_step)
        with ThreadPoolExecutor(self.threads, thread_name_prefix="decode") as threads:
            for batch in prefetch_map(threads, self._make, steps, ahead=self.threads + 1):
                yield (batch, None) if stream is None else _send(batch, self.device, stream)

    def _steps(self, first_epoch: int, start_step: int) -> Iterator[RowsOfStep]:
        """The rows of every step; reading continues over the ends of epochs."""
        epochs = range(first_epoch, sys.maxsize if self.epochs is None else self.epochs)

        @lru_cache(maxsize=2)  # reading needs an epoch's plan first, then its steps do
        def plan_of(epoch: int) -> tuple[int, Plan]:
            start = start_step if epoch == first_epoch else 0
            return start, self._plan(epoch, start)

        units = (self._unit(unit) for epoch in epochs for unit in plan_of(epoch)[1].units)
        rows = self._rows(self.read(self.folder, units, self._columns()))
        for epoch in epochs:
            start, plan = plan_of(epoch)
            cache: dict[tuple[int, int], StoredPair] = {}  # by unit and row, each until its step
            next_unit = 0  # units come in the order of their first need
            for step in range(plan.steps):
                pairs: list[StoredPair] = []
                for at in range(int(plan.offsets[step]), int(plan.offsets[step + 1])):
                    place = int(plan.unit[at]), int(plan.row[at])
                    while next_unit <= place[0]:
                        unit = plan.units[next_unit]
                        for index, (key, images) in enumerate(itertools.islice(rows, len(unit.rows))):
                            cache[next_unit, index] = StoredPair(key, self._names[unit.group], images)
                        next_unit += 1
                    pairs.append(cache.pop(place))
                yield RowsOfStep(epoch, pairs, min(self.batch, self.rows - (start + step) * self.batch))

    def _plan(self, epoch: int, start_step: int) -> Plan:
        return plan_epoch(
            self._sizes,
            seed=self.seed,
            epoch=epoch,
            batch=self.batch,
            rank=self.rank,
            world=self.world,
            start_step=start_step,
            window=WINDOW,
        )

    def _columns(self) -> list[str]:
        return ["key", *(name for role in self.roles for name in (role, f"{role}_crc"))]

    def _unit(self, unit: ReadUnit) -> Unit:
        """A read unit as plain values."""
        whole = len(unit.rows) == self._sizes[unit.group]
        return {
            "file": self._names[unit.group],
            "group": self._index[unit.group],
            "rows": None if whole else unit.rows.tolist(),
        }

    def _rows(self, tables: Iterator[pa.Table]) -> Iterator[tuple[str, Images]]:
        """Key and images of each row; images are views, not copies."""
        for table in tables:
            for batch in table.to_batches():
                columns = {role: _binaries(batch[role], batch[f"{role}_crc"]) for role in self.roles}
                for key, *images in zip(batch["key"].to_pylist(), *columns.values(), strict=True):
                    yield key, dict(zip(columns, images, strict=True))

    def _make(self, step: RowsOfStep) -> Batch:
        """Verify, decode, crop and mirror the rows of a step into fresh memory."""
        arrays = {role: self._empty(role, len(step.pairs)) for role in self.roles}
        size, crop = self.spec.size, self.augment.crop
        for index, pair in enumerate(step.pairs):
            jitter = draw(self.seed, step.epoch, pair.key, size, crop, self.augment.mirror)
            for role, role_spec in self.roles.items():
                out, stored = arrays[role][1][index], pair.images[role]
                if stored is None:
                    out[...] = MISSING_LABEL if role == "label" else 0
                    continue
                try:
                    array = dataset.decode_role(*stored, role_spec, size)
                except ImageRejected as why:
                    raise dataset.corrupt(self.folder, pair.file, pair.key, role, why) from why
                self._place(apply(array, jitter, size, crop), role_spec, out)
        share = self.world * len(step.pairs) / step.total
        tensors = {role: tensor for role, (tensor, _) in arrays.items()}
        return Batch(
            source=tensors["source"],
            target=tensors["target"],
            instance=tensors.get("instance"),
            label=tensors.get("label"),
            keys=[pair.key for pair in step.pairs],
            share=share,
        )

    def _empty(self, role: Role, rows: int) -> tuple[Tensor, npt.NDArray[Any]]:
        """Memory for a role of a batch: the tensor (N, C, H, W), and the same as an array (N, H, W, C).

        Raw images are stored planar and stay so, others decode to pixels (channels last): either way a row is
        copied once.
        """
        spec, (width, height) = self.roles[role], self.size
        pinned = self.device.type == "cuda"
        if spec.encoding == "raw":
            tensor = torch.empty(
                (rows, spec.channels, height, width), dtype=tensor_dtype(spec), pin_memory=pinned
            )
        else:
            tensor = torch.empty(
                (rows, height, width, spec.channels), dtype=tensor_dtype(spec), pin_memory=pinned
            )
            tensor = tensor.permute(0, 3, 1, 2)
        return tensor, tensor.permute(0, 2, 3, 1).numpy()

    def _place(self, array: kinds.Array, spec: RoleSpec, out: npt.NDArray[Any]) -> None:
        array = geometry.shrink(array, self.scale, spec.kind)
        if out.dtype == np.float32 and spec.kind != "channels":
            array = kinds.normalise(array, spec.kind)
        copy_pixels(array, out)


def _binaries(column: pa.Array, crcs: pa.Array) -> Iterator[tuple[memoryview, int] | None]:
    """Bytes and checksum of each value of a binary column, as views on its buffer; None for nulls."""
    wide = pa.types.is_large_binary(column.type)
    _, places, data = column.buffers()
    offsets = np.frombuffer(places, np.int64 if wide else np.int32)[column.offset :].tolist()
    view = memoryview(b"" if data is None else data)
    for index, crc in enumerate(crcs.to_pylist()):
        yield None if crc is None else (view[offsets[index] : offsets[index + 1]], crc)


def tensor_dtype(spec: RoleSpec) -> torch.dtype:
    """The type of a role's images in a batch: ids as integers, 8-bit amounts as they are, others float32."""
    if spec.kind == "instances":
        return torch.int32
    return torch.float32 if spec.kind in ("grey16", "lab_ab", "channels") else torch.uint8


def copy_pixels(array: kinds.Array, out: npt.NDArray[Any]) -> None:
    """Copy an image (H, W, C) into memory of its shape; a mirrored one a pixel at a time, not a byte."""
    pixel = array.itemsize * array.shape[2]
    if array.strides[1:] == (-pixel, array.itemsize) and array.dtype == out.dtype and out.strides[1] == pixel:
        whole = np.dtype((np.void, pixel))
        array, out = array.view(whole), out.view(whole)
    np.copyto(out, array)


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
    for tensor in (batch.source, batch.target, batch.instance, batch.label):
        if tensor is not None:
            tensor.record_stream(current)  # its memory is not reused before the step is done with it
    return batch
