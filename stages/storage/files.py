"""Files and folders at any fsspec URI, written so that no reader ever sees half a file.

A location is a local path or a URI that fsspec knows (`s3://bucket/prefix`, `tar://::https://host/a.tar`).
Credentials come from the environment (for S3, the AWS chain); endpoints and client settings come from the
`storage:` section of the config through `configure`, which also reaches Ray workers (`worker_environment`).

A store that fails is asked again for about 40 s, longer than a restart takes; one that refuses is not.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import fsspec
import fsspec.config
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from stages.errors import StageError, UserError, one_line
from stages.storage import s3
from stages.storage.retry import passing, patiently

logger = logging.getLogger(__name__)
Value = TypeVar("Value")

UPLOAD_BYTES = 16 << 20  # of a growing file that are sent at once; S3 takes 10,000 such parts: 156 GiB


def configure(options: Mapping[str, Mapping[str, Any]]) -> None:
    """Set client options per protocol, e.g. `{"s3": {"endpoint_url": "http://..."}}`, in this process."""
    for protocol, values in options.items():
        fsspec.config.conf[protocol] = dict(values)


def worker_environment(options: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The environment variables that give another process the same client options on import of fsspec."""
    return {f"FSSPEC_{protocol.upper()}": json.dumps(dict(values)) for protocol, values in options.items()}


def filesystem(uri: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a location and the location's path in it."""
    fs, path = url_to_fs(str(uri))
    return cast(AbstractFileSystem, fs), cast(str, path)


def speaks(fs: AbstractFileSystem, protocol: str) -> bool:
    """Whether a file system is one for this protocol, e.g. "s3"."""
    return protocol in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def is_local(uri: str) -> bool:
    """Whether a location is a folder or file of this machine."""
    return isinstance(filesystem(uri)[0], LocalFileSystem)


def join(uri: str, *parts: str) -> str:
    """A location inside a folder. Parts are ours, never a user's text."""
    return "/".join([uri.rstrip("/"), *parts])


def exists(uri: str) -> bool:
    """Whether a file or folder is there, asked of the store anew."""
    fs, path = filesystem(uri)
    fs.invalidate_cache()
    return bool(_stored(lambda: fs.exists(path), uri))


def list_names(uri: str) -> list[str]:
    """Names of the files directly in a folder, sorted; none if there is no folder. For folders we write."""
    fs, path = filesystem(uri)
    fs.invalidate_cache()
    try:
        entries = _stored(lambda: fs.ls(path, detail=True), uri)
    except FileNotFoundError:
        return []
    return sorted(e["name"].rsplit("/", 1)[-1] for e in entries if e["type"] == "file")


def read_bytes(uri: str) -> bytes:
    """A whole file. Raises FileNotFoundError if there is none."""
    fs, path = filesystem(uri)
    return cast(bytes, _stored(lambda: fs.cat_file(path), uri))


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole file at once: a reader sees the old content, none, or all of the new."""
    fs, path = filesystem(uri)
    whole = bytes(data)  # S3 clients take no buffers

    def write() -> None:
        if isinstance(fs, LocalFileSystem):
            with create(uri) as file:
                file.write(whole)
        elif not (speaks(fs, "s3") and s3.put(fs, path, whole)):
            fs.pipe_file(path, whole)  # one PUT, or a multipart upload that appears when it is completed

    written(write, uri)


@contextmanager
def create(uri: str) -> Iterator[Any]:
    """A binary file to write that appears under its name, whole, if the block ends without an error.

    On this machine it grows beside its place and is renamed. To a store it is sent while it grows, in parts
    that become an object in the end: no disk holds it, and after an error what was sent is dropped.

    Raises:
        Exception: the client's own. Nothing is tried again here, the block may be: see `written`.
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
    upload = fs.open(path, "wb", block_size=UPLOAD_BYTES, autocommit=False)
    try:
        yield upload
        upload.close()
        try:
            upload.commit()
        except FileNotFoundError as error:  # no such upload: an attempt without answer completed it
            raise OSError(
                f"{uri}: whether it is written is not known ({one_line(error, kind=True)})"
            ) from error
    except BaseException:
        with suppress(Exception):  # the trouble that led here is what the user hears of
            upload.discard()
        upload.closed = True  # to close it would send the rest
        raise


def read_json(uri: str) -> Any:
    """A JSON file's value."""
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: Any) -> None:
    """Write a JSON file at once, readable by a person."""
    write_bytes(uri, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n")


def write_parquet(uri: str, table: pa.Table, *, row_group_rows: int | None = None, **options: Any) -> int:
    """Write a Parquet file at once; returns its size in bytes. `options` go to pyarrow's writer."""
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
            with fs.open(path, "rb") as file:
                return pq.read_table(file, columns=columns, page_checksum_verification=True)
        except pa.ArrowInvalid as error:  # a footer that came over damaged, or is
            raise OSError(str(error)) from error

    return _stored(read, uri)


def parquet_parts(folder: str, prefix: str) -> Iterator[str]:
    """URIs of `<prefix>*.parquet` in a folder we wrote, in name order."""
    for name in list_names(folder):
        if name.startswith(prefix) and name.endswith(".parquet"):
            yield join(folder, name)


# -- errors -------------------------------------------------------------------


def written(call: Callable[[], Value], uri: str) -> Value:
    """As `_stored`, for what writes: where there is nothing to write to, the user has to make it."""
    try:
        return _stored(call, uri)
    except FileNotFoundError as error:
        raise UserError(f"{uri}: there is no such bucket ({one_line(error, kind=True)})") from error


def _stored(call: Callable[[], Value], uri: str) -> Value:
    """`patiently`; but a file of this machine once, where trouble (a full disk) does not pass."""
    if not is_local(uri):
        return patiently(call, uri)
    try:
        return call()
    except PermissionError as error:
        raise UserError(
            f"{uri}: access denied, check the permissions ({one_line(error, kind=True)})"
        ) from error
    except OSError as error:
        if passing(error):
            raise StageError(f"{uri}: {one_line(error, kind=True)}") from error
        raise
