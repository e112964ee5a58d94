"""Files and folders at any fsspec URI. A reader sees a file whole or not at all.

A location is a local path or a URI that fsspec knows (`s3://bucket/prefix`, `tar://::https://host/a.tar`).
Credentials come from the environment (for S3, the AWS chain); endpoints and client settings come from the
`storage:` section of the config through `configure`, and reach Ray workers by `worker_environment`. Every
call is repeated while the store fails (`stages.storage.retry`).
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import fsspec
import fsspec.config
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from stages.base import absolute as absolute
from stages.errors import UserError, one_line
from stages.storage.retry import (
    ATTEMPTS,
    LASTING,
    explain,
    located as located,
    patiently as patiently,
    retried as retried,
    unreachable,
)

Value = TypeVar("Value")

UPLOAD_BYTES = 16 << 20  # in each part that `create` sends; S3 takes 10,000 parts: 156 GiB


def configure(options: Mapping[str, Mapping[str, Any]]) -> None:
    """Set client options per protocol, e.g. `{"s3": {"endpoint_url": "http://..."}}`, in this process.

    Raises UserError for a protocol or option that its client does not know; no request is sent.
    """
    for protocol, values in options.items():
        fsspec.config.conf[protocol] = dict(values)
        try:
            fs = fsspec.filesystem(protocol)
            if speaks(fs, "s3"):
                fs.connect()
        except Exception as error:  # each client has its own
            raise UserError(f"storage.{protocol}: {one_line(error, kind=True)}") from error


def worker_environment(options: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The environment variables that give another process the same client options on import of fsspec."""
    return {f"FSSPEC_{protocol.upper()}": json.dumps(dict(values)) for protocol, values in options.items()}


def filesystem(uri: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a location and the location's path in it. Raises UserError for one we cannot use."""
    try:
        fs, path = url_to_fs(str(uri))
    except (ImportError, ValueError) as error:  # no such protocol, or its package is not installed
        raise UserError(f"{uri}: {one_line(error)}") from error
    return cast(AbstractFileSystem, fs), cast(str, path)


def speaks(fs: AbstractFileSystem, protocol: str) -> bool:
    """Whether a file system serves this protocol, e.g. "s3"."""
    return protocol in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def is_local(uri: str) -> bool:
    """Whether a location is on this machine."""
    return isinstance(filesystem(uri)[0], LocalFileSystem)


def check_reachable(locations: Mapping[str, str]) -> None:
    """Ask the stores once, before any work: one that never answered is misspelt rather than busy.

    locations   by the config's key or the option

    Raises UserError if there is no answer. What an answer says is left to whoever reads there.
    """
    for key, uri in locations.items():
        try:
            fs, path = filesystem(absolute(uri.rpartition("::")[2]))
            if not isinstance(fs, LocalFileSystem):
                fs.info(path)
        except Exception as error:  # each client has its own
            if unreachable(error):
                raise UserError(f"{key}: {uri}: {explain(error)}") from error


def join(uri: str, *parts: str) -> str:
    """A location inside a folder. Parts are ours, never a user's text."""
    return "/".join([uri.rstrip("/"), *parts])


def exists(uri: str) -> bool:
    """Whether there is such a file or folder; never from a cache."""
    fs, path = filesystem(uri)
    fs.invalidate_cache()
    return bool(call_store(lambda: fs.exists(path), uri))


def require(uri: str, key: str) -> None:
    """Raise UserError that names the config key if there is no such file or folder."""
    if not exists(absolute(uri)):
        raise UserError(f"{key}: {uri}: there is no such file or folder")


def list_names(uri: str) -> list[str]:
    """Names of the files directly in a folder, sorted; none if there is no folder. For small folders."""
    return _names(uri, "file")


def list_folders(uri: str) -> list[str]:
    """Names of the folders directly in a folder, sorted; none if there is no folder. For small folders.

    Raises UserError if there is no such bucket.
    """
    return _names(uri, "directory")


def _names(uri: str, kind: str) -> list[str]:
    fs, path = filesystem(uri)
    fs.invalidate_cache()
    try:
        entries = call_store(lambda: fs.ls(path, detail=True), uri)
    except (FileNotFoundError, NotADirectoryError) as error:
        if type(error.__cause__).__name__ == "NoSuchBucket":
            raise UserError(f"{uri}: there is no such bucket ({one_line(error)})") from error
        return []
    return sorted(e["name"].rstrip("/").rsplit("/", 1)[-1] for e in entries if e["type"] == kind)


def remove(uri: str) -> None:
    """Delete a file or a folder with all that is in it, if it is there."""
    fs, path = filesystem(uri)
    fs.invalidate_cache()

    def delete() -> None:
        if speaks(fs, "s3") and any(mark in path for mark in "*?["):  # s3fs would remove all that matches
            for file in fs.find(path, withdirs=True):
                fs.rm_file(file)
        else:
            fs.rm(path, recursive=True)

    with suppress(FileNotFoundError):  # another process may remove it too
        call_store(delete, uri)


def read_bytes(uri: str) -> bytes:
    """A whole file. Raises FileNotFoundError if there is none."""
    fs, path = filesystem(uri)
    return cast(bytes, call_store(lambda: fs.cat_file(path), uri))


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole file: a reader sees the old content, none, or all of the new."""
    fs, path = filesystem(uri)
    whole = bytes(data)  # S3 clients take no buffers

    def write() -> None:
        if isinstance(fs, LocalFileSystem):
            with create(uri) as file:
                file.write(whole)
        elif speaks(fs, "s3"):
            from stages.storage import s3  # noqa: PLC0415 - its clients take 0.5 s to load

            s3.put(fs, path, whole)
        else:
            fs.pipe_file(path, whole)

    written(write, uri)


@contextmanager
def create(uri: str) -> Iterator[Any]:
    """A binary file to write, which appears under its name if the block ends without an error.

    On this machine a temporary file in the same folder is renamed. To a store fewer than UPLOAD_BYTES go by
    one request, more in parts while they are written; parts become an object in the end, an error drops them.

    Raises the client's own errors. Nothing is retried here; a caller may repeat the block with `written`.
    """
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        return
    upload = fs.open(path, "wb", block_size=UPLOAD_BYTES)
    try:
        yield upload
        upload.close()
    except BaseException as error:
        with suppress(Exception):  # the first error is the one to report
            upload.discard()
        upload.closed = True  # to close it would send the rest
        if type(error.__cause__).__name__ == "NoSuchUpload":  # an attempt whose answer was lost completed it
            raise OSError(f"{uri}: may or may not be written ({one_line(error, kind=True)})") from error
        raise


def read_json(uri: str) -> Any:
    """A JSON file's value."""
    return json.loads(read_bytes(uri))


def find_json(uri: str) -> Any:
    """A JSON file's value; None if the file is not there, or not whole."""
    try:
        return read_json(uri)
    except (FileNotFoundError, ValueError):
        return None


def write_json(uri: str, value: Any) -> None:
    """Write a JSON file, indented."""
    write_bytes(uri, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n")


def write_parquet(uri: str, table: pa.Table, *, row_group_rows: int | None = None, **options: Any) -> int:
    """Write a whole Parquet file; returns its size in bytes. `options` go to pyarrow's writer."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=row_group_rows, write_page_checksum=True, **options)
    data = sink.getvalue()
    write_bytes(uri, data)
    return int(data.size)


def read_parquet(uri: str, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file, or some columns of it, verified. For tables small enough for one task."""
    fs, path = filesystem(uri)

    def read() -> pa.Table:
        try:
            with fs.open(path, "rb") as f:  # one that Arrow's threads hold may abort the process as it ends
                return pq.read_table(f, columns=columns, use_threads=False, page_checksum_verification=True)
        except pa.ArrowInvalid as error:  # a damaged footer, perhaps only on its way here
            raise OSError(str(error)) from error

    return call_store(read, uri)


def parquet_parts(folder: str, prefix: str) -> Iterator[str]:
    """URIs of `<prefix>*.parquet` in a folder we wrote, in name order."""
    for name in list_names(folder):
        if name.startswith(prefix) and name.endswith(".parquet"):
            yield join(folder, name)


def etag_of(info: Mapping[str, Any]) -> str:
    """The version of an object, from fsspec's `info`; "" if the store has none.

    The store's tag or checksum; for files the modification time in nanoseconds.
    """
    for name in ("ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "crc32c", "generation"):
        if info.get(name):
            return str(info[name]).strip('"')
    if "ino" in info:  # a local file: fsspec rounds its time to a float
        return local_etag(os.stat(info["name"]))  # noqa: PTH116
    changed = info.get("Last-Modified") or info.get("mtime") or info.get("LastModified")
    return "" if changed is None else str(changed)


def local_etag(stat: os.stat_result) -> str:
    """The etag of a local file."""
    return f"{stat.st_mtime_ns:x}"


def file_version(uri: str) -> str:
    """Differs if a file's content does: its SHA-256 on this machine, else its size and etag; "" if none."""
    fs, path = filesystem(where := absolute(uri))
    if not exists(where):
        return ""
    if is_local(where) and Path(path).is_file():  # a copy has another time, and is no reason to train again
        return _checksum(Path(path), local_etag(Path(path).stat()))
    info = call_store(lambda: fs.info(path), uri)
    return f"{info.get('size')} {etag_of(info)}"


@lru_cache
def _checksum(path: Path, _etag: str) -> str:
    """The SHA-256 of a file: several steps of a plan ask for that of the same weights."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- errors -------------------------------------------------------------------


def written(call: Callable[[], Value], uri: str) -> Value:
    """The value of a call that writes to a location, repeated while the store fails.

    Raises as `patiently` does, and UserError if there is no such bucket, or a file where a folder belongs.
    """
    try:
        return call_store(call, uri)
    except LASTING as error:
        lacking = "it cannot be made" if is_local(uri) else "there is no such bucket"
        raise UserError(f"{uri}: {lacking} ({one_line(error, kind=True)})") from error


def call_store(call: Callable[[], Value], uri: str) -> Value:
    """`patiently`; a file of this machine is tried once, since its trouble (a full disk) does not pass."""
    return patiently(call, uri, attempts=1 if is_local(uri) else ATTEMPTS)
