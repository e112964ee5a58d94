"""Whole files and folders between this machine and any location: one download, one upload.

Each file is tried again while the store fails (`stages.storage.retry`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.storage.files import filesystem, is_local, join, list_names, write_bytes
from stages.storage.retry import patiently


@contextmanager
def local_file(uri: str) -> Iterator[Path]:
    """A file on this machine, copied for as long as it is needed if it is elsewhere.

    Raises FileNotFoundError if there is none; UserError or StageError as `patiently` does.
    """
    _, path = filesystem(uri)
    if is_local(uri):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="pixloom-") as temporary:
        local = Path(temporary) / path.rsplit("/", 1)[-1]
        download(uri, local)
        yield local


@contextmanager
def local_folder(uri: str, *, leave_out: Collection[str] = ()) -> Iterator[Path]:
    """The files directly in a folder, on this machine for as long as they are needed.

    leave_out   names that are not needed, so not copied
    """
    _, path = filesystem(uri)
    if is_local(uri):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="pixloom-") as temporary:
        for name in list_names(uri):
            if name not in leave_out:
                download(join(uri, name), Path(temporary) / name)
        yield Path(temporary)


def download(uri: str, path: Path) -> None:
    """Copy a file to this machine. Raises as `local_file` does."""
    fs, there = filesystem(uri)
    patiently(lambda: fs.get_file(there, str(path)), uri)


def upload(path: Path, uri: str) -> None:
    """Copy a file of this machine to a location, where it appears whole or not at all."""
    fs, there = filesystem(uri)
    patiently(lambda: fs.put_file(str(path), there), uri)


def upload_folder(path: Path, uri: str, *, last: str) -> None:
    """Copy a folder's files to a location; the file `last` makes the folder whole, and is written last.

    An older `last` is removed first, so that at no time a reader takes old and new files for one folder.
    """
    fs, there = filesystem(join(uri, last))
    fs.invalidate_cache()
    if patiently(lambda: fs.exists(there), uri):
        patiently(lambda: fs.rm_file(there), uri)
    for file in sorted(path.iterdir()):
        if file.name != last:
            upload(file, join(uri, file.name))
    write_bytes(join(uri, last), (path / last).read_bytes())
