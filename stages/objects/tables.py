"""Pairs from a table: CSV, TSV, JSON lines or Parquet.

in:  rows {source, target[, label, instance, features][, key, split, group]}   URIs of images, by column name;
     in Parquet also the images themselves, whose bytes are not read here (`objects.cells`)
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
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial, reduce
from itertools import islice
from pathlib import Path
from typing import IO, Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from fsspec.implementations.local import LocalFileSystem

from stages.base import Role
from stages.config.locations import Column, expand_ranges, table_format
from stages.objects import cells
from stages.objects.listing import Unit
from stages.objects.patterns import bad_keys, canonical_splits, compose
from stages.storage import etag_of, filesystem, retried
from stages.storage.local import local_file

ROLES: tuple[Role, ...] = get_args(Role)
COLUMNS: tuple[Column, ...] = get_args(Column)
ROWS = 16_000  # of a batch
SEPARATORS = ",;\t|"

REJECTS = pa.schema({name: pa.string() for name in ("key", "role", "uri", "reason", "detail")})
"""Objects that cannot be in a pair, and why, as ingest, pair and shard write them."""


def reject_text(reject: Mapping[str, str]) -> str:
    """A reject in a message: its name, its reason and what is known of it."""
    return f"{reject['uri']} ({', '.join(filter(None, (reject['reason'], reject['detail'])))})"


TABLE = pa.schema(
    {name: pa.string() for name in COLUMNS}
    | {f"{role}_cell": pa.string() for role in ROLES}
    | {"line": pa.int64(), "etag": pa.string()}
)
"""A table's rows as text, each with its line in the file (of Parquet, its row).

`<role>_cell` is the URI of an image inside the table. `etag` is the version of a table that holds images.
"""

_WILD = {"{split}": "(?P<split>[^/]+?)", "*": "[^/]*"}
_ANY_WILD = re.compile("(" + "|".join(map(re.escape, _WILD)) + ")")


def files(uri: str) -> list[tuple[str, str]]:
    """The tables that a location names, in order, each with the split in its name or "".

    {000..003} stands for these numbers, * for any text within a name, {split} for a split.

    Raises FileNotFoundError if there are none; PermissionError, OSError.
    """
    every: list[tuple[str, str]] = []
    for one in expand_ranges(uri):
        if not _ANY_WILD.search(one):
            every.append((one, ""))
            continue
        fs, path = filesystem(one)
        fs.invalidate_cache()
        glob = re.sub(r"[\[?]", r"[\g<0>]", path).replace("{split}", "*")
        pattern = "".join(_WILD.get(text, re.escape(text)) for text in _ANY_WILD.split(path))
        for name, info in sorted(retried(partial(fs.glob, glob, detail=True)).items()):
            match = re.fullmatch(pattern, name)
            if match and info["type"] == "file":
                address = name if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(name)
                every.append((address, match.groupdict().get("split", "")))
    if not every:
        raise FileNotFoundError(uri)
    return every


def units(uri: str) -> list[Unit]:
    """The parts of a location that can be read in parallel: of one Parquet file its row groups, else files.

    Raises:
        FileNotFoundError, PermissionError, OSError, ValueError: missing, not readable, or damaged.
    """
    every = files(uri)
    (file, split), (fs, path) = every[0], filesystem(every[0][0])
    if len(every) == 1 and table_format(file) == "parquet":
        runs = runs_of_rows(retried(lambda: _row_groups(file)), ROWS)
        return [Unit("table", (file,), row_groups=run, split=split) for run in runs]
    if len(every) == 1 and not retried(lambda: fs.isfile(path)):
        raise FileNotFoundError(uri)
    return [Unit("table", (file,), split=split) for file, split in every]


def _row_groups(uri: str) -> list[int]:
    """The number of rows in each row group of a Parquet file."""
    with cells.opened(uri) as parquet:
        return [parquet.metadata.row_group(number).num_rows for number in range(parquet.num_row_groups)]


def runs_of_rows(row_groups: Sequence[int], rows: int) -> list[tuple[int, int]]:
    """Runs of row groups (the first, the one after the last), of `rows` rows or more if there are so many."""
    runs, start, held = [], 0, 0
    for stop, count in enumerate(row_groups, 1):
        held += count
        if held >= rows or stop == len(row_groups):
            runs.append((start, stop))
            start, held = stop, 0
    return runs


Columns = Mapping[Column, str | None]
"""A table's own names of its columns; empty: they are called what they hold."""


def read(unit: Unit, columns: Columns, location: str = "") -> Iterator[tuple[pa.Table, list[str]]]:
    """A table's rows (`TABLE`) in batches, and of lines that are no rows what is wrong with them.

    Args:
        unit: from `units`.
        columns: the names of the columns.
        location: the one that the unit is of; rows of images without a key are named by what varies in it.

    Raises:
        OSError, ValueError: not readable; not a table of this kind; a column is missing or of another type.
    """
    (uri,) = unit.paths
    kind = table_format(uri)
    if kind == "parquet":
        yield _with_split(retried(lambda: _parquet(unit, columns, location or uri)), unit.split), []
        return
    with local_file(uri) as path, _text(path) as file:
        for table, broken in _csv(file, columns) if kind == "csv" else _json(file, columns):
            yield _with_split(table, unit.split), broken


def _with_split(table: pa.Table, split: str) -> pa.Table:
    """Rows without a split get the one in the table's name."""
    if not split:
        return table
    place = table.schema.get_field_index("split")
    return table.set_column(place, "split", pc.coalesce(table["split"], split))


def _parquet(unit: Unit, columns: Columns, location: str) -> pa.Table:
    (uri,) = unit.paths
    fs, path = filesystem(uri)
    fs.invalidate_cache()
    version = etag_of(fs.info(path))
    with cells.opened(uri) as parquet:
        counts = [parquet.metadata.row_group(number).num_rows for number in range(parquet.num_row_groups)]
        groups = list(range(len(counts)))[slice(*unit.row_groups)]
        names = _columns(parquet.schema_arrow.names, columns, "", cells.described(parquet.schema_arrow))
        texts, images = _leaves(parquet.schema_arrow, names)
        rows = parquet.read_row_groups(groups, columns=[".".join(leaf) for leaf in texts.values()])
        filled = {role: cells.filled(parquet, groups, leaf) for role, leaf in images.items()}
    first = sum(counts[: groups[0]]) + 1 if groups else 1
    lines = pa.array(np.arange(first, first + sum(counts[number] for number in groups)))
    text = {name: cells.values(rows, leaf).cast(pa.string()) for name, leaf in texts.items()}
    if not filled:
        return _table(text, lines)
    named = []
    for role, inside in filled.items():  # the path of an image that is inside is no more than a name
        if role in text:
            named.append(pc.if_else(inside, text[role], None))
            text[role] = pc.if_else(inside, None, text[role])
        text[f"{role}_cell"] = pc.if_else(inside, cells.addresses(uri, names[role], lines), None)
    table = _table(text | {"etag": pa.array(np.full(len(lines), version, object), pa.string())}, lines)
    if columns.get("key", "") is None:
        named = []
    keys = [_keys(paths, unit.split) for paths in named]
    number = pc.utf8_lpad(lines.cast(pa.string()), 6, "0")
    keys.append(pc.binary_join_element_wise(_varying(uri, location), number, "/"))
    made = pc.if_else(reduce(pc.or_, filled.values()), pc.coalesce(*keys), None)
    return table.set_column(COLUMNS.index("key"), "key", pc.coalesce(table["key"], made))


def _leaves(
    schema: pa.Schema, names: Mapping[str, str]
) -> tuple[dict[str, cells.Leaf], dict[str, cells.Leaf]]:
    """Where columns have text, and where images. Raises ValueError."""
    texts: dict[str, cells.Leaf] = {}
    images: dict[str, cells.Leaf] = {}
    for name, written in names.items():
        if name in ROLES:
            text, image = cells.leaves(schema.field(written))
            texts |= {name: text} if text else {}
            images |= {name: image} if image else {}
        elif pa.types.is_nested(schema.field(written).type):
            raise ValueError(f"column {written}: it holds {schema.field(written).type}, not text")
        else:
            texts[name] = (written,)
    return texts, images


def _keys(paths: pa.ChunkedArray, split: str) -> pa.Array:
    """Keys made of the paths that images inside a table had elsewhere, which may be any text."""

    def key(path: str | None) -> str | None:
        names = [name for name in re.split(r"[\\/]+", path or "") if name not in ("", ".", "..")]
        text = re.sub(r"\.[^./]*\Z", "", "/".join(names))
        return f"{split}/{text}" if text and split else text or None

    return pa.array(map(key, paths.to_pylist()), pa.string())


def _varying(uri: str, location: str) -> str:
    """What distinguishes a table from the others of its location, without the suffix."""
    folder = re.split(r"[*{]", location)[0].rpartition("/")[0] + "/"
    name = uri.removeprefix(folder) if uri.startswith(folder) else uri.rpartition("/")[2]
    return re.sub(r"(?i)\.parquet(\?.*)?\Z", "", name)


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


def _csv(file: IO[str], columns: Columns) -> Iterator[tuple[pa.Table, list[str]]]:
    lines = _lines(file)
    separator, header_cells, number = _header(lines, _own(columns))
    names = _columns(header_cells, columns, f"line {number}: ")
    places = {name: header_cells.index(written) for name, written in names.items()}
    numbered = _csv_rows(lines, separator, number + 1)
    while batch := list(islice(numbered, ROWS)):
        good = [(number, row) for number, row in batch if len(row) == len(header_cells)]
        text = {
            name: pa.array([row[place] for _, row in good], pa.string()) for name, place in places.items()
        }
        broken = [
            f"line {number}: it has {len(row)} cells, the header {len(header_cells)}: {separator.join(row)}"
            for number, row in batch
            if len(row) != len(header_cells)
        ]
        yield _table(text, [number for number, _ in good]), broken


def keys_of(uri: str) -> list[str]:
    """The cells of the column `key` of a CSV, as they are. Raises OSError; ValueError: no such column."""
    with local_file(uri) as path, _text(path) as file:
        lines = _lines(file)
        separator, header, number = _header(lines, ("key",))
        if "key" not in map(_name, header):
            raise ValueError(f"line {number}: there is no column `key`")
        place = [*map(_name, header)].index("key")
        return [row[place] for _, row in _csv_rows(lines, separator, number + 1) if len(row) > place]


def _header(lines: Iterator[str], wanted: Iterable[str]) -> tuple[str, list[str], int]:
    """The separator of a CSV's cells, the header, and its line. More `wanted` columns mean the separator."""
    header, number = next(lines, "")[:100_000], 1
    if header.lower().startswith("sep="):  # Excel's own line
        header, number = next(lines, "")[:100_000], 2
    choices = ((mark, next(csv.reader([header], delimiter=mark), [])) for mark in SEPARATORS)
    return *max(choices, key=lambda choice: len({*map(_name, choice[1])} & {*wanted})), number


def _csv_rows(lines: Iterator[str], separator: str, first: int) -> Iterator[tuple[int, list[str]]]:
    """The rows below the header, each with the line it begins in. `first`: the line after the header."""
    reader = csv.reader(lines, delimiter=separator, strict=True)  # else an open quote takes all that follows
    line = first
    try:
        for row in reader:
            if row:
                yield line, row
            line = reader.line_num + first
    except csv.Error as error:
        raise ValueError(f"line {line}: {error}") from error


def _json(file: IO[str], columns: Columns) -> Iterator[tuple[pa.Table, list[str]]]:
    lines = ((number, line) for number, line in enumerate(_lines(file), 1) if line.strip())
    own = _own(columns)
    first = True
    while batch := list(islice(lines, ROWS)):
        rows = [_json_row(number, line) for number, line in batch]
        if first:
            _columns(list(rows[0]), columns)
            first = False
        text: dict[str, pa.Array] = {}
        for written, name in own.items():
            for (number, _), row in zip(batch, rows, strict=True):
                if not isinstance(row.get(written), str | None):
                    cell = json.dumps(row[written])[:80]
                    raise ValueError(f"line {number}, column {written}: {cell} is no JSON string")
            text[name] = pa.array([row.get(written) for row in rows], pa.string())
        yield _table(text, [number for number, _ in batch]), []


def _json_row(number: int, line: str) -> dict[str, Any]:
    """The row of a line, its names as in a header. Raises ValueError if it is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number}: not JSON; write one object a line ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(
            f"line {number}: not a JSON object but a {type(value).__name__}; write one object a line"
        )
    return {_name(name): cell for name, cell in value.items()}


def _name(written: str) -> str:
    return written.strip().lower()


def _own(columns: Columns) -> dict[str, Column]:
    """What each column of a table holds, by its name in small letters."""
    if columns:
        return {_name(written): name for name, written in columns.items() if written}
    return {name: name for name in COLUMNS}


def _columns(
    header: Sequence[str], columns: Columns, place: str = "line 1: ", shown: Iterable[str] = ()
) -> dict[str, str]:
    """The columns that a table has of those that are read, with their names as written. Raises ValueError.

    shown   the header as a message shows it
    """
    names, own = [_name(written) for written in header], _own(columns)
    listed = ", ".join(shown or map(repr, header))[:300] or "nothing"
    for written, name in own.items():
        if columns and written not in names:
            raise ValueError(f"{place}there is no column {columns[name]!r} (`columns.{name}`), only {listed}")
        if names.count(written) > 1:
            raise ValueError(f"{place}the column `{written}` is there twice")
    if not {"source", "target"} & {own[name] for name in names if name in own}:
        raise ValueError(
            f"{place}there is no column `source` or `target`, only {listed}; name them by `columns`: "
            f"{{source: ..., target: ...}}; the columns of a table of pairs are {', '.join(COLUMNS)}"
        )
    return {own[name]: written for name, written in zip(names, header, strict=True) if name in own}


def _table(columns: Mapping[str, pa.Array], lines: Sequence[int] | np.ndarray[Any, Any]) -> pa.Table:
    trimmed = {name: pc.utf8_trim_whitespace(column) for name, column in columns.items()}
    trimmed = {name: pc.if_else(pc.equal(text, ""), None, text) for name, text in trimmed.items()}
    empty = pa.nulls(len(lines), pa.string())
    text = {name: trimmed.get(name, empty) for name in TABLE.names if name != "line"}
    return pa.table(text | {"line": pa.array(lines, pa.int64())}).select(TABLE.names).cast(TABLE)


def folder_of(uri: str) -> str:
    """The folder a table's relative URIs start from."""
    return uri.rpartition("/")[0]


def objects(table: pa.Table, uri: str, within: Sequence[str]) -> pa.Table:
    """One row {key, role, split, group, uri, etag, reason, detail} for every image that a table's rows have.

    Args:
        table: rows of `TABLE`.
        uri: the table's own.
        within: locations it may name images in, besides its folder.

    Returns:
        Rows with `reason` "" or "outside" or "bad_key"; `bad_row` for a row without any image in a table that
        holds images. Another empty cell gives no row; the pair stage then reports its role as missing.
    """
    roots = [folder_of(uri) + "/", *(root.rstrip("/") + "/" for root in within)]
    addresses = {role: _address(table[role], roots) for role in ROLES}
    key = table["key"]
    for role in ("source", "target"):  # a table without keys: the image's path, without its suffix
        affixes = rf"\A(?:{'|'.join(map(re.escape, roots))})|\.[^./]*\z"
        key = pc.coalesce(key, pc.replace_substring_regex(addresses[role], affixes, ""))
    key = compose(pc.coalesce(key, ""))
    bad = bad_keys(key)
    version = pc.coalesce(table["etag"], "")
    shared = {
        "key": key,
        "split": canonical_splits(table["split"].combine_chunks()),
        "group": compose(table["group"]),
    }

    def part(role: str, address: pa.Array, etag: pa.Array, reason: pa.Array, detail: str) -> pa.Table:
        """The rows that have an address."""
        place = pc.binary_join_element_wise("line ", table["line"].cast(pa.string()), detail, "")
        detail = pc.if_else(pc.equal(reason, ""), "", place)
        columns = {"role": text(role), "uri": address, "etag": etag, "reason": reason, "detail": detail}
        return pa.table(shared | columns).filter(pc.is_valid(address))

    def text(value: str) -> pa.Array:
        return pa.array([value], pa.string()).take(np.zeros(table.num_rows, np.int64))

    parts, empty = [], pc.is_valid(table["etag"])
    for role, address in addresses.items():
        cell = table[f"{role}_cell"]
        outside = pc.invert(reduce(pc.or_, [pc.starts_with(address, root) for root in roots]))
        unsafe = pc.match_substring_regex(address, r"::|(?:\A|/)\.{1,2}(?:/|\z)|\p{Cc}")
        elsewhere = pc.and_kleene(pc.is_null(cell), pc.or_(outside, unsafe))
        reason = pc.if_else(elsewhere, "outside", pc.if_else(bad, "bad_key", ""))
        etag = pc.if_else(pc.is_valid(cell), version, "")
        parts.append(part(role, pc.coalesce(cell, address), etag, reason, f", column {role}"))
        empty = pc.and_(empty, pc.and_(pc.is_null(cell), pc.is_null(address)))
    nothing = pc.if_else(empty, text(uri), None)
    parts.append(part("table", nothing, text(""), text("bad_row"), ": it has no image"))
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
