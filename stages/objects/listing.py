"""List the objects of a location, one by one, in units that can be listed in parallel.

in:  a location (any fsspec URI)
out: `split_location`: a few small units; `list_objects`: the objects of a unit (`Listed`)

At most a page of a store is in memory. How a location is cut depends on what its store can list:

    s3://           ranges of keys; S3 lists in key order from any key, so any cuts list each object once
    local, others   folders, opened level by level until there are enough of them
    http(s)://      the index pages a file server writes, followed below the location only
    archives        one unit each, read from start to end (see `stages.objects.archives`)
"""

from __future__ import annotations

import html
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from stages.config.locations import expand_ranges, is_archive
from stages.objects import Listed, archives, patterns
from stages.storage import etag_of, filesystem, local_etag, retried, s3, speaks

PAGE = 1000  # objects an S3 listing returns at once


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of a location that one task lists.

    tree      the folders `paths` (below the location) and all folders in them
    folder    the folders `paths` without the folders in them
    range     S3 keys after `after` up to and including `until` ("" is open)
    index     a server's pages
    archive   the members of the archive `paths`, a URI
    file      a single file
    table     row groups of the table `paths`, which is read and not listed (`objects.tables`)
    inventory a data file of an S3 Inventory, which is read and not listed (`objects.inventory`)
    """

    kind: Literal["tree", "folder", "range", "index", "archive", "file", "table", "inventory"]
    paths: Sequence[str] = ("",)
    after: str = ""
    until: str = ""
    row_groups: tuple[int, int | None] = (0, None)
    """The first, and the one after the last; None: all of them."""
    split: str = ""
    """In a table's name."""


# -- how a location is cut ----------------------------------------------------


def split_location(uri: str, *, want: int) -> list[Unit]:
    """Cut a location into about `want` units; each object is in one of them. A single file is one unit.

    Raises:
        FileNotFoundError, PermissionError, OSError: there is no such location, or it cannot be read.
        ValueError: the location is a glob.
    """
    if is_archive(uri):
        every = expand_ranges(uri)
        retried(lambda: archives.info(every[0]))
        return [Unit("archive", (archive,)) for archive in every]
    fs, base = filesystem(uri)
    if speaks(fs, "http"):
        return [Unit("file" if patterns.is_image(urlsplit(uri).path) else "index")]
    if speaks(fs, "s3") and (ranges := _key_ranges(fs, base, want)):
        return ranges
    try:
        kind = retried(lambda: fs.info(base))["type"]
    except FileNotFoundError:
        folder, glob, rest = re.match(r"([^*?[]*)([*?[]?)(.*)", uri, re.DOTALL).groups()  # type: ignore[union-attr]
        if glob:
            suffix = re.sub(r".*[*?\]]", "", rest) or ".*"
            raise ValueError(
                f"a location is no glob: name the folder {folder.rpartition('/')[0] or '.'} alone, "
                f"and as pattern '{{key}}{suffix}'"
            ) from None
        raise
    if kind == "file":
        return [Unit("file")]
    if speaks(fs, "s3"):
        raise FileNotFoundError(uri)
    return _folders(fs, base, want)


def _folders(fs: AbstractFileSystem, base: str, want: int) -> list[Unit]:
    """Open folders level by level until there are `want`, and spread them over about as many units."""
    opened: list[str] = []
    closed = deque([""])
    while closed and len(opened) + len(closed) < want:
        path = closed.popleft()
        opened.append(path)
        closed.extend(sorted(entry for entry in _entries(fs, base, path) if isinstance(entry, str)))
    trees = list(closed)
    size = max(1, -(-len(trees) // want))
    units = [Unit("tree", tuple(trees[start : start + size])) for start in range(0, len(trees), size)]
    return ([Unit("folder", tuple(opened))] if opened else []) + units


def _key_ranges(fs: Any, base: str, want: int) -> list[Unit]:
    """Ranges of S3 keys, cut where the character after a shared prefix changes.

    This cuts a flat prefix as well as folders. The cuts need not be even: ranges between any cuts list each
    key once, whatever is written meanwhile. A cut is a key and not a prefix, because SeaweedFS takes "start
    after `a`" to mean after all of folder `a/`.
    """
    bucket, prefix = _s3_base(base)
    first = _s3_page(fs, bucket, prefix)
    if not first.get("KeyCount"):
        return []
    keys = [info["Key"].encode() for info in first["Contents"]]
    ordered = keys == sorted(keys)  # S3's directory buckets list in no order, so they are not cut
    cuts: set[str] = set()
    level = deque([prefix] if first.get("IsTruncated") and ordered else [])
    for _ in range(want):  # opens at most as many prefixes, so the requests are bounded too
        if not level or len(cuts) >= want:
            break
        start = level.popleft()
        children = list(_next_characters(fs, bucket, start, limit=want))
        cuts.update(key for _, key in children[1:])
        level.extend(longer for longer, _ in children if _s3_page(fs, bucket, longer).get("IsTruncated"))
    edges = ["", *sorted(cuts, key=str.encode), ""]
    return [Unit("range", after=after, until=until) for after, until in pairwise(edges)]


def _next_characters(fs: Any, bucket: str, prefix: str, limit: int) -> Iterator[tuple[str, str]]:
    """Prefixes of keys, one character longer, each with its first key; at most `limit`."""
    after = ""
    for _ in range(limit):
        page = _s3_page(fs, bucket, prefix, size=1, after=after)
        if not page.get("Contents"):
            return
        key: str = page["Contents"][0]["Key"]
        longer = key[: len(prefix) + 1]
        if after and key.encode() <= after.encode():
            return  # a store that does not list in the order of keys: the cuts so far are enough
        yield longer, key
        after = longer + "\U0010fffd"


# -- the objects of a unit --------------------------------------------------------


def list_objects(uri: str, unit: Unit, *, requests: int = 16) -> Iterator[Listed]:
    """The objects of a unit, with at most `requests` requests in flight.

    A name that is not valid Unicode has escapes in place of its other bytes, and the fault `bad_key`.

    Raises:
        FileNotFoundError, PermissionError, OSError: there is no such location, or it cannot be read.
    """
    for one in _objects(uri, unit, requests):
        yield one if one.uri.isascii() else _escaped(one)


def _escaped(one: Listed) -> Listed:
    path, uri = (text.encode(errors="backslashreplace").decode() for text in (one.path, one.uri))
    return one if uri == one.uri else one._replace(path=path, uri=uri, fault="bad_key")


def _objects(uri: str, unit: Unit, requests: int) -> Iterator[Listed]:
    if unit.kind == "archive":
        (archive,) = unit.paths
        return archives.members(archive, version=etag_of(retried(lambda: archives.info(archive))))
    fs, base = filesystem(uri)
    if unit.kind == "file":
        info = retried(lambda: fs.info(base))
        name = unquote(urlsplit(uri).path) if speaks(fs, "http") else base
        return iter([Listed(name.rpartition("/")[2], uri, _size(info), etag_of(info))])
    if unit.kind == "range":
        return _in_range(fs, base, unit)
    if unit.kind == "index":
        return _in_index(fs, base, requests)
    return _in_folders(fs, base, unit)


def _size(info: Mapping[str, Any]) -> int:
    return -1 if info.get("size") is None else int(info["size"])


def _entries(fs: AbstractFileSystem, base: str, path: str) -> Iterator[Listed | str]:
    """The files directly in a folder, and the paths of the folders in it."""
    if isinstance(fs, LocalFileSystem):
        yield from _local_entries(base, path)
        return
    folder = f"{base}/{path}".rstrip("/")
    prefix = fs.unstrip_protocol(base) + "/"
    fs.invalidate_cache(folder)
    for info in retried(lambda: fs.ls(folder, detail=True)):
        name = info["name"].rstrip("/")
        below = name[len(base) :].lstrip("/")
        if below and name != folder:
            is_folder = info["type"] == "directory"
            yield below if is_folder else Listed(below, prefix + below, _size(info), etag_of(info))


def _local_entries(base: str, path: str) -> Iterator[Listed | str]:
    """As `_entries`, one directory entry at a time. A link to a folder above it is left out."""
    with os.scandir(Path(base) / path) as scan:
        for entry in scan:
            below = f"{path}/{entry.name}" if path else entry.name
            uri = f"{base.rstrip('/')}/{below}"
            try:
                if entry.is_dir():
                    if not (entry.is_symlink() and _leads_upwards(entry.path)):
                        yield below
                else:
                    stat = entry.stat()
                    yield Listed(below, uri, stat.st_size, local_etag(stat))
            except OSError:  # a link to nowhere: its reader reports that it is missing
                yield Listed(below, uri)


def _leads_upwards(link: str) -> bool:
    above = [folder.resolve() for folder in Path(link).parents]  # as it was reached, perhaps by other links
    return Path(link).resolve() in {*above, *above[0].parents}


def _in_folders(fs: AbstractFileSystem, base: str, unit: Unit) -> Iterator[Listed]:
    folders = deque(unit.paths)
    while folders:
        for entry in _entries(fs, base, folders.popleft()):
            if isinstance(entry, Listed):
                yield entry
            elif unit.kind == "tree":
                folders.append(entry)


def _s3_base(base: str) -> tuple[str, str]:
    bucket, _, prefix = base.partition("/")
    return bucket, prefix.rstrip("/") + "/" if prefix.rstrip("/") else ""


def _s3_page(
    fs: Any, bucket: str, prefix: str, *, size: int | None = None, after: str = "", token: str = ""
) -> dict[str, Any]:
    return retried(lambda: s3.list_page(fs, bucket, prefix, size=size or PAGE, after=after, token=token))


def _in_range(fs: Any, base: str, unit: Unit) -> Iterator[Listed]:
    bucket, prefix = _s3_base(base)
    last = unit.until.encode()
    token = ""
    while True:
        answer = _s3_page(fs, bucket, prefix, after=unit.after, token=token)
        for info in answer.get("Contents", []):
            key: str = info["Key"]
            if last and key.encode() > last:
                return
            path = key[len(prefix) :]
            if path and not path.endswith("/"):  # names that end in "/" stand for folders in some tools
                yield Listed(path, f"s3://{bucket}/{key}", int(info["Size"]), etag_of(info))
        token = answer.get("NextContinuationToken", "")
        if not token or not answer.get("IsTruncated"):
            return


def _in_index(fs: Any, base: str, requests: int) -> Iterator[Listed]:
    """The files that a server's index pages link to, `PAGE` of each folder in turn.

    Links out of the location and to queries are ignored.
    """
    base = base.rstrip("/") + "/"
    seen = {base}
    queue: deque[str | list[str]] = deque([base])  # folders, and files

    def listed(url: str) -> Listed:
        info = retried(lambda: fs.info(url))
        return Listed(unquote(url[len(base) :]), url, _size(info), etag_of(info))

    with ThreadPoolExecutor(requests) as threads:
        while queue:
            folder = queue.popleft()
            if isinstance(folder, list):
                queue.extend([folder[PAGE:]] if folder[PAGE:] else [])
                yield from threads.map(listed, folder[:PAGE])
                continue
            links = sorted(set(retried(lambda folder=folder: fs.ls(folder, detail=False))))  # type: ignore[misc]
            files: list[str] = []
            for link in links:
                url = html.unescape(link).split("#", 1)[0]
                parts = urlsplit(url)
                outside = not url.startswith(base) or ".." in unquote(parts.path).split("/")
                if url in seen or outside or parts.query:
                    continue
                seen.add(url)
                (queue if url.endswith("/") else files).append(url)
            queue.append(files)
