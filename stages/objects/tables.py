"""Pairs from a table: CSV, TSV, JSON lines or Parquet.

in:  rows {source, target[, label, instance, features][, key, split, group]}   URIs of images, by column name
out: objects {key, role, split, group, uri, ...} and rejects, as ingest writes them

A URI without a scheme is relative to the table's folder. A table may come from strangers, so it may only name
files in its own folder or below one of the location's `within`; other rows are rejects (`outside`). What
spreadsheets and Windows write is read: a byte order mark, UTF-16, `;` or tabs between cells, backslashes,
capital letters and blanks in the header.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import IO, Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.base import Role
from stages.config.locations import table_format
from stages.objects.patterns import bad_keys, canonical_splits, compose
from stages.storage import filesystem, retried
from stages.storage.local import local_file

ROLES: tuple[Role, ...] = get_args(Role)
COLUMNS = (*ROLES, "key", "split", "group")
ROWS = 16_000  # of a batch
SEPARATORS = ",;\t|"

REJECTS = pa.schema({name: pa.string() for name in ("key", "role", "uri", "reason", "detail")})
"""Objects that cannot be in a pair, and why, as ingest and pair write them."""


def reject_text(reject: Mapping[str, str]) -> str:
    """A reject in a message: its name, its reason and what is known of it."""
    return f"{reject['uri']} ({', '.join(filter(None, (reject['reason'], reject['detail'])))})"


TABLE = pa.schema({name: pa.string() for name in COLUMNS} | {"line": pa.int64()})
"""A table's rows as text, each with its line in the file (of Parquet, its row)."""


def count_row_groups(uri: str) -> int:
    """How many parts of a table can be read in parallel: a Parquet file's row groups, else one.

    Raises:
        FileNotFoundError, PermissionError, OSError, ValueError: missing, not readable, or damaged.
    """
    fs, path = filesystem(uri)

    def count() -> int:
        if table_format(uri) != "parquet":
            if not fs.isfile(path):
                raise FileNotFoundError(uri)
            return 1
        with fs.open(path, "rb") as file:
            return int(pq.ParquetFile(file).num_row_groups)

    return retried(count)


def read(uri: str, row_group: int = 0) -> Iterator[tuple[pa.Table, list[str]]]:
    """The table's rows (`TABLE`) in batches, and of lines that are no rows what is wrong with them.

    Args:
        uri: the table.
        row_group: the part of a Parquet file.

    Raises:
        OSError, ValueError: not readable; not a table of this kind; no column `source` or `target`.
    """
    kind = table_format(uri)
    if kind == "parquet":
        yield retried(lambda: _parquet(uri, row_group)), []
        return
    with local_file(uri) as path, _text(path) as file:
        yield from _csv(file) if kind == "csv" else _json(file)


def _parquet(uri: str, row_group: int) -> pa.Table:
    fs, path = filesystem(uri)
    with fs.open(path, "rb") as file:
        parquet = pq.ParquetFile(file)
        names = _columns(parquet.schema_arrow.names, place="")
        table = parquet.read_row_group(row_group, columns=list(names.values()))
        first = sum(parquet.metadata.row_group(n).num_rows for n in range(row_group))
    columns = {}
    for name, written in names.items():
        try:
            columns[name] = table[written].cast(pa.string())
        except pa.ArrowNotImplementedError as error:
            raise ValueError(f"column {written}: it holds {table[written].type}, not text") from error
    return _table(columns, np.arange(first + 1, first + 1 + table.num_rows))


def _text(path: Path) -> IO[str]:
    """A text file, unpacked; its encoding is UTF-16 if it begins so, else UTF-8."""
    unpacked: Any = gzip.open if path.name.lower().endswith(".gz") else open
    with unpacked(path, "rb") as file:
        head = file.read(2)
    if head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        encoding = "utf-16"
    else:
        encoding = "utf-16-le" if head[1:] == b"\0" else "utf-16-be" if head[:1] == b"\0" else "utf-8-sig"
    text: IO[str] = unpacked(path, "rt", encoding=encoding, newline="")
    return text


def _lines(file: Iterable[str]) -> Iterator[str]:
    try:
        yield from file
    except UnicodeDecodeError as error:
        raise ValueError(f"neither UTF-8 nor UTF-16: save the table as UTF-8 ({error})") from error


def _csv(file: IO[str]) -> Iterator[tuple[pa.Table, list[str]]]:
    lines = _lines(file)
    header, number = next(lines, "")[:100_000], 1
    if header.lower().startswith("sep="):  # Excel's own line
        header, number = next(lines, "")[:100_000], 2
    separator, cells = max(
        ((mark, next(csv.reader([header], delimiter=mark), [])) for mark in SEPARATORS),
        key=lambda choice: len(set(map(_name, choice[1])) & set(COLUMNS)),
    )
    places = {name: cells.index(written) for name, written in _columns(cells, f"line {number}: ").items()}
    numbered = _csv_rows(lines, separator, number + 1)
    while batch := list(islice(numbered, ROWS)):
        good = [(number, row) for number, row in batch if len(row) == len(cells)]
        columns = {
            name: pa.array([row[place] for _, row in good], pa.string()) for name, place in places.items()
        }
        broken = [
            f"line {number}: it has {len(row)} cells, the header {len(cells)}: {separator.join(row)}"
            for number, row in batch
            if len(row) != len(cells)
        ]
        yield _table(columns, [number for number, _ in good]), broken


def keys_of(uri: str) -> list[str]:
    """The cells of the column `key` of a CSV, as they are. Raises OSError; ValueError: no such column."""
    with local_file(uri) as path, _text(path) as file:
        lines = _lines(file)
        header = next(lines, "")
        for separator in SEPARATORS:
            cells = [_name(cell) for cell in next(csv.reader([header], delimiter=separator), [])]
            if "key" in cells:
                place = cells.index("key")
                return [row[place] for _, row in _csv_rows(lines, separator, 2) if len(row) > place]
    raise ValueError("line 1: there is no column `key`")


def _csv_rows(lines: Iterator[str], separator: str, first: int) -> Iterator[tuple[int, list[str]]]:
    """The rows below the header, each with the line it begins in. `first`: the line after the header."""
    reader = csv.reader(lines, delimiter=separator)
    line = first
    try:
        for row in reader:
            if row:
                yield line, row
            line = reader.line_num + first
    except csv.Error as error:
        raise ValueError(f"line {line}: {error}") from error


def _json(file: IO[str]) -> Iterator[tuple[pa.Table, list[str]]]:
    lines = ((number, line) for number, line in enumerate(_lines(file), 1) if line.strip())
    first = True
    while batch := list(islice(lines, ROWS)):
        rows = [_json_row(number, line) for number, line in batch]
        if first:
            _columns(list(rows[0]))
            first = False
        columns = {name: pa.array([row.get(name) for row in rows], pa.string()) for name in COLUMNS}
        yield _table(columns, [number for number, _ in batch]), []


def _json_row(number: int, line: str) -> dict[str, str | None]:
    """The row of a line, its names as in a header. Raises ValueError if it is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number}: not JSON; write one object a line ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(
            f"line {number}: not a JSON object but a {type(value).__name__}; write one object a line"
        )
    row = {_name(name): cell for name, cell in value.items()}
    for name in COLUMNS:
        if not isinstance(row.get(name), str | None):
            raise ValueError(f"line {number}, column {name}: {json.dumps(row[name])[:80]} is no JSON string")
    return row


def _name(written: str) -> str:
    return written.strip().lower()


def _columns(header: Sequence[str], place: str = "line 1: ") -> dict[str, str]:
    """The columns of `COLUMNS` that a table has, with their names as written. Raises ValueError."""
    names = [_name(written) for written in header]
    if not {"source", "target"} & set(names):
        written = ", ".join(map(repr, header))[:200] or "nothing"
        raise ValueError(
            f"{place}there is no column `source` or `target`, only {written}; "
            f"the columns of a table of pairs are {', '.join(COLUMNS)}"
        )
    for name in COLUMNS:
        if names.count(name) > 1:
            raise ValueError(f"{place}the column `{name}` is there twice")
    return {name: written for name, written in zip(names, header, strict=True) if name in COLUMNS}


def _table(columns: dict[str, pa.Array], lines: Sequence[int] | np.ndarray[Any, Any]) -> pa.Table:
    trimmed = {name: pc.utf8_trim_whitespace(column) for name, column in columns.items()}
    trimmed = {name: pc.if_else(pc.equal(text, ""), None, text) for name, text in trimmed.items()}
    cells = {name: trimmed.get(name, pa.nulls(len(lines), pa.string())) for name in COLUMNS}
    return pa.table(cells | {"line": pa.array(lines, pa.int64())}, schema=TABLE)


def folder_of(uri: str) -> str:
    """The folder a table's relative URIs start from."""
    return uri.rpartition("/")[0]


def objects(table: pa.Table, uri: str, within: Sequence[str]) -> pa.Table:
    """One row {key, role, split, group, uri, reason, detail} for every image that a table's rows name.

    Args:
        table: rows of `TABLE`.
        uri: the table's own.
        within: locations it may name images in, besides its folder.

    Returns:
        Rows with `reason` "" or "outside" or "bad_key". An empty cell gives no row; the pair stage then
        reports its role as missing.
    """
    roots = [folder_of(uri) + "/", *(root.rstrip("/") + "/" for root in within)]
    addresses = {role: _address(table[role], roots) for role in ROLES}
    key = table["key"]
    for role in ("source", "target"):  # a table without keys: the image's path, without its suffix
        below = reduce(_without_prefix, roots, addresses[role])
        key = pc.coalesce(key, pc.replace_substring_regex(below, r"\.[^./]*\z", ""))
    key = compose(pc.coalesce(key, ""))
    bad = bad_keys(key)
    parts = []
    for role, address in addresses.items():
        outside = pc.invert(reduce(pc.or_, [pc.starts_with(address, root) for root in roots]))
        unsafe = pc.match_substring_regex(address, r"::|(?:\A|/)\.{1,2}(?:/|\z)|\p{Cc}")
        reason = pc.if_else(pc.or_(outside, unsafe), "outside", pc.if_else(bad, "bad_key", ""))
        place = pc.binary_join_element_wise("line ", table["line"].cast(pa.string()), f", column {role}", "")
        part = pa.table(
            {
                "key": key,
                "role": pa.array([role]).take(np.zeros(table.num_rows, np.int64)),
                "split": canonical_splits(table["split"].combine_chunks()),
                "group": compose(table["group"]),
                "uri": address,
                "reason": reason,
                "detail": pc.if_else(pc.equal(reason, ""), "", place),
            }
        )
        parts.append(part.filter(pc.is_valid(address)))
    return pa.concat_tables(parts)


_UNTIDY = r"(?:\A|[^:])//|(?:\A|/)\.{1,2}(?:/|\z)"


def _address(cells: pa.ChunkedArray, roots: Sequence[str]) -> pa.Array:
    """Absolute URIs of cells, without `.`, `..` and empty segments; null where a cell is empty."""
    cells = pc.replace_substring(pc.replace_substring_regex(cells, r"\Afile://", ""), "\\", "/")
    absolute = pc.match_substring_regex(cells, r"\A(?:[A-Za-z0-9+.-]+://|[A-Za-z]:/|/)")
    address = pc.if_else(absolute, cells, pc.binary_join_element_wise(roots[0], cells, ""))
    address = address.combine_chunks()
    untidy = pc.fill_null(pc.match_substring_regex(address, _UNTIDY), False)
    tidy = pa.array([_tidy(one) for one in address.filter(untidy).to_pylist()], pa.string())
    return pc.replace_with_mask(address, untidy, tidy)


def _tidy(uri: str) -> str:
    scheme, mark, path = uri.partition("://") if "://" in uri else ("", "", uri)
    segments: list[str] = []
    for segment in path.split("/"):
        if segment == ".." and any(segments):
            segments.pop()
        elif segment not in ("", ".") or not segments:
            segments.append(segment)
    return scheme + mark + "/".join(segments)


def _without_prefix(addresses: pa.Array, root: str) -> pa.Array:
    length = len(root)
    return pc.if_else(pc.starts_with(addresses, root), pc.utf8_slice_codeunits(addresses, length), addresses)
