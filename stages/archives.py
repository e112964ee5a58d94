"""Archives read in place: the members of a tar, tar.gz or zip at any location, never unpacked to a folder.

in:  tar://::https://host/facades.tar.gz, zip://train::s3://bucket/x.zip, or just a location that ends so
out: members {path below the location, uri, size, etag}, in the archive's order

A member's URI is fsspec's chain (`tar://train/1.jpg::https://host/facades.tar.gz`). Its etag says where its
bytes lie in which version of the archive, so that a reader need not look through the archive again.
Members are data from strangers: links, devices and encrypted members are no images, and a name that leads
out of the archive is only ever a name, since nothing is written where a member says.
"""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from stages.storage import filesystem

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
ZIP_SUFFIXES = (".zip",)


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an archive. `fault` says why it cannot be an object: "link", "encrypted", or ""."""

    path: str
    uri: str
    size: int
    etag: str
    fault: str = ""


def is_archive(uri: str) -> bool:
    """Whether a location is an archive, by its chain or its suffix."""
    return uri.startswith(("tar://", "zip://")) or uri.split("?", maxsplit=1)[0].lower().endswith(
        TAR_SUFFIXES + ZIP_SUFFIXES
    )


def parts(uri: str) -> tuple[str, str, str]:
    """Protocol ("tar" or "zip"), folder or member inside, and the archive's own location.

    Raises:
        ValueError: the chain names no archive.
    """
    if uri.startswith(("tar://", "zip://")):
        protocol, _, rest = uri.partition("://")
        inside, chained, outer = rest.partition("::")
        if not chained or not outer:
            raise ValueError(
                f"name the archive after '::', as in {protocol}://::https://host/images.{protocol}"
            )
        return protocol, inside.strip("/"), outer
    return "zip" if _file_name(uri).endswith(ZIP_SUFFIXES) else "tar", "", uri


def _file_name(uri: str) -> str:
    return uri.partition("?")[0].lower()


def info(uri: str) -> dict[str, Any]:
    """What the store says of the archive itself.

    Raises:
        FileNotFoundError, PermissionError, OSError: it is not there or not to be had.
    """
    fs, path = filesystem(parts(uri)[2])
    fs.invalidate_cache()
    found: dict[str, Any] = fs.info(path)
    if found["type"] == "directory":
        raise FileNotFoundError(uri)
    return found


def members(uri: str, version: str) -> Iterator[Member]:
    """The files of an archive, read from start to end once; of a zip, its directory.

    Args:
        uri: the location.
        version: the archive's own etag, which becomes part of each member's.

    Raises:
        OSError: the archive is damaged or cut off.
    """
    protocol, folder, outer = parts(uri)
    below = f"{folder}/" if folder else ""
    fs, path = filesystem(outer)
    try:
        with fs.open(path, "rb") as file:
            found = _tar_members(file) if protocol == "tar" else _zip_members(file)
            for name, size, place, fault in found:
                clean = name.removeprefix("./")
                if clean.startswith(below):
                    address = f"{protocol}://{name}::{outer}"
                    yield Member(clean[len(below) :], address, size, f"{place}@{version}", fault)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise OSError(f"damaged archive: {error}") from error


def _tar_members(file: IO[bytes]) -> Iterator[tuple[str, int, str, str]]:
    with tarfile.open(fileobj=file, mode="r|*", errors="surrogateescape") as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has read; millions of them are memory
            if not member.isdir():
                fault = "" if member.isreg() and not member.issparse() else "link"
                yield member.name, member.size, f"{member.offset_data}+{member.size}", fault


def _zip_members(file: IO[bytes]) -> Iterator[tuple[str, int, str, str]]:
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if not member.is_dir():
                kind = member.external_attr >> 28
                fault = "encrypted" if member.flag_bits & 1 else "link" if kind not in (0, 0o10) else ""
                place = (
                    f"{member.header_offset}+{member.compress_size}.{member.compress_type}.{member.CRC:08x}"
                )
                yield member.filename, member.file_size, place, fault
