"""Read objects whole: again when the store fails, never another object than the one that was listed.

in:  an object {uri, size, etag} as ingest listed it
out: its bytes; ImageRejected `missing` or `changed` if that version is no longer there

A store that stays away, or refuses, ends the stage with one clear error: nothing is quarantined for a fault
of the network. Where the store keeps an MD5 (S3's etag of objects put in one piece), the bytes are compared
with it, since not every client notices a flipped bit.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import struct
import tarfile
import threading
import zlib
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import fsspec.asyn
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from stages.config.locations import archive_parts
from stages.images.kinds import ImageRejected
from stages.objects import archives
from stages.objects.listing import etag_of, local_etag
from stages.storage import filesystem, patiently, s3, speaks
from stages.storage.retry import ATTEMPTS, FIRST_WAIT

logger = logging.getLogger(__name__)
Value = TypeVar("Value")
Item = TypeVar("Item")

TIMEOUT = 300.0  # seconds for one object; the clients' own timeouts come first where they are set

AGREEING_READS = 3  # one more could be damaged in the same place by the same fault
_MD5 = re.compile(r"[0-9a-f]{32}")
_TAR_PLACE = re.compile(r"(\d+)\+(\d+)@(.*)", re.DOTALL)
_ZIP_PLACE = re.compile(r"(\d+)\+(\d+)\.(\d+)\.([0-9a-fA-F]{8})@(.*)", re.DOTALL)
_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz")


@dataclass(frozen=True, slots=True)
class Object:
    """An object as it was listed. Size -1 and etag "" are unknown."""

    uri: str
    size: int = -1
    etag: str = ""


class _DamagedError(OSError):
    """Bytes that differ from what the store says they are: worth another read."""


class Reader:
    """Reads objects for one task, from many threads at once."""

    def __init__(self, *, attempts: int = ATTEMPTS, first_wait: float = FIRST_WAIT) -> None:
        self.attempts, self.first_wait = attempts, first_wait
        self._versions: dict[str, str] = {}
        self._members: dict[str, bytes] = {}
        self._etag_is_md5 = True
        self._lock = threading.Lock()

    def read(self, wanted: Object) -> bytes:
        """The object's bytes.

        Raises:
            ImageRejected: `missing` or `changed` since it was listed.
            UserError: the store refuses access. StageError: it stayed away through every attempt.
        """
        if wanted.uri in self._members:
            return self._members[wanted.uri]
        try:
            return patiently(lambda: self._read(wanted), wanted.uri, self.attempts, self.first_wait)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise ImageRejected("missing", wanted.uri) from error

    def stream_archives(self, wanted: Iterable[Object]) -> None:
        """Take members of compressed tars out of them in one pass each; `read` then has them in memory.

        A gzip stream has no way in but from its start: reading member by member would unpack the archive
        once an image.
        """
        inside: dict[str, dict[str, Object]] = {}
        for one in wanted:
            if one.uri.startswith("tar://"):
                _, _, outer = archive_parts(one.uri)
                if outer.split("?")[0].lower().endswith(_COMPRESSED):
                    inside.setdefault(outer, {})[one.uri] = one
        for outer, members in inside.items():
            with suppress(FileNotFoundError):  # `read` says so of each member
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
        fs, path = filesystem(wanted.uri)
        if isinstance(fs, LocalFileSystem):
            return _read_local(path, wanted)
        if speaks(fs, "s3"):
            quick = s3.get(fs, path) if self._has_md5(wanted) and wanted.size <= s3.MOST_BYTES else None
            data, etag = quick or _run(fs, _get_s3(fs, path))
            _same_version(wanted, len(data), etag)
            self._check_md5(wanted, data, lambda: _run(fs, _get_s3(fs, path))[0])
            return data
        if speaks(fs, "http"):
            data, etag = _run(fs, _get_http(fs, path))
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
        """Compare with the etag where that is an MD5.

        It has the form of one but is none in buckets encrypted with customers' keys. Reads that all agree
        tell that case from damage; then the comparison is left off for the rest of the task.
        """
        if not self._has_md5(wanted):
            return
        if hashlib.md5(data, usedforsecurity=False).hexdigest() == wanted.etag:
            return
        if any(read() != data for _ in range(AGREEING_READS)):
            raise _DamagedError(f"{wanted.uri}: bytes differ from the store's MD5")
        logger.info("%s: its etag is no MD5, reads are not compared with etags", wanted.uri)
        self._etag_is_md5 = False

    def _read_member(self, wanted: Object) -> bytes:
        protocol, _, outer = archive_parts(wanted.uri)
        place = (_TAR_PLACE if protocol == "tar" else _ZIP_PLACE).fullmatch(wanted.etag)
        if place is None or outer.split("?")[0].lower().endswith(_COMPRESSED):
            fs, path = filesystem(wanted.uri)  # no place known: fsspec looks through the archive
            return cast(bytes, fs.cat_file(path))
        if self._version(outer) != place[place.lastindex or 0]:
            raise ImageRejected("changed", f"{outer} is another version than the one listed")
        fs, path = filesystem(outer)
        start, size = int(place[1]), int(place[2])
        if protocol == "tar":
            data = cast(bytes, fs.cat_file(path, start=start, end=start + size))
        else:
            data = _unzip(fs, path, start, size, method=int(place[3]), crc=int(place[4], 16))
        if wanted.size >= 0 and len(data) != wanted.size:
            raise _DamagedError(f"{wanted.uri}: {len(data)} bytes of {wanted.size}")
        return data

    def _version(self, outer: str) -> str:
        with self._lock:
            if outer not in self._versions:
                self._versions[outer] = etag_of(archives.info(outer))
            return self._versions[outer]

    def _pass_through(self, outer: str, wanted: dict[str, Object]) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        left = set(wanted)
        fs, path = filesystem(outer)
        with (
            fs.open(path, "rb") as file,
            tarfile.open(fileobj=file, mode="r|*", errors="surrogateescape") as archive,
        ):
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it read
                uri = f"tar://{member.name}::{outer}"
                # Of members with one name, the place in the etag says which was listed.
                if uri in left and wanted[uri].etag.startswith(f"{member.offset_data}+{member.size}@"):
                    content = archive.extractfile(member)
                    if content is not None:
                        found[uri] = content.read()
                        left.discard(uri)
                if not left:
                    break
        return found


# -- many --------------------------------------------------------------------


def in_order(
    threads: Executor, call: Callable[[Item], Value], items: Iterable[Item], *, ahead: int
) -> Iterator[Value]:
    """`call` of each item, by threads, in the items' order, with at most `ahead` results waiting."""
    waiting: deque[Future[Value]] = deque()
    try:
        for item in items:
            waiting.append(threads.submit(call, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


# -- one kind of store each ---------------------------------------------------


def _read_local(path: str, wanted: Object) -> bytes:
    with Path(path).open("rb") as file:
        stat = os.fstat(file.fileno())
        if wanted.etag and local_etag(stat) != wanted.etag:
            raise ImageRejected("changed", f"{path} was written again after it was listed")
        data = file.read()
    if 0 <= wanted.size != len(data):
        raise ImageRejected("changed", f"{path} has {len(data)} bytes, {wanted.size} when it was listed")
    return data


async def _get_s3(fs: Any, path: str) -> tuple[bytes, str]:
    """Body and etag of one GET, so that the tag speaks of these very bytes."""
    bucket, key, _ = fs.split_path(path)
    answer = await fs._call_s3("get_object", Bucket=bucket, Key=key)
    try:
        data: bytes = await answer["Body"].read()
    finally:
        answer["Body"].close()
    if len(data) != int(answer["ContentLength"]):
        raise _DamagedError(f"s3://{path}: {len(data)} bytes of {answer['ContentLength']}")
    return data, etag_of(answer)


async def _get_http(fs: Any, url: str) -> tuple[bytes, str]:
    session = await fs.set_session()
    async with session.get(fs.encode_url(url), headers={"Accept-Encoding": "identity"}) as answer:
        if answer.status in (404, 410):
            raise FileNotFoundError(url)
        if answer.status in (401, 403):
            raise PermissionError(f"HTTP {answer.status}")
        answer.raise_for_status()
        data: bytes = await answer.read()
        return data, etag_of(answer.headers)


def _run(fs: AbstractFileSystem, call: Coroutine[Any, Any, Value]) -> Value:
    async def forward() -> Value:
        return await call

    return cast(Value, fsspec.asyn.sync(fs.loop, forward, timeout=TIMEOUT))


def _same_version(wanted: Object, size: int, etag: str) -> None:
    if wanted.etag and etag and etag != wanted.etag:
        raise ImageRejected("changed", f"{wanted.uri} has another etag than when it was listed")
    if 0 <= wanted.size != size:
        if wanted.etag and etag:  # the same version, so bytes were lost on the way
            raise _DamagedError(f"{wanted.uri}: {size} bytes of {wanted.size}")
        raise ImageRejected("changed", f"{wanted.uri} has {size} bytes, {wanted.size} when it was listed")


def _unzip(fs: AbstractFileSystem, path: str, start: int, size: int, *, method: int, crc: int) -> bytes:
    """A zip's member, from its own header at `start`; its checksum verified."""
    margin = 30 + 1024  # fixed part of the header, and name and extra fields of most
    block = cast(bytes, fs.cat_file(path, start=start, end=start + margin + size))
    if block[:4] != b"PK\3\4":
        raise _DamagedError(f"{path}: no zip member at byte {start}")
    skip = 30 + sum(struct.unpack("<HH", block[26:30]))
    if skip + size > len(block):
        block += cast(bytes, fs.cat_file(path, start=start + len(block), end=start + skip + size))
    packed = block[skip : skip + size]
    if method not in (0, 8):
        raise ImageRejected("unreadable", f"zip compression {method} is not supported")
    try:
        data = packed if method == 0 else zlib.decompress(packed, wbits=-15)
    except zlib.error as error:
        raise _DamagedError(f"{path}: {error}") from error
    if zlib.crc32(data) != crc:
        raise _DamagedError(f"{path}: checksum of the zip member at byte {start} differs")
    return data
