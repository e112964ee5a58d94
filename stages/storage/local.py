"""Whole files and folders between this machine and any location: one download, one upload.

Each file is retried while the store fails (`stages.storage.retry`), and appears under its name when it is
whole.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from stages import storage
from stages.errors import UserError

logger = logging.getLogger(__name__)

PARTIAL = ".*." + "[0-9a-f]" * 32 + ".partial"  # a file while it is written, as a glob
NAME_BYTES = 240  # in a local file name: file systems take 255, and a temporary name is longer


@contextmanager
def local_file(uri: str) -> Iterator[Path]:
    """A file's path on this machine; the file is copied for the block if it is elsewhere.

    Raises FileNotFoundError if there is none; UserError or StageError as `patiently` does.
    """
    _, path = storage.filesystem(uri)
    if storage.is_local(uri):
        if not Path(path).exists():
            raise FileNotFoundError(path)
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="pixloom-") as temporary:
        local = _place(Path(temporary), path.rsplit("/", 1)[-1], uri)
        download(uri, local)
        yield local


@contextmanager
def local_folder(uri: str, *, leave_out: Collection[str] = ()) -> Iterator[Path]:
    """A folder on this machine with the files directly in `uri`, copied as by `local_file`.

    leave_out   names of files that need not be copied
    """
    _, path = storage.filesystem(uri)
    if storage.is_local(uri):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="pixloom-") as temporary:
        for name in storage.list_names(uri):
            if name not in leave_out:
                download(storage.join(uri, name), _place(Path(temporary), name, uri))
        yield Path(temporary)


def _place(folder: Path, name: str, uri: str) -> Path:
    """The path of a store's file in a local folder. Raises UserError if no local file can have its name."""
    if name in ("", ".", "..") or "\0" in name or len(name.encode(errors="replace")) > NAME_BYTES:
        raise UserError(f"{uri}: {name[:NAME_BYTES]!r} cannot be a file on this machine: rename the object")
    return folder / name


def download(uri: str, path: Path) -> None:
    """Copy a file to this machine. Raises as `local_file` does."""
    fs, remote = storage.filesystem(uri)
    partial = path.with_name(f".{path.name}.partial")
    try:
        storage.call_store(lambda: fs.get_file(remote, str(partial)), uri)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def upload(source: IO[bytes], uri: str) -> None:
    """Copy an open file from its beginning. Raises as `written` does."""

    def send() -> None:
        source.seek(0)
        with storage.create(uri) as target:
            shutil.copyfileobj(source, target, storage.UPLOAD_BYTES)

    storage.written(send, uri)


def upload_folder(path: Path, uri: str, *, last: str) -> None:
    """Copy a folder's files to a location. The file `last` marks the folder as whole, and is written last.

    An older `last` is removed first, so that no reader takes a mixture of old and new files for a folder.
    """
    marker = storage.join(uri, last)
    storage.remove(marker)
    for file in sorted(path.iterdir()):
        if file.name != last:
            with file.open("rb") as source:
                upload(source, storage.join(uri, file.name))
    storage.write_bytes(marker, (path / last).read_bytes())


@contextmanager
def alone(uri: str, *, shared: bool = False) -> Iterator[None]:
    """Wait until no other process works in a folder of this machine. A process that ends frees it.

    Files that a killed process had half written are removed.

    shared   the folder is not the run's own: do not log that it is waited for, and remove nothing
    """
    if not storage.is_local(uri):
        yield
        return
    path = Path(storage.filesystem(uri)[1])
    storage.written(lambda: path.mkdir(parents=True, exist_ok=True), uri)
    held = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every network file system can
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not shared:
                    logger.warning("another run works in %s; waiting until it ends", uri)
                fcntl.flock(held, fcntl.LOCK_EX)
            for partial in () if shared else path.rglob(PARTIAL):
                partial.unlink(missing_ok=True)
        yield
    finally:
        with suppress(OSError):  # it stays if there is anything in it
            path.rmdir()
        os.close(held)
