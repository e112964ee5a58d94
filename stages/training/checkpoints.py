"""Checkpoints of a training phase: all that going on needs, in one folder each, at any fsspec location.

    step-00000480/
        tensors.safetensors     weights, optimizer moments, averages
        curves.parquet          every point of the curves up to here
        checkpoint.json         position, plain values, size and SHA-256 of the others; written last

A folder without a valid `checkpoint.json` is none. Reading verifies every byte; a damaged newest checkpoint
is named and the one before is taken. They are ours rather than `ray.train.Checkpoint`s: Ray counts one only
once its controller has heard of it, so a worker killed right after loses it, and it verifies nothing.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages import storage
from stages.base import Config

TENSORS, CURVES, MANIFEST = "tensors.safetensors", "curves.parquet", "checkpoint.json"
ATTEMPTS = 5
WAIT_S = 2.0

logger = logging.getLogger(__name__)


class Position(Config):
    """Where in the data training is: `step` of `epoch` is the next one, both counted from 0.

    Augmentation, order and noise are functions of the seed and this position, so it is all the random state.
    """

    epoch: int = 0
    step: int = 0
    images: int = 0
    steps: int = 0
    """Steps of the phase so far."""


class FileEntry(Config):
    """A file of a checkpoint, as it was written."""

    size: int
    sha256: str


class Manifest(Config):
    """`checkpoint.json`."""

    format: Literal["pixloom-checkpoint"] = "pixloom-checkpoint"
    version: Literal[1] = 1
    job: str
    run_id: str = ""
    position: Position
    state: Any = None
    files: dict[str, FileEntry]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A state in memory. `job` names the phase's settings: another phase's checkpoint is not taken.

    state   nested dicts and lists of tensors, numbers, texts; keys are texts or integers
    curves  columns step, images, epoch, name, value, time_ms
    """

    job: str
    position: Position
    state: Mapping[str, Any]
    curves: pa.Table
    run_id: str = ""
    """Of MLflow, for a reader's eyes."""
    best: str = ""
    """Name of the best checkpoint so far, which stays whatever its age."""


class DamagedError(Exception):
    """A checkpoint is not what was written."""


# -- rules --------------------------------------------------------------------


def folder_name(position: Position) -> str:
    """The same position has the same name: writing it again replaces it."""
    return f"step-{position.steps:08d}"


def split_state(state: Any, prefix: str = "") -> tuple[dict[str, Tensor], Any]:
    """Nested values -> tensors by dotted path, and the same nesting as JSON, a reference for each tensor."""
    if isinstance(state, Tensor):
        return {prefix: state}, {"tensor": prefix}
    tensors: dict[str, Tensor] = {}
    if isinstance(state, Mapping):
        pairs = []
        for key, value in state.items():
            inner, plain = split_state(value, f"{prefix}.{key}" if prefix else str(key))
            tensors |= inner
            pairs.append([key, plain])
        return tensors, {"pairs": pairs}  # JSON objects would turn the keys of an optimizer's state into text
    if isinstance(state, list | tuple):
        items = []
        for index, value in enumerate(state):
            inner, plain = split_state(value, f"{prefix}.{index}")
            tensors |= inner
            items.append(plain)
        return tensors, {"list": items}
    assert state is None or isinstance(state, bool | int | float | str), f"{prefix}: {type(state)}"
    return tensors, state


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
    """A copy on the CPU that later steps do not change."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True).contiguous()
    if isinstance(state, Mapping):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [copied(value) for value in state]
    return state


def outdated(names: list[str], keep: int, best: str = "") -> list[str]:
    """Which of the checkpoints in a folder to delete so that the newest `keep` and the best one stay."""
    ours = sorted(name for name in names if name.startswith("step-"))
    return [name for name in ours[:-keep] if name != best]


# -- folders ------------------------------------------------------------------


def names(folder: str) -> list[str]:
    """Names of the checkpoint folders, complete or not, oldest first."""
    fs, path = storage.filesystem(folder)
    fs.invalidate_cache()
    try:
        entries = fs.ls(path, detail=True)
    except FileNotFoundError:
        return []
    found = (
        entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry["type"] == "directory"
    )
    return sorted(name for name in found if name.startswith("step-"))


def save(folder: str, checkpoint: Checkpoint, *, keep: int) -> None:
    """Write a checkpoint, its manifest last, then delete all but the newest `keep` and the best."""
    place = storage.join(folder, folder_name(checkpoint.position))
    tensors, plain = split_state(checkpoint.state)
    files: dict[str, FileEntry] = {}
    with tempfile.TemporaryDirectory(prefix="pixloom-") as temporary:
        # a local folder is written in place, so that the data crosses the disk once
        local = _local_folder(place) or Path(temporary)
        _forget(place)
        partial = local / f".{TENSORS}.partial"
        save_file({name: tensor.contiguous() for name, tensor in _unshared(tensors).items()}, partial)
        files[TENSORS] = _entry(partial)
        _publish(partial, storage.join(place, TENSORS))
        partial = local / f".{CURVES}.partial"
        pq.write_table(checkpoint.curves, partial, compression="zstd")
        files[CURVES] = _entry(partial)
        _publish(partial, storage.join(place, CURVES))
    manifest = Manifest(
        job=checkpoint.job,
        run_id=checkpoint.run_id,
        position=checkpoint.position,
        state=plain,
        files=files,
    )
    storage.write_bytes(storage.join(place, MANIFEST), manifest.model_dump_json().encode())
    for name in outdated(names(folder), keep, checkpoint.best):
        remove(storage.join(folder, name))


def load(place: str, *, job: str) -> Checkpoint:
    """Read and verify one checkpoint. Raises DamagedError saying what is wrong with it."""
    try:
        manifest = Manifest.model_validate_json(storage.read_bytes(storage.join(place, MANIFEST)))
    except FileNotFoundError:
        raise DamagedError(f"it was not finished (no {MANIFEST})") from None
    except ValidationError as error:
        raise DamagedError(f"{MANIFEST}: {error.errors()[0]['msg']}") from error
    if manifest.job != job:
        raise DamagedError("it belongs to other settings")
    with tempfile.TemporaryDirectory(prefix="pixloom-") as temporary:
        local = {name: _fetch(storage.join(place, name), Path(temporary)) for name in manifest.files}
        for name, entry in manifest.files.items():
            if _entry(local[name]) != entry:
                raise DamagedError(f"{name} is not what was written (size or checksum differs)")
        try:
            tensors = load_file(local[TENSORS])
            curves = pq.read_table(local[CURVES])
            state = join_state(tensors, manifest.state)
        except (SafetensorError, KeyError, pa.ArrowInvalid) as error:
            raise DamagedError(str(error)) from error
    return Checkpoint(manifest.job, manifest.position, state, curves, manifest.run_id)


def load_newest(folder: str, *, job: str, tell: Callable[[str], None] = logger.warning) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None. Every damaged one that is passed over is told of."""
    for name in reversed(names(folder)):
        place = storage.join(folder, name)
        try:
            return load(place, job=job)
        except DamagedError as damage:
            tell(f"checkpoint {place} cannot be used: {damage}; trying the one before")
    return None


def remove(place: str) -> None:
    """Delete a checkpoint, its manifest first, so that a half-deleted one is none."""
    _forget(place)
    fs, path = storage.filesystem(place)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def _forget(place: str) -> None:
    fs, path = storage.filesystem(storage.join(place, MANIFEST))
    if fs.exists(path):
        fs.rm_file(path)


def _local_folder(place: str) -> Path | None:
    fs, path = storage.filesystem(place)
    if not isinstance(fs, LocalFileSystem):
        return None
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _publish(local: Path, uri: str) -> None:
    """Make a local file appear under its name, at once; the local one is gone afterwards."""
    fs, path = storage.filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        local.replace(path)
    else:
        fs.put_file(str(local), path)
        local.unlink()


def _fetch(uri: str, temporary: Path) -> Path:
    """The file on this machine. Raises DamagedError if it is not there."""
    fs, path = storage.filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        local = Path(path)
    else:
        local = temporary / uri.rsplit("/", 1)[-1]
        try:
            fs.get_file(path, str(local))
        except FileNotFoundError:
            local = temporary / "missing"
    if not local.exists():
        raise DamagedError(f"{uri.rsplit('/', 1)[-1]} is missing")
    return local


def _entry(path: Path) -> FileEntry:
    with path.open("rb") as file:
        return FileEntry(size=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with memory of their own, which safetensors asks for."""
    seen: set[int] = set()
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return own


# -- writing while training goes on --------------------------------------------


@dataclass
class Writer:
    """Writes checkpoints from a thread. One waits at most: a newer one replaces it.

    A store that is away does not stop training: an attempt is repeated, then given up, which is told, and
    the next checkpoint tries again.
    """

    folder: str
    keep: int
    tell: Callable[[str], None] = logger.warning
    written: int = 0
    seconds: float = 0.0
    failure: str = ""
    _queue: queue.Queue[Checkpoint] = field(default_factory=lambda: queue.Queue(maxsize=1))
    _thread: threading.Thread | None = None

    def submit(self, checkpoint: Checkpoint) -> None:
        """Have a checkpoint written soon. Its tensors must be copies."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="checkpoint-writer", daemon=True)
            self._thread.start()
        try:
            self._queue.get_nowait()  # one that has not been begun is outdated now
            self._queue.task_done()
        except queue.Empty:
            pass
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
            started = time.monotonic()
            self.failure = self._save(checkpoint)
            if not self.failure:
                self.written += 1
                self.seconds += time.monotonic() - started
            self._queue.task_done()

    def _save(self, checkpoint: Checkpoint) -> str:
        reason = ""
        for attempt in range(ATTEMPTS):
            try:
                save(self.folder, checkpoint, keep=self.keep)
            except Exception as error:  # every store's client has its own
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                time.sleep(WAIT_S * 2**attempt if attempt < ATTEMPTS - 1 else 0)
            else:
                return ""
        self.tell(f"checkpoint {folder_name(checkpoint.position)} not written ({reason}); training goes on")
        return reason
