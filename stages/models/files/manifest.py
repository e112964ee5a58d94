"""A folder of files that counts once its manifest is there: JSON with every other file's size and SHA-256.

The manifest is written last, so a folder without one is unfinished work. Models and checkpoints are such
folders; each has its own manifest type, with `files: {name: FileEntry}` among its fields.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import Field
from safetensors import SafetensorError

from stages.base import Config

MAX_FILE_BYTES = 1 << 36
"""64 GiB: beyond any model here, below what a hostile size could exhaust unseen."""

Name = TypeVar("Name", bound=str)
Manifested = TypeVar("Manifested", bound=Config)


class FileEntry(Config):
    """One file of the folder."""

    size: Annotated[int, Field(ge=8, le=MAX_FILE_BYTES)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        """The entry of a file as it is now."""
        with path.open("rb") as file:
            return cls(size=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def write_folder(
    folder: Path,
    manifest_name: str,
    writers: Mapping[Name, Callable[[Path], object]],
    manifest: Manifested,
) -> Manifested:
    """Write files by their writers, then the manifest with their entries, which is returned.

    An older manifest is removed first, so that none is ever next to files of another version. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / manifest_name).unlink(missing_ok=True)
    entries: dict[Name, FileEntry] = {}
    for name, write in writers.items():
        with _placed(folder / name) as partial:
            try:
                write(partial)
            except SafetensorError as error:  # a full disk, for example: as any other file's writer says it
                raise OSError(str(error)) from error
            entries[name] = FileEntry.of(partial)
    written = manifest.model_copy(update={"files": entries})
    with _placed(folder / manifest_name) as partial:
        partial.write_bytes(written.model_dump_json(indent=2).encode() + b"\n")
    return written


@contextmanager
def _placed(path: Path) -> Iterator[Path]:
    """A path to write a file at; it is renamed to `path` if the block ends without an error."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())  # before anything vouches for it
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def verified(folder: Path, name: str, entry: FileEntry, *, manifest_name: str) -> Path:
    """The path of a file, verified byte by byte. Raises ValueError if it differs from its entry."""
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{path}: missing, though {manifest_name} lists it")
    if path.resolve().parent != folder.resolve():
        raise ValueError(f"{path}: leads out of its folder")
    size = path.stat().st_size
    if size != entry.size:
        raise ValueError(f"{path}: {size} bytes, {manifest_name} says {entry.size} (truncated or altered)")
    if FileEntry.of(path) != entry:
        raise ValueError(f"{path}: its SHA-256 is not the one in {manifest_name} (damaged or altered)")
    return path
