"""Whole row groups of shards, from local files or a store.

in:  read units {file, group, rows, size} of a shards folder
out: Arrow tables of their rows, with images as they are stored

No torch here, so that a process that only reads starts in a second and stays small.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from stages import storage
from stages.errors import StageError

AGAIN = (
    "delete that file, its marker in _parts/, _parts/groups/ and _SUCCESS.json (or the whole folder) and run "
    "the shard stage again"
)


@lru_cache(maxsize=256)
def _metadata(uri: str) -> Any:
    fs, path = storage.filesystem(uri)
    with fs.open(path, "rb") as file:
        return pq.read_metadata(file)


class _Window(io.RawIOBase):
    """A file of which only the bytes from `start` on are at hand, as a reader of one row group needs them.

    `fsspec.parquet` is no replacement: with pyarrow it reads the footer again for every row group.
    """

    def __init__(self, start: int, data: bytes, size: int) -> None:
        super().__init__()
        self.start, self.data, self.size, self.position = start, memoryview(data), size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def readinto(self, out: Any) -> int:
        begin = self.position - self.start
        if not 0 <= begin <= len(self.data):
            raise OSError("a page outside its row group")
        part = self.data[begin : begin + len(out)]
        out[: len(part)] = part
        self.position += len(part)
        return len(part)


def num_row_groups(uri: str) -> int:
    """The number of row groups of a shard. Raises as `read_unit` does."""
    read = pq.read_metadata if storage.is_local(uri) else _metadata
    try:
        return int(storage.patiently(lambda: read(uri), uri).num_row_groups)
    except (FileNotFoundError, pa.ArrowException) as error:
        raise _mismatch(uri, error) from error


def read_row_group(uri: str, group: int, columns: list[str]) -> pa.Table:
    """Columns of one row group; from a store by a single request (a process reads each footer once).

    Bytes from a store are verified by Parquet's page checksums, since clients do not notice flipped bits in
    parts of objects. Raises OSError if they differ.
    """
    if storage.is_local(uri):
        with pq.ParquetFile(uri, memory_map=True) as file:
            return file.read_row_group(group, columns=columns, use_threads=False)
    try:
        metadata = _metadata(uri)
    except pa.ArrowInvalid as error:  # a footer that is damaged, in the store or on its way
        raise OSError(str(error)) from error
    chunks = [metadata.row_group(group).column(i) for i in range(metadata.num_columns)]
    chunks = [c for c in chunks if c.path_in_schema.partition(".")[0] in columns]
    starts = [c.dictionary_page_offset or c.data_page_offset for c in chunks]
    start, end = min(starts), max(s + c.total_compressed_size for s, c in zip(starts, chunks, strict=True))
    fs, path = storage.filesystem(uri)
    data = cast(bytes, fs.cat_file(path, start=start, end=end))
    if len(data) != end - start:
        _metadata.cache_clear()  # another shard may be there by now
        raise OSError(f"{uri}: {len(data)} bytes of {end - start}")
    try:
        window = _Window(start, data, end)
        with pq.ParquetFile(window, metadata=metadata, page_checksum_verification=True) as file:
            return file.read_row_group(group, columns=columns, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        _metadata.cache_clear()  # the footer may have been damaged on its way
        raise OSError(f"row group {group}: {' '.join(str(error).split())}") from error


def read_unit(folder: str, unit: Mapping[str, Any], columns: list[str]) -> pa.Table:
    """The rows of a read unit {file, group, rows, size}, in the order of `rows`; None: all rows of the group.

    Raises StageError if the shard is gone, damaged or another one (whose group has not `size` rows) or the
    store failed, UserError if it refuses access.
    """
    uri = storage.join(folder, unit["file"])
    try:
        table = storage.patiently(lambda: read_row_group(uri, unit["group"], columns), uri).select(columns)
        if table.num_rows != unit.get("size", table.num_rows):
            raise IndexError(f"row group {unit['group']} has {table.num_rows} rows, not {unit['size']}")
    except (FileNotFoundError, LookupError, pa.ArrowException) as error:
        raise _mismatch(uri, error) from error
    rows = unit.get("rows")
    return table if rows is None else table.take(pa.array(rows, pa.int64()))


def read_units(
    chunk: tuple[str, list[str], list[dict[str, Any]]],
) -> Iterator[tuple[dict[str, Any], pa.Table]]:
    """The units of a chunk (folder, columns, units) and their rows. A task of Ray loads this module alone."""
    folder, columns, units = chunk
    for unit in units:
        yield unit, read_unit(folder, unit, columns)


def _mismatch(uri: str, error: Exception) -> StageError:
    reason = " ".join(str(error).split())
    return StageError(
        f"{uri}: not the shard that dataset.parquet describes ({reason}); put it back, or {AGAIN}"
    )
