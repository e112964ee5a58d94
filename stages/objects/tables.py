"""Pairs from a table: CSV, TSV, JSON lines or Parquet.

in:  rows {source, target[, label, instance, features][, key, split, group]}   URIs of images, by column name
out: objects {key, role, split, group, uri, ...} and rejects, as ingest writes them

A URI without a scheme is relative to the table's folder. A table may come from strangers, so it may only name
files in its own folder or below one of the location's `within`; other rows are rejects (`outside`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from stages.base import Role
from stages.config.locations import table_format
from stages.objects.patterns import bad_keys, canonical_splits, compose
from stages.storage import filesystem

ROLES: tuple[Role, ...] = get_args(Role)
COLUMNS = (*ROLES, "key", "split", "group")

REJECTS = pa.schema({"key": pa.string(), "role": pa.string(), "uri": pa.string(), "reason": pa.string()})
"""Objects that cannot be in a pair, and why, as ingest and pair write them."""

_TEXT = pa.schema({name: pa.string() for name in COLUMNS})


def count_row_groups(uri: str) -> int:
    """How many parts of a table can be read in parallel: a Parquet file's row groups, else one.

    Raises:
        FileNotFoundError, PermissionError, OSError, ValueError: missing, not readable, or damaged.
    """
    fs, path = filesystem(uri)
    if table_format(uri) != "parquet":
        if not fs.isfile(path):
            raise FileNotFoundError(uri)
        return 1
    with fs.open(path, "rb") as file:
        return int(pq.ParquetFile(file).num_row_groups)


def read(uri: str, row_groups: Sequence[int] = (0,)) -> Iterator[tuple[pa.Table, list[str]]]:
    """The table's rows in batches, every column of `COLUMNS` as text, and lines that are no rows.

    Args:
        uri: the table.
        row_groups: the part of a Parquet file.

    Raises:
        OSError, ValueError: not readable; not a table of this kind; no column `source` or `target`.
    """
    fs, path = filesystem(uri)
    kind = table_format(uri)
    if kind == "parquet":
        with fs.open(path, "rb") as file:
            parquet = pq.ParquetFile(file)
            names = [name for name in COLUMNS if name in parquet.schema_arrow.names]
            for number in row_groups:
                table = parquet.read_row_group(number, columns=names)
                yield _complete({name: table[name].cast(pa.string()) for name in names}, table.num_rows), []
        return
    with fs.open(path, "rb", compression="infer") as file:
        broken: list[str] = []
        batches = _csv(file, "\t" if kind == "tsv" else ",", broken) if kind != "json" else _json(file)
        for batch in batches:
            columns = {name: batch[name] for name in COLUMNS if name in batch.schema.names}
            lines, broken[:] = list(broken), []
            yield _complete(columns, batch.num_rows), lines


def _csv(file: object, delimiter: str, broken: list[str]) -> Iterator[pa.RecordBatch]:
    def skip(row: pyarrow.csv.InvalidRow) -> str:
        broken.append(row.text or "")
        return "skip"

    return iter(
        pyarrow.csv.open_csv(
            file,
            # Everything is text: a key "0001" is no number.
            convert_options=pyarrow.csv.ConvertOptions(
                include_columns=list(COLUMNS),
                include_missing_columns=True,
                column_types=_TEXT,
                strings_can_be_null=True,
                null_values=[""],
            ),
            parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, invalid_row_handler=skip),
        )
    )


def _json(file: object) -> Iterator[pa.RecordBatch]:
    return iter(
        pyarrow.json.open_json(
            file,
            parse_options=pyarrow.json.ParseOptions(
                explicit_schema=_TEXT, unexpected_field_behavior="ignore"
            ),
        )
    )


def _complete(columns: dict[str, pa.Array], count: int) -> pa.Table:
    return pa.table({name: columns.get(name, pa.nulls(count, pa.string())) for name in COLUMNS}, schema=_TEXT)


def folder_of(uri: str) -> str:
    """The folder a table's relative URIs start from."""
    return uri.rpartition("/")[0]


def objects(table: pa.Table, uri: str, within: Sequence[str]) -> pa.Table:
    """One row {key, role, split, group, uri, reason} for every image that a table's rows name.

    Args:
        table: rows of `COLUMNS`.
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
        part = pa.table(
            {
                "key": key,
                "role": pa.array([role]).take(np.zeros(table.num_rows, np.int64)),
                "split": canonical_splits(table["split"].combine_chunks()),
                "group": compose(table["group"]),
                "uri": address,
                "reason": reason,
            }
        )
        parts.append(part.filter(pc.is_valid(address)))
    return pa.concat_tables(parts)


def _address(cells: pa.ChunkedArray, roots: Sequence[str]) -> pa.ChunkedArray:
    """Absolute URIs of cells; null where a cell is empty."""
    cells = pc.if_else(pc.equal(cells, ""), pa.scalar(None, pa.string()), cells)
    cells = pc.replace_substring_regex(cells, r"\Afile://", "")
    absolute = pc.match_substring_regex(cells, r"\A(?:[A-Za-z0-9+.-]+://|/)")
    return pc.if_else(absolute, cells, pc.binary_join_element_wise(roots[0], cells, ""))


def _without_prefix(addresses: pa.ChunkedArray, root: str) -> pa.ChunkedArray:
    length = len(root)
    return pc.if_else(pc.starts_with(addresses, root), pc.utf8_slice_codeunits(addresses, length), addresses)
