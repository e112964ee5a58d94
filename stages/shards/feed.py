"""Training input: shards in, batches on the device out, ready before the step asks for them.

in:  a shards folder (see `stages.shards.dataset`), a split, seed, global batch size, rank and world size
out: per epoch an iterator of `Batch`es of this rank, in the order that `stages.shards.order` defines

Local row groups are mapped, those of a store are read by Ray's tasks, a few ahead. In this process threads
verify checksums, decode, crop and mirror straight into the batch's memory (Pillow, numpy and isal let go of
the GIL). Colours stay uint8 until they are on the device.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import torch
from ray.exceptions import RayTaskError
from torch import Tensor

from stages import storage
from stages.base import Role, Split
from stages.config.shard import AugmentConfig
from stages.errors import PixloomError, UserError
from stages.images import geometry, kinds
from stages.images.augment import NONE, apply, draw
from stages.images.kinds import ImageRejected
from stages.models.step import Batch
from stages.objects.fetch import in_order
from stages.shards import dataset
from stages.shards.dataset import DatasetSpec, RoleSpec
from stages.shards.order import WINDOW, Plan, num_steps, plan_epoch
from stages.shards.row_groups import read_unit

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
Unit = dict[str, Any]  # file, group, rows: see `stages.row_groups.read_unit`

UNITS_PER_TASK = 4  # row groups of about 8 MiB: a task's start costs little beside them
READERS = 2  # tasks of one worker that read at once, and so 64 MiB of Ray's store at most
MISSING_LABEL = 255  # where an optional label map is lacking


# -- reading row groups, in Ray's tasks or here --------------------------------------


def _read_units(folder: str, units: list[Unit], columns: list[str]) -> Iterator[pa.Table]:
    for unit in units:
        yield read_unit(folder, unit, columns)


def read_with_ray(folder: str, units: Iterator[Unit], columns: list[str]) -> Iterator[pa.Table]:
    """The rows of each unit, in order, read ahead by Ray's tasks; views on what they put in its store.

    Not a pipeline of Ray Data: its scheduler polls without pause while its output is waited for, which took
    0.7 of a core, and the interpreter, from the process that trains.
    """
    # no CPUs of its own: reading waits more than it computes, and those that train hold every one
    task = ray.remote(num_cpus=0, num_returns="streaming")(_read_units)
    reading: deque[Any] = deque()
    while True:
        while len(reading) < READERS and (some := list(itertools.islice(units, UNITS_PER_TASK))):
            reading.append(task.remote(folder, some, columns))
        if not reading:
            return
        try:
            for table in reading[0]:
                yield ray.get(table)
        except RayTaskError as error:
            if isinstance(error.cause, PixloomError):  # its one line, without what Ray adds to the text
                raise type(error.cause)(str(error.cause).partition("\n")[0]) from error
            raise
        reading.popleft()


def read_here(folder: str, units: Iterator[Unit], columns: list[str]) -> Iterator[pa.Table]:
    """As `read_with_ray`, in this thread: local files are mapped, and read when their pixels are cropped."""
    for unit in units:
        yield read_unit(folder, unit, columns)


Read = Callable[[str, Iterator[Unit], list[str]], Iterator[pa.Table]]


# -- background -----------------------------------------------------------------


class Ahead(Generic[Item]):
    """An iterator that a thread runs ahead of whoever takes from it, by at most `depth` items."""

    def __init__(self, items: Iterator[Item], depth: int, name: str) -> None:
        self._items = items
        self._ready: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            for item in self._items:
                if not self._put((item, None)):
                    return
        except BaseException as error:
            self._put((None, error))
        else:
            self._put((None, StopIteration()))
        finally:
            close = getattr(self._items, "close", None)
            if close is not None:
                close()

    def _put(self, entry: tuple[Item | None, BaseException | None]) -> bool:
        while not self._closed.is_set():
            try:
                self._ready.put(entry, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        item, error = self._ready.get()
        if error is not None:
            self._ready.put((None, error))  # for whoever asks again
            raise error
        return cast(Item, item)

    def close(self) -> None:
        """Stop the thread; what it has made ahead is dropped."""
        self._closed.set()
        self._thread.join(timeout=30)


# -- rows to batches --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stored:
    """One pair as it is stored: per role its bytes and their checksum, or None where it is lacking."""

    key: str
    file: str
    images: Mapping[Role, tuple[memoryview, int] | None]


@dataclass(frozen=True, slots=True)
class Step:
    """The rows of one step of this rank, and how many all ranks have in it."""

    epoch: int
    rows: list[Stored]
    total: int


class Feed:
    """Batches of one training worker.

    `scale` is 1, 2, 4 ...: images come at 1/scale of the resolution. `augment.crop` is in stored pixels.
    `epochs`, where known, keeps the feed from reading ahead beyond the last one.
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
        read: Read | None = None,
    ) -> None:
        self.folder, self.spec, self.seed, self.batch = folder, spec, seed, batch
        self.rank, self.world, self.augment, self.scale = rank, world, augment, scale
        self.device, self.prefetch, self.epochs = torch.device(device), prefetch, epochs
        self.read = read or (read_here if storage.is_local(folder) else read_with_ray)
        self.threads = threads or min(4, os.cpu_count() or 1)
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
        self._stream: Ahead[tuple[Batch, torch.cuda.Event | None]] | None = None
        self._next = (-1, -1)  # epoch and step that the stream gives next

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from a step on; every rank gets as many, the last may be short or empty."""
        if self._next != (epoch, start_step) or self._stream is None:
            self.close()
            self._stream = Ahead(self._batches(epoch, start_step), self.prefetch, "feed")
            self._next = (epoch, start_step)
        for step in range(start_step, self.steps_per_epoch):
            batch, sent = next(self._stream)
            last = step + 1 == self.steps_per_epoch
            self._next = (epoch + 1, 0) if last else (epoch, step + 1)
            yield batch if sent is None else _arrived(batch, sent)

    def close(self) -> None:
        """Stop reading ahead. Nothing else needs it; threads end with the process."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- in the background thread -------------------------------------------------

    def _batches(self, epoch: int, start_step: int) -> Iterator[tuple[Batch, torch.cuda.Event | None]]:
        """All batches from a step on, over the ends of epochs; on the device or on their way there."""
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        steps = self._steps(self._plans(epoch, start_step))
        with ThreadPoolExecutor(self.threads, thread_name_prefix="decode") as threads:
            for batch in in_order(threads, self._make, steps, ahead=self.threads + 1):
                yield (batch, None) if stream is None else _send(batch, self.device, stream)

    def _plans(self, epoch: int, start_step: int) -> Iterator[tuple[int, int, Plan]]:
        """(epoch, first step, plan) of this epoch and those after it."""
        while self.epochs is None or epoch < self.epochs:
            yield (
                epoch,
                start_step,
                plan_epoch(
                    self._sizes,
                    seed=self.seed,
                    epoch=epoch,
                    batch=self.batch,
                    rank=self.rank,
                    world=self.world,
                    start_step=start_step,
                    window=WINDOW,
                ),
            )
            epoch, start_step = epoch + 1, 0

    def _steps(self, plans: Iterator[tuple[int, int, Plan]]) -> Iterator[Step]:
        """Rows of every step; reading goes on over the ends of epochs."""
        plans, ahead = itertools.tee(plans)
        rows = _Rows(self.roles, self.read(self.folder, self._units(ahead), self._columns()))
        try:
            for epoch, start, plan in plans:
                loaded: dict[int, list[Stored | None]] = {}
                left = np.bincount(plan.unit, minlength=len(plan.units))
                have = 0
                for step in range(plan.steps):
                    picked: list[Stored] = []
                    for at in range(int(plan.offsets[step]), int(plan.offsets[step + 1])):
                        unit = int(plan.unit[at])
                        while have <= unit:  # units come in the order of their first need
                            wanted = plan.units[have]
                            loaded[have] = rows.take(len(wanted.rows), self._names[wanted.group])
                            have += 1
                        place = int(plan.row[at])
                        row = loaded[unit][place]
                        assert row is not None, "a plan names each row once"
                        picked.append(row)
                        loaded[unit][place] = None
                        left[unit] -= 1
                        if not left[unit]:
                            del loaded[unit]
                    total = min(self.batch, self.rows - (start + step) * self.batch)
                    yield Step(epoch, picked, total)
        finally:
            rows.close()

    def _columns(self) -> list[str]:
        return ["key", *(name for role in self.roles for name in (role, f"{role}_crc"))]

    def _units(self, plans: Iterator[tuple[int, int, Plan]]) -> Iterator[Unit]:
        """Read units as plain values, over all epochs."""
        for _, _, plan in plans:
            for unit in plan.units:
                whole = len(unit.rows) == self._sizes[unit.group]
                yield {
                    "file": self._names[unit.group],
                    "group": self._index[unit.group],
                    "rows": None if whole else unit.rows.tolist(),
                }

    def _make(self, step: Step) -> Batch:
        """Verify, decode, crop and mirror the rows of a step into fresh memory."""
        arrays = {role: self._empty(role, len(step.rows)) for role in self.roles}
        for index, row in enumerate(step.rows):
            drawn = draw(
                self.seed, step.epoch, row.key, self.spec.size, self.augment.crop, self.augment.mirror
            )
            for role, known in self.roles.items():
                stored = row.images[role]
                if stored is None:
                    arrays[role][1][index] = MISSING_LABEL if role == "label" else 0
                    continue
                try:
                    array = dataset.decode_role(*stored, known, self.spec.size)
                except ImageRejected as why:
                    raise dataset.corrupt(self.folder, row.file, row.key, role, why) from why
                self._place(
                    apply(array, drawn, self.spec.size, self.augment.crop), known, arrays[role][1][index]
                )
        share = self.world * len(step.rows) / step.total
        images_of = {role: tensor for role, (tensor, _) in arrays.items()}
        return Batch(
            source=images_of["source"],
            target=images_of["target"],
            instance=images_of.get("instance"),
            label=images_of.get("label"),
            keys=[row.key for row in step.rows],
            share=share,
        )

    def _empty(self, role: Role, rows: int) -> tuple[Tensor, npt.NDArray[Any]]:
        """Memory for a role of a batch: the tensor (N, C, H, W), and the same as an array (N, H, W, C).

        What is stored planar stays so, what decodes to pixels is kept as pixels (channels last): either way
        a row is copied once.
        """
        known, (width, height) = self.roles[role], self.size
        pinned = self.device.type == "cuda"
        kept = tensor_dtype(known)
        if known.encoding == "raw":
            tensor = torch.empty((rows, known.channels, height, width), dtype=kept, pin_memory=pinned)
        else:
            tensor = torch.empty((rows, height, width, known.channels), dtype=kept, pin_memory=pinned)
            tensor = tensor.permute(0, 3, 1, 2)
        return tensor, tensor.permute(0, 2, 3, 1).numpy()

    def _place(self, array: kinds.Array, known: RoleSpec, out: npt.NDArray[Any]) -> None:
        array = geometry.shrink(array, self.scale, known.kind)
        if out.dtype == np.float32 and known.kind != "channels":
            array = kinds.normalise(array, known.kind)
        copy_pixels(array, out)


class _Rows:
    """Rows out of a stream of Arrow tables, taken in any number; their images are views, not copies."""

    def __init__(self, roles: Iterable[Role], tables: Iterator[pa.Table]) -> None:
        self.roles, self.tables = tuple(roles), tables
        self._rows: Iterator[tuple[str, dict[Role, tuple[memoryview, int] | None]]] = iter(())

    def take(self, count: int, file: str) -> list[Stored | None]:
        """The next rows, which lie in `file`."""
        taken: list[Stored | None] = []
        while len(taken) < count:
            taken += [
                Stored(key, file, found) for key, found in itertools.islice(self._rows, count - len(taken))
            ]
            if len(taken) < count:
                table = next(self.tables, None)
                assert table is not None, "there are as many rows as the plan asked for"
                self._rows = itertools.chain.from_iterable(self._unpack(b) for b in table.to_batches())
        return taken

    def _unpack(
        self, rows: pa.RecordBatch
    ) -> Iterator[tuple[str, dict[Role, tuple[memoryview, int] | None]]]:
        columns = {role: list(_binaries(rows[role], rows[f"{role}_crc"])) for role in self.roles}
        for index, key in enumerate(rows["key"].to_pylist()):
            yield key, {role: column[index] for role, column in columns.items()}

    def close(self) -> None:
        """Stop reading."""
        close = getattr(self.tables, "close", None)
        if close is not None:
            close()


def _binaries(column: pa.Array, crcs: pa.Array) -> Iterator[tuple[memoryview, int] | None]:
    """Bytes and checksum of each value of a binary column, as views on its buffer; None for nulls."""
    wide = pa.types.is_large_binary(column.type)
    _, places, data = column.buffers()
    offsets = np.frombuffer(places, np.int64 if wide else np.int32)[column.offset :].tolist()
    view = memoryview(b"" if data is None else data)
    for index, crc in enumerate(crcs.to_pylist()):
        yield None if crc is None else (view[offsets[index] : offsets[index + 1]], crc)


def tensor_dtype(known: RoleSpec) -> torch.dtype:
    """What a role's images are handed over as: ids as integers, 8-bit amounts as they are, others float32."""
    if known.kind == "instances":
        return torch.int32
    return torch.float32 if known.kind in ("grey16", "lab_ab", "channels") else torch.uint8


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
    """Copy to the device beside the computation there; `_arrived` makes the step wait for it."""
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
            tensor.record_stream(current)  # its memory is not used again before the step is done with it
    return batch
