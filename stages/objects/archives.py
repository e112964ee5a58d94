"""Archives read in place: the members of a tar, tar.gz or zip at any location, never unpacked to a folder.

in:  tar://::https://host/facades.tar.gz, zip://train::s3://bucket/x.zip, or just a location that ends so
out: its members (`Listed`), in the archive's order

A member's URI is fsspec's chain (`tar://train/1.jpg::https://host/facades.tar.gz`). Its etag holds the place
of its bytes and the archive's version, so that a reader need not search the archive again. Members are data
from strangers: links, devices and encrypted members are no images, and a name that leads out of the archive
does no harm, since nothing is ever written to a member's path.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any, cast

from stages.config.locations import archive_parts, plain_name
from stages.objects import Listed
from stages.storage import filesystem

_ROOT = re.compile(r"\A(?:\.?/)+")  # of names that begin with "./", or with "/", as `tar -P` writes


def info(uri: str) -> dict[str, Any]:
    """fsspec's info of the archive itself.

    Raises:
        FileNotFoundError, PermissionError, OSError: there is none, or it cannot be read.
    """
    fs, path = filesystem(archive_parts(uri)[2])
    fs.invalidate_cache()
    entry: dict[str, Any] = fs.info(path)
    if entry["type"] == "directory":
        raise FileNotFoundError(uri)
    return entry


def members(uri: str, version: str) -> Iterator[Listed]:
    """The files of an archive, read from start to end once; of a zip, its directory.

    Args:
        uri: the location.
        version: the archive's own etag, which becomes part of each member's.

    Raises:
        OSError: the archive is damaged or cut off. ValueError: its members are all outside of the folder.
    """
    protocol, folder, outer = archive_parts(uri)
    below = f"{folder}/" if folder else ""
    fs, path = filesystem(outer)
    try:
        with fs.open(path, "rb") as file:
            entries = _tar_members(unpacked(file, outer)) if protocol == "tar" else _zip_members(file)
            others, any_below = "", False
            for name, size, place, fault in entries:
                clean = _ROOT.sub("", name)
                if not clean.startswith(below):
                    others = clean
                    continue
                any_below = True
                address = f"{protocol}://{name}::{outer}"
                yield Listed(clean[len(below) :], address, size, f"{place}@{version}", fault)
            if others and not any_below:
                raise ValueError(f"it has nothing below {folder!r}; a member is {others[:100]!r}")
    except (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError) as error:
        raise OSError(f"damaged archive: {error}") from error


def tar(file: Any) -> tarfile.TarFile:
    """A tar that is read from its start, and not compressed."""
    return tarfile.open(fileobj=file, mode="r|", errors="surrogateescape")


def _tar_members(file: IO[bytes]) -> Iterator[tuple[str, int, str, str]]:
    stream = _Stream(file)
    with tar(stream) as archive:
        for member in archive:
            # tarfile keeps every header it has read; millions of them are memory
            archive.members = []  # type: ignore[attr-defined]
            if not member.isdir():
                fault = "" if member.isreg() and not member.issparse() else "link"
                yield member.name, member.size, f"{member.offset_data}+{member.size}", fault
    # tarfile stops without an error where an archive is cut off.
    while stream.read(1 << 20):
        pass
    if stream.tail.strip(b"\0"):
        raise EOFError("it is cut off")


def unpacked(file: IO[bytes], uri: str) -> IO[bytes]:
    """An open archive without its compression, of one stream or several, as parallel programs write them."""
    name = plain_name(uri)
    if name.endswith((".gz", ".tgz")):
        return cast(IO[bytes], gzip.GzipFile(fileobj=file))
    if name.endswith(".bz2"):
        return cast(IO[bytes], bz2.BZ2File(file))
    if name.endswith(".xz"):
        return cast(IO[bytes], lzma.LZMAFile(file))
    return file


class _Stream:
    """A file that remembers the last block it read: a whole tar ends with a block of zeros."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.tail = file, b"\1"

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.tail = (self.tail + data)[-tarfile.BLOCKSIZE :]
        return data


def _zip_members(file: IO[bytes]) -> Iterator[tuple[str, int, str, str]]:
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            name = member.filename.replace("\\", "/")  # as some programs of Windows write them
            if not name.endswith("/"):
                kind = member.external_attr >> 28
                fault = "encrypted" if member.flag_bits & 1 else "link" if kind not in (0, 0o10) else ""
                place = (
                    f"{member.header_offset}+{member.compress_size}.{member.compress_type}.{member.CRC:08x}"
                )
                yield name, member.file_size, place, fault
