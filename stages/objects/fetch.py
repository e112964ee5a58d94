"""Read whole objects, in the version that was listed, with retries while the store fails.

in:  an object {uri, size, etag} as ingest listed it
out: its bytes; ImageRejected `missing` or `changed` if the store no longer has that version, `too_large` for
     more than 1 GiB, `unreadable` for a damaged member of an archive

A store that stays away or refuses access ends the stage with one error: no image is rejected because the
network failed. If the store keeps an MD5 (S3's etag of an object written by one request), the bytes are
compared with it, since not every client notices a flipped bit.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fsspec.asyn import sync
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from stages.config.locations import archive_parts, plain_name
from stages.images.kinds import ImageRejected
from stages.objects import archives
from stages.objects.cells import MOST_BYTES, SCHEME, Cells
from stages.storage import etag_of, filesystem, local_etag, patiently, s3, speaks
from stages.storage.retry import ATTEMPTS, FIRST_WAIT

logger = logging.getLogger(__name__)

AGREEING_READS = 3  # after the first: a fault may damage two reads in the same place, but hardly four
_MD5 = re.compile(r"[0-9a-f]{32}")
_TAR_PLACE = re.compile(r"(\d+)\+(\d+)@(.*)", re.DOTALL)
_ZIP_PLACE = re.compile(r"(\d+)\+(\d+)\.(\d+)\.([0-9a-fA-F]{8})@(.*)", re.DOTALL)
_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz")


@dataclass(frozen=True, slots=True)
class Object:
    """An object as it was listed. A size of -1 and an etag of "" are unknown."""

    uri: str
    size: int = -1
    etag: str = ""


class _DamagedError(OSError):
    """The bytes are not those the store keeps: another read may be right."""


class Reader:
    """Reads the objects of one task. Threads may share it."""

    def __init__(self, *, attempts: int = ATTEMPTS, first_wait: float = FIRST_WAIT) -> None:
        self.attempts, self.first_wait = attempts, first_wait
        self._versions: dict[str, str] = {}
        self._members: dict[str, bytes] = {}
        self._cells = Cells()
        self._etag_is_md5 = True
        self._lock = threading.Lock()

    def read(self, wanted: Object) -> bytes:
        """The object's bytes.

        Raises:
            ImageRejected: `missing` or `changed` since it was listed; `too_large`; `unreadable`.
            UserError: the store refuses access. StageError: it failed at every attempt.
        """
        _check_size(wanted.uri, wanted.size)
        try:
            return patiently(lambda: self._read(wanted), wanted.uri, self.attempts, self.first_wait)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise ImageRejected("missing", wanted.uri) from error

    def expect(self, wanted: Iterable[Object]) -> None:
        """Announce what will be read, so that each row group of a table and each compressed tar is read once.

        A gzip stream can only be read from its start: reading member by member would unpack the whole archive
        for every image. The wanted members are unpacked now, and are in memory for `read` to return.
        """
        members_of: dict[str, dict[str, Object]] = {}
        for member in wanted:
            if member.uri.startswith(SCHEME):
                self._cells.want(member.uri)
            elif member.uri.startswith("tar://"):
                _, _, outer = archive_parts(member.uri)
                if plain_name(outer).endswith(_COMPRESSED):
                    members_of.setdefault(outer, {})[member.uri] = member
        for outer, members in members_of.items():
            with suppress(FileNotFoundError, ImageRejected):  # `read` rejects each member
                self._members |= patiently(
                    lambda o=outer, m=members: self._pass_through(o, m),  # type: ignore[misc]
                    outer,
                    self.attempts,
                    self.first_wait,
                )

    # -- one attempt ----------------------------------------------------------

    def _read(self, wanted: Object) -> bytes:
        if "::" in wanted.uri and wanted.uri.startswith(("tar://", "zip://")):
            return self._read_member(wanted)
        if wanted.uri.startswith(SCHEME):
            self._check_version(wanted.uri.partition("::")[2], wanted.etag)
            return self._cells.read(wanted.uri)
        fs, path = filesystem(wanted.uri)
        if isinstance(fs, LocalFileSystem):
            return _read_local(path, wanted)
        if speaks(fs, "s3"):
            data, etag = s3.get(fs, path, size=wanted.size, verify=not self._has_md5(wanted))
            _same_version(wanted, len(data), etag)
            self._check_md5(wanted, data, lambda: s3.get(fs, path)[0])
            return data
        if speaks(fs, "http"):
            data, etag = cast(tuple[bytes, str], sync(fs.loop, _get_http, fs, path, timeout=s3.TIMEOUT))
            _same_version(wanted, len(data), etag if wanted.etag else "")
            return data
        data = cast(bytes, fs.cat_file(path))
        if wanted.etag:
            fs.invalidate_cache()
        _same_version(wanted, len(data), etag_of(fs.info(path)) if wanted.etag else "")
        return data

    def _has_md5(self, wanted: Object) -> bool:
        return self._etag_is_md5 and _MD5.fullmatch(wanted.etag) is not None

    def _check_md5(self, wanted: Object, data: bytes, read: Callable[[], bytes]) -> None:
        """Compare the bytes with the etag if that is an MD5. Raises _DamagedError.

        With SSE-C or SSE-KMS the etag looks like an MD5 but is not one. Several more reads that all give the
        same bytes show that case; then the rest of the task compares no object with its etag.
        """
        if not self._has_md5(wanted):
            return
        if hashlib.md5(data, usedforsecurity=False).hexdigest() == wanted.etag:
            return
        if any(read() != data for _ in range(AGREEING_READS)):
            raise _DamagedError(f"{wanted.uri}: bytes differ from the store's MD5")
        logger.info("%s: its etag is not an MD5, so objects are not compared with their etags", wanted.uri)
        self._etag_is_md5 = False

    def _read_member(self, wanted: Object) -> bytes:
        protocol, _, outer = archive_parts(wanted.uri)
        place = (_TAR_PLACE if protocol == "tar" else _ZIP_PLACE).fullmatch(wanted.etag)
        if place is not None:
            self._check_version(outer, place[place.lastindex or 0])
        if wanted.uri in self._members:
            return self._members[wanted.uri]
        if place is None or plain_name(outer).endswith(_COMPRESSED):
            fs, path = filesystem(wanted.uri)  # the place is unknown: fsspec searches the archive
            return cast(bytes, fs.cat_file(path))
        fs, path = filesystem(outer)
        start, size = int(place[1]), int(place[2])
        _check_size(wanted.uri, size)

        def fetched() -> bytes:
            if protocol == "zip":
                return _zip_block(fs, path, start, size)
            return cast(bytes, fs.cat_file(path, start=start, end=start + size)) if size else b""

        block = fetched()
        try:
            data = block
            if protocol == "zip":
                data = _unzip(block, size, wanted.size, method=int(place[3]), crc=int(place[4], 16))
            if wanted.size >= 0 and len(data) != wanted.size:
                raise _DamagedError(f"{len(data)} bytes of {wanted.size}")
        except _DamagedError as error:
            if any(fetched() != block for _ in range(AGREEING_READS)):
                raise
            raise ImageRejected("unreadable", f"damaged in its archive: {error}") from error
        return data

    def _check_version(self, outer: str, listed: str) -> None:
        """Raise ImageRejected if an archive or table is another version than the one listed."""
        with self._lock:
            if outer not in self._versions:
                self._versions[outer] = etag_of(archives.info(outer))
            if listed and self._versions[outer] != listed:
                raise ImageRejected("changed", f"{outer} is another version than the one listed")

    def _pass_through(self, outer: str, wanted: dict[str, Object]) -> dict[str, bytes]:
        contents: dict[str, bytes] = {}
        missing = {uri for uri, one in wanted.items() if one.size <= MOST_BYTES}
        for etag in {one.etag for one in wanted.values()}:
            self._check_version(outer, etag.partition("@")[2])
        del self._versions[outer]  # `read` asks again, whether it was the same to the end
        fs, path = filesystem(outer)
        with fs.open(path, "rb") as file, archives.tar(archives.unpacked(file, outer)) as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it read
                uri = f"tar://{member.name}::{outer}"
                # Of members with one name, the place in the etag says which was listed.
                if uri in missing and wanted[uri].etag.startswith(f"{member.offset_data}+{member.size}@"):
                    content = archive.extractfile(member)
                    if content is not None:
                        contents[uri] = content.read()
                        missing.discard(uri)
                if not missing:
                    break
        return contents


# -- one kind of store each ---------------------------------------------------


def _check_size(uri: str, size: int) -> None:
    if size > MOST_BYTES:
        limit = f"at most {MOST_BYTES / 2**30:.0f} GiB can be read"
        raise ImageRejected("too_large", f"{uri} has {size / 2**30:.1f} GiB, {limit}")


def _read_local(path: str, wanted: Object) -> bytes:
    if not Path(path).is_file():  # a pipe would never end
        raise FileNotFoundError(f"{path} is no file")
    with Path(path).open("rb") as file:
        stat = os.fstat(file.fileno())
        if wanted.etag and local_etag(stat) != wanted.etag:
            raise ImageRejected("changed", f"{path} was written again after it was listed")
        _check_size(path, stat.st_size)
        data = file.read()
    if 0 <= wanted.size != len(data):
        raise ImageRejected("changed", f"{path} has {len(data)} bytes, {wanted.size} when it was listed")
    return data


async def _get_http(fs: Any, url: str) -> tuple[bytes, str]:
    session = await fs.set_session()
    async with session.get(fs.encode_url(url), headers={"Accept-Encoding": "identity"}) as answer:
        if answer.status in (404, 410):
            raise FileNotFoundError(url)
        if answer.status in (401, 403):
            raise PermissionError(f"HTTP {answer.status}")
        answer.raise_for_status()
        _check_size(url, answer.content_length or 0)
        data: bytes = await answer.read()
        return data, etag_of(answer.headers)


def _same_version(wanted: Object, size: int, etag: str) -> None:
    if wanted.etag and etag and etag != wanted.etag:
        raise ImageRejected("changed", f"{wanted.uri} has another etag than when it was listed")
    if 0 <= wanted.size != size:
        if wanted.etag and etag:  # the same version, so bytes were lost on the way
            raise _DamagedError(f"{wanted.uri}: {size} bytes of {wanted.size}")
        raise ImageRejected("changed", f"{wanted.uri} has {size} bytes, {wanted.size} when it was listed")


def _zip_block(fs: AbstractFileSystem, path: str, start: int, size: int) -> bytes:
    """A zip's member with its own header, which is at `start`; its packed bytes are `size`."""
    margin = 30 + 1024  # fixed part of the header, and name and extra fields of most
    block = cast(bytes, fs.cat_file(path, start=start, end=start + margin + size))
    end = _packed_at(block) + size
    if end > len(block):
        block += cast(bytes, fs.cat_file(path, start=start + len(block), end=start + end))
    return block


def _packed_at(block: bytes) -> int:
    return 30 + int.from_bytes(block[26:28], "little") + int.from_bytes(block[28:30], "little")


def _unzip(block: bytes, packed_size: int, size: int, *, method: int, crc: int) -> bytes:
    """The member in a block of `_zip_block`, its checksum verified; unpacked no further than `size` + 1."""
    if block[:4] != b"PK\3\4":
        raise _DamagedError("no zip member at its place")
    start = _packed_at(block)
    packed = block[start : start + packed_size]
    if method not in (0, 8):
        raise ImageRejected("unreadable", f"zip compression {method} is not supported")
    most = MOST_BYTES if size < 0 else size
    try:
        data = packed if method == 0 else zlib.decompressobj(-15).decompress(packed, most + 1)
    except zlib.error as error:
        raise _DamagedError(str(error)) from error
    if zlib.crc32(data) != crc:
        raise _DamagedError("its checksum differs")
    return data
