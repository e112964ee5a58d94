"""Files and folders at any fsspec URI, written so that no reader ever sees half a file.

A location is a local path or a URI that fsspec knows (`s3://bucket/prefix`, `tar://::https://host/a.tar`).
Credentials come from the environment (for S3, the AWS chain); endpoints and client settings come from the
`storage:` section of the config through `configure`, which also reaches Ray workers (`worker_environment`).
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import fsspec
import fsspec.config
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem


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


def is_local(uri: str) -> bool:
    """Whether a location is a folder or file of this machine."""
    return isinstance(filesystem(uri)[0], LocalFileSystem)


def absolute(uri: str) -> str:
    """The same location, independent of the working directory (workers have another one)."""
    return str(Path(uri).expanduser().resolve()) if "://" not in uri and "::" not in uri else uri


def join(uri: str, *parts: str) -> str:
    """A location inside a folder. Parts are ours, never a user's text."""
    return "/".join([uri.rstrip("/"), *parts])


def exists(uri: str) -> bool:
    """Whether a file or folder is there, asked of the store anew."""
    fs, path = filesystem(uri)
    fs.invalidate_cache()
    return bool(fs.exists(path))


def list_names(uri: str) -> list[str]:
    """Names of the files directly in a folder, sorted; none if there is no folder. For folders we write."""
    fs, path = filesystem(uri)
    fs.invalidate_cache()
    try:
        entries = fs.ls(path, detail=True)
    except FileNotFoundError:
        return []
    return sorted(e["name"].rsplit("/", 1)[-1] for e in entries if e["type"] == "file")


def read_bytes(uri: str) -> bytes:
    """A whole file."""
    fs, path = filesystem(uri)
    return cast(bytes, fs.cat_file(path))


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole file at once: a reader sees the old content, none, or all of the new."""
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    else:
        # bytes: S3 clients take no buffers.
        fs.pipe_file(path, bytes(data))  # one PUT, or a multipart upload that appears when it is completed


def read_json(uri: str) -> Any:
    """A JSON file's value."""
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: Any) -> None:
    """Write a JSON file at once, readable by a person."""
    write_bytes(uri, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n")


def write_parquet(uri: str, table: pa.Table, *, row_group_rows: int | None = None, **options: Any) -> int:
    """Write a Parquet file at once; returns its size in bytes. `options` go to pyarrow's writer."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=row_group_rows, **options)
    data = sink.getvalue()
    write_bytes(uri, data)
    return int(data.size)


def read_parquet(uri: str, columns: list[str] | None = None) -> pa.Table:
    """A whole Parquet file. For the tables of a stage's output, each small enough for one task."""
    fs, path = filesystem(uri)
    with fs.open(path, "rb") as file:
        return pq.read_table(file, columns=columns)


def parquet_parts(folder: str, prefix: str) -> Iterator[str]:
    """URIs of `<prefix>*.parquet` in a folder we wrote, in name order."""
    for name in list_names(folder):
        if name.startswith(prefix) and name.endswith(".parquet"):
            yield join(folder, name)
