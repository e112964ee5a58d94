"""Checkpoints of a training phase: all that resuming needs, in one folder each, at any fsspec location.

    step-00000480/
        tensors.safetensors     weights, optimizer moments, averages
        curves.parquet          every point of the curves up to here
        checkpoint.json         position, plain values, size and SHA-256 of the others; written last

A folder without a valid `checkpoint.json` is no checkpoint. Reading verifies every byte; a damaged newest
checkpoint is named and the previous one is used. Not `ray.train.Checkpoint`s: Ray counts one only once its
controller has heard of it, so a worker killed right after writing loses it, and Ray verifies nothing.
"""

from __future__ import annotations

import logging
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages import storage
from stages.base import Config
from stages.errors import first_invalid, one_line
from stages.models.files.manifest import FileEntry, verified, write_folder
from stages.storage.local import local_folder, upload_folder
from stages.storage.retry import retried

TENSORS: Final = "tensors.safetensors"
CURVES: Final = "curves.parquet"
MANIFEST: Final = "checkpoint.json"
FileName = Literal["tensors.safetensors", "curves.parquet"]

logger = logging.getLogger(__name__)


class Position(Config):
    """Where in the data training is: the next step is `step` of `epoch`, both counted from 0.

    images   images seen in the phase so far
    steps    steps done in the phase so far

    Augmentation, order and noise are functions of the seed and this position, so it is all the random state.
    """

    epoch: int = 0
    step: int = 0
    images: int = 0
    steps: int = 0


class CheckpointManifest(Config):
    """`checkpoint.json`."""

    format: Literal["pixloom-checkpoint"] = "pixloom-checkpoint"
    version: Literal[1] = 1
    job: str
    run_id: str = ""
    position: Position
    state: Any = None
    files: dict[FileName, FileEntry]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A state in memory.

    job      digest of the phase's settings: checkpoints with another one are ignored
    state    nested dicts and lists of tensors, numbers, texts; keys are texts or integers
    curves   columns step, images, epoch, name, value, time_ms
    run_id   the phase's run in MLflow, for people who read `checkpoint.json`
    best     names of measured checkpoints, the best first: the first that is there is kept whatever its age
    arrived  an event of the GPU after which the tensors hold the state; None: they do
    """

    job: str
    position: Position
    state: Mapping[str, Any]
    curves: pa.Table
    run_id: str = ""
    best: Sequence[str] = ()
    arrived: torch.cuda.Event | None = None


class DamagedError(Exception):
    """A checkpoint is not what was written."""


# -- rules --------------------------------------------------------------------


def folder_name(position: Position) -> str:
    """The same position has the same name: writing it again replaces it."""
    return f"step-{position.steps:08d}"


def split_state(state: Any) -> tuple[dict[str, Tensor], Any]:
    """Nested values -> tensors by dotted path, and the same nesting as JSON, a reference for each tensor."""
    tensors: dict[str, Tensor] = {}

    def plain(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            tensors[path[1:]] = value
            return {"tensor": path[1:]}
        if isinstance(value, Mapping):  # JSON objects would turn the keys of an optimizer's state into text
            return {"pairs": [[key, plain(inner, f"{path}.{key}")] for key, inner in value.items()]}
        if isinstance(value, list | tuple):
            return {"list": [plain(inner, f"{path}.{index}") for index, inner in enumerate(value)]}
        assert value is None or isinstance(value, bool | int | float | str), f"{path}: {type(value)}"
        return value

    return tensors, plain(state, "")


def join_state(tensors: Mapping[str, Tensor], plain: Any) -> Any:
    """The inverse of `split_state` (tuples come back as lists). Raises KeyError for an unknown tensor."""
    if not isinstance(plain, dict):
        return plain
    if "tensor" in plain:
        return tensors[plain["tensor"]]
    if "pairs" in plain:
        return {key: join_state(tensors, value) for key, value in plain["pairs"]}
    return [join_state(tensors, value) for value in plain["list"]]


def copied(state: Any) -> Any:
    """A copy on the CPU that later steps do not change.

    From a GPU into pinned memory, without waiting: an event after this call says when the copy is there.
    """
    tensors, plain = split_state(state)
    copies = {name: one.detach().to("cpu", copy=True, non_blocking=True) for name, one in tensors.items()}
    return join_state(copies, plain)


# -- folders ------------------------------------------------------------------


def names(folder: str) -> list[str]:
    """Names of the checkpoint folders, complete or not, oldest first."""
    there = (name for name in storage.list_folders(folder) if name.startswith("step-"))
    return sorted(there, key=len)  # in the order of their names already, above 10^8 steps of longer ones


def save(folder: str, checkpoint: Checkpoint, *, keep: int) -> None:
    """Write a checkpoint, its manifest last, then delete all but the newest `keep` and the best."""
    tensors, plain = split_state(checkpoint.state)
    if checkpoint.arrived is not None:
        checkpoint.arrived.synchronize()

    writers: dict[FileName, Callable[[Path], None]] = {
        TENSORS: partial(save_file, {name: tensor.contiguous() for name, tensor in tensors.items()}),
        CURVES: partial(pq.write_table, checkpoint.curves, compression="zstd"),
    }
    manifest = CheckpointManifest(
        job=checkpoint.job, run_id=checkpoint.run_id, position=checkpoint.position, state=plain, files={}
    )
    with new_folder(storage.join(folder, folder_name(checkpoint.position)), last=MANIFEST) as local:
        write_folder(local, MANIFEST, writers, manifest)
    whole = (name for name in checkpoint.best if storage.exists(storage.join(folder, name, MANIFEST)))
    there = names(folder)  # later ones than this one are unfinished or damaged: training went on without them
    newest = there[: there.index(folder_name(checkpoint.position)) + 1][-keep:]
    for name in sorted({*there} - {*newest, next(whole, "")}):  # the newest and the best one stay
        remove(storage.join(folder, name))


def load(place: str, *, job: str) -> Checkpoint:
    """Read and verify one checkpoint. Raises DamagedError saying what is wrong with it."""
    try:
        manifest = CheckpointManifest.model_validate_json(storage.read_bytes(storage.join(place, MANIFEST)))
    except FileNotFoundError:
        raise DamagedError(f"it was not finished (no {MANIFEST})") from None
    except ValidationError as error:
        raise DamagedError(f"{MANIFEST}: {first_invalid(error)}") from error
    if manifest.job != job:
        raise DamagedError("it belongs to other settings")
    with local_folder(place) as local:
        try:
            tensors = load_file(verified(local, TENSORS, manifest.files[TENSORS], manifest_name=MANIFEST))
            curves = pq.read_table(verified(local, CURVES, manifest.files[CURVES], manifest_name=MANIFEST))
            state = join_state(tensors, manifest.state)
        except (ValueError, SafetensorError, KeyError) as error:
            raise DamagedError(one_line(error).removeprefix(f"{local}/")) from error
    return Checkpoint(manifest.job, manifest.position, state, curves, manifest.run_id)


def load_newest(folder: str, *, job: str, tell: Callable[[str], None] = logger.warning) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None. `tell` is called about each one that is not usable."""
    for name in reversed(names(folder)):
        place = storage.join(folder, name)
        try:
            return load(place, job=job)
        except DamagedError as damage:
            tell(f"checkpoint {place} cannot be used: {damage}; trying the previous one")
    return None


def remove(place: str) -> None:
    """Delete a checkpoint, its manifest first: a half-deleted one does not count."""
    storage.remove(storage.join(place, MANIFEST))
    storage.remove(place)


@contextmanager
def new_folder(uri: str, *, last: str) -> Iterator[Path]:
    """A folder of this machine to write: the one at `uri`, or one that is uploaded there with `last` last."""
    if storage.is_local(uri):  # written in place, so that the data crosses the disk once
        yield Path(storage.filesystem(uri)[1])
        return
    with tempfile.TemporaryDirectory(prefix="pixloom-") as temporary:
        yield Path(temporary)
        upload_folder(Path(temporary), uri, last=last)


# -- writing while training continues -------------------------------------------


@dataclass
class Writer:
    """Writes checkpoints from a thread. At most one waits: a newer one replaces it.

    A store that is away does not stop training: a checkpoint that cannot be written is retried
    (`storage.retry`), then reported with `tell`, and the next checkpoint tries again.
    """

    folder: str
    keep: int
    tell: Callable[[str], None] = logger.warning
    saved: Callable[[float], None] = lambda _: None
    """Called after each checkpoint with the seconds that writing it took."""
    keeps_best: bool = False
    """Whether no newer one replaces the best: training waits for it."""
    failure: str = ""
    """Why the last checkpoint was not written, or ""."""
    _queue: queue.Queue[Checkpoint] = field(default_factory=lambda: queue.Queue(maxsize=1))
    _thread: threading.Thread | None = None

    def submit(self, checkpoint: Checkpoint) -> None:
        """Have a checkpoint written soon. Its tensors must be copies."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="checkpoint-writer", daemon=True)
            self._thread.start()
        with suppress(queue.Empty):
            waiting = self._queue.get_nowait()
            if self.keeps_best and folder_name(waiting.position) in checkpoint.best[:1]:
                self._queue.put(waiting)
            self._queue.task_done()
        self._queue.put(checkpoint)

    def wait(self) -> None:
        """Wait until nothing is left to write."""
        self._queue.join()

    def finish(self) -> None:
        """Wait until all is written. Raises OSError if the last checkpoint could not be."""
        self.wait()
        if self.failure:
            raise OSError(self.failure)

    def _work(self) -> None:
        while True:
            checkpoint = self._queue.get()
            self.failure = self._save(checkpoint)
            self._queue.task_done()

    def _save(self, checkpoint: Checkpoint) -> str:
        """Write one; returns why it could not be written, or ""."""
        started = time.monotonic()
        try:
            retried(lambda: save(self.folder, checkpoint, keep=self.keep))
        except Exception as error:  # every store's client has its own
            reason = one_line(error, kind=True)
            self.tell(
                f"checkpoint {folder_name(checkpoint.position)} not written ({reason}); training continues"
            )
            return reason
        self.saved(time.monotonic() - started)
        return ""
