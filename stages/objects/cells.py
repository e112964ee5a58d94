"""Images inside Parquet tables: cells of binary columns, or of structs {bytes, path} as Hugging Face has.

in:  parquet://0000000017/image::s3://bucket/train-00000.parquet    row 17 of the table (the first is 1), its
     column `image`; the column's name is percent-encoded
out: the cell's bytes

A row group is the least that can be read of a column. `Cells` reads each one once for all cells that a task
wants of it, and keeps those in a temporary file: in memory there is one column of one row group at most.
"""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, unquote
from weakref import finalize

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.errors import one_line
from stages.images.kinds import ImageRejected
from stages.storage import filesystem
from stages.storage.retry import away, passing

SCHEME = "parquet://"
MOST_BYTES = 1 << 30  # of one column in one row group
READS = 2  # of a row group whose bytes are damaged: the damage may have happened on the way here
_ADDRESS = rf"{SCHEME}(?P<row>\d+)/(?P<column>[^:]*)::(?P<table>(?s:.+))"

Leaf = tuple[str, ...]
"""The name of a column, or of a struct and its field."""


# -- names ------------------------------------------------------------------------


def addresses(table: str, column: str, rows: pa.Array) -> pa.Array:
    """The URIs of a column's cells in these rows of a table."""
    padded = pc.utf8_lpad(rows.cast(pa.string()), 10, "0")
    return pc.binary_join_element_wise(SCHEME, padded, f"/{quote(column, safe='')}::{table}", "")


def places(uris: pa.ChunkedArray) -> pa.ChunkedArray:
    """Texts that sort as tables and the rows in them; null for URIs of other objects."""
    parts = pc.extract_regex(uris, rf"\A{_ADDRESS}\z")
    return pc.binary_join_element_wise(pc.struct_field(parts, "table"), pc.struct_field(parts, "row"), " ")


def _parts(uri: str) -> tuple[str, str, int]:
    """The table, the column and the row of a cell's URI. Raises ValueError if it is none."""
    match = re.fullmatch(_ADDRESS, uri)
    if match is None:
        raise ValueError(f"{uri}: a cell is {SCHEME}<row>/<column>::<table>")
    return match["table"], unquote(match["column"]), int(match["row"])


# -- columns ----------------------------------------------------------------------


def leaves(field: pa.Field) -> tuple[Leaf | None, Leaf | None]:
    """Where a column has paths, and where it has images; None where it has none. Raises ValueError."""
    if pa.types.is_struct(field.type):
        inner = {one.name: one.type for one in field.type}
        if _is_one_of(_BINARY, inner.get("bytes")):
            path = (field.name, "path") if _is_one_of(_TEXT, inner.get("path")) else None
            return path, (field.name, "bytes")
    elif _is_one_of(_BINARY, field.type):
        return None, (field.name,)
    elif _is_one_of(_TEXT, field.type):
        return (field.name,), None
    raise ValueError(
        f"column {field.name}: it holds {field.type}, and neither paths nor images "
        "(binary, or struct<bytes: binary, path: string>)"
    )


def has_images(field: pa.Field) -> bool:
    """Whether a column holds the bytes of images."""
    try:
        return leaves(field)[1] is not None
    except ValueError:
        return False


def described(schema: pa.Schema) -> list[str]:
    """The columns of a table for a message that lists them."""
    return [f"{field.name!r} (images)" if has_images(field) else repr(field.name) for field in schema]


_BINARY = pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view
_TEXT = pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null


def _is_one_of(tests: Iterable[Callable[[pa.DataType], bool]], kind: pa.DataType | None) -> bool:
    if kind is not None and pa.types.is_dictionary(kind):
        kind = kind.value_type
    return kind is not None and any(test(kind) for test in tests)


# -- reading ----------------------------------------------------------------------


@contextmanager
def opened(uri: str, footer: pq.FileMetaData | None = None) -> Iterator[pq.ParquetFile]:
    """A Parquet file. From a store each column of a row group is one request, and nothing else is read."""
    fs, path = filesystem(uri)
    with fs.open(path, "rb", cache_type="none") as file:
        yield pq.ParquetFile(file, metadata=footer)


def values(table: pa.Table | pa.RecordBatch, leaf: Leaf) -> Any:
    """The values of a leaf."""
    column = pc.struct_field(table[leaf[0]], list(leaf[1:])) if leaf[1:] else table[leaf[0]]
    return pc.dictionary_decode(column) if pa.types.is_dictionary(column.type) else column


def filled(parquet: pq.ParquetFile, groups: Iterable[int], leaf: Leaf) -> pa.Array:
    """Whether each row of some row groups has an image: by the file's statistics, which count the nulls.

    Only a row group that has rows of both kinds, or no statistics, is read.

    Raises ValueError if a row group is too large.
    """
    footer = parquet.metadata
    (index,) = (n for n in range(footer.num_columns) if parquet.schema.column(n).path == ".".join(leaf))
    parts = [np.zeros(0, bool)]
    for number in groups:
        count, chunk = footer.row_group(number).num_rows, footer.row_group(number).column(index)
        if chunk.total_uncompressed_size > MOST_BYTES:
            raise ValueError(
                f"column {leaf[0]}: row group {number} has {chunk.total_uncompressed_size / 2**30:.1f} GiB, "
                f"at most {MOST_BYTES / 2**30:.0f} GiB can be read: write fewer rows in a row group"
            )
        known = chunk.statistics is not None and chunk.statistics.has_null_count
        if known and chunk.statistics.null_count in (0, count):
            parts.append(np.full(count, chunk.statistics.null_count == 0))
        else:
            batches = _batches(parquet, number, leaf)
            parts += [batch.is_valid().to_numpy(zero_copy_only=False) for batch in batches]
    return pa.array(np.concatenate(parts))


def _batches(parquet: pq.ParquetFile, group: int, leaf: Leaf) -> Iterator[pa.Array]:
    """The values of a leaf in a row group, a few at a time."""
    for batch in parquet.iter_batches(16, row_groups=[group], columns=[".".join(leaf)], use_threads=False):
        yield values(batch, leaf)


class Cells:
    """Reads the cells of one task. Threads may share it; one of them reads a row group at a time."""

    def __init__(self) -> None:
        self._wanted: defaultdict[tuple[str, str], dict[int, str]] = defaultdict(dict)  # URIs, by row
        self._kept: dict[str, tuple[int, int] | ImageRejected] = {}  # start and size in the file
        self._footers: dict[str, pq.FileMetaData] = {}
        self._file = tempfile.SpooledTemporaryFile(1, prefix="pixloom-")  # noqa: SIM115 - a file once written
        self._lock = threading.Lock()
        finalize(self, self._file.close)

    def want(self, uri: str) -> None:
        """Announce a cell: those of one row group are read together."""
        table, column, row = _parts(uri)
        self._wanted[table, column][row] = uri

    def read(self, uri: str) -> bytes:
        """The bytes of a cell.

        Raises:
            ImageRejected: it is empty or not there (`missing`), or its row group is damaged (`unreadable`).
            Exception: the store's own.
        """
        with self._lock:
            if uri not in self._kept:
                self.want(uri)
                self._read_row_group(*_parts(uri))
            place = self._kept.get(uri, ImageRejected("missing", f"{uri}: there is no image"))
        if isinstance(place, ImageRejected):
            raise ImageRejected(place.reason, place.detail)
        return os.pread(self._file.fileno(), place[1], place[0])

    def _read_row_group(self, table: str, column: str, row: int) -> None:
        """Keep the wanted cells of a column in the row group that has this row, if there is one."""
        with opened(table, self._footers.get(table)) as parquet:
            footer = self._footers[table] = parquet.metadata
            schema = parquet.schema_arrow
            leaf = leaves(schema.field(column))[1] if column in schema.names else None
            if leaf is None or not 1 <= row <= footer.num_rows:
                return
            first, group = 1, 0
            while row >= first + footer.row_group(group).num_rows:
                first += footer.row_group(group).num_rows
                group += 1
            rows = range(first, first + footer.row_group(group).num_rows)
            uris = {n - first: uri for n, uri in self._wanted[table, column].items() if n in rows}
            for left in reversed(range(READS)):
                try:
                    self._keep(_batches(parquet, group, leaf), uris)
                    return
                except (OSError, pa.ArrowException) as error:
                    if not _is_damage(error):
                        raise
                    if not left:
                        text = f"row group {group}, column {column}: {one_line(error)}"
                        self._kept |= dict.fromkeys(uris.values(), ImageRejected("unreadable", text))

    def _keep(self, batches: Iterable[pa.Array], uris: Mapping[int, str]) -> None:
        """Write wanted cells to the file. `uris`: by the row within the row group."""
        first = 0
        for batch in batches:
            for row in range(len(batch)):
                if first + row in uris and batch[row].is_valid:
                    start = self._file.seek(0, os.SEEK_END)
                    size = self._file.write(batch[row].as_buffer())
                    self._kept[uris[first + row]] = (start, size)
            first += len(batch)
        self._file.flush()


def _is_damage(error: Exception) -> bool:
    """Whether bytes came that are no Parquet: Arrow's own errors have no errno, a disk's and a store's do."""
    ours = passing(error) and not away(error) and getattr(error, "errno", None) is None
    return isinstance(error, pa.ArrowException) or ours
