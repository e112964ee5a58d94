"""Pairs written down in a table, whose text is not to be trusted."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.config.locations import table_format
from stages.objects import tables

ROWS = [
    {"source": "a/1.png", "target": "b/1.png", "key": "0001", "split": "Train", "group": "g"},
    {"source": "a/2.png", "target": "b/2.png", "key": "0002", "split": None, "group": None},
]


def written(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    path = folder / name
    names = list(rows[0])
    if ".parquet" in name:
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1)
    elif "json" in name:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        mark = "\t" if ".tsv" in name else ","
        lines = [mark.join(names), *(mark.join(row[column] or "" for column in names) for row in rows)]
        data = ("\n".join(lines) + "\n").encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return str(path)


def named(uri: str, *within: str) -> list[dict[str, Any]]:
    groups = range(tables.count_row_groups(uri))
    return [
        row for table, _ in tables.read(uri, groups) for row in tables.objects(table, uri, within).to_pylist()
    ]


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.ndjson", "t.parquet", "t.csv.gz"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    rows = named(written(tmp_path, name, ROWS))
    assert sorted((row["key"], row["role"], row["uri"]) for row in rows) == [
        ("0001", "source", f"{tmp_path}/a/1.png"),
        ("0001", "target", f"{tmp_path}/b/1.png"),
        ("0002", "source", f"{tmp_path}/a/2.png"),
        ("0002", "target", f"{tmp_path}/b/2.png"),
    ]
    assert {(row["key"], row["split"], row["group"]) for row in rows} == {
        ("0001", "train", "g"),
        ("0002", None, None),
    }
    assert {row["reason"] for row in rows} == {""}


def test_a_parquet_table_is_read_by_row_groups(tmp_path: Path) -> None:
    uri = written(tmp_path, "t.parquet", ROWS)
    assert tables.count_row_groups(uri) == 2
    ((table, _),) = tables.read(uri, [1])
    assert table["key"].to_pylist() == ["0002"]


def test_without_keys_the_path_of_the_source_is_the_key(tmp_path: Path) -> None:
    uri = written(tmp_path, "t.csv", [{"source": "a/1.png", "target": "/elsewhere/x.png"}])
    rows = named(uri, "/elsewhere")
    assert [(row["key"], row["uri"], row["reason"]) for row in rows] == [
        ("a/1", f"{tmp_path}/a/1.png", ""),
        ("a/1", "/elsewhere/x.png", ""),
    ]


@pytest.mark.parametrize(
    "address",
    [
        "/etc/passwd",
        "file:///etc/passwd",
        "../secret.png",
        "a/../../secret.png",
        "s3://other/x.png",
        "http://169.254.169.254/latest/meta-data",
        "tar://x.png::/etc/archive.tar",
        "a/x.png::file:///etc/passwd",
        "./a.png",
        "a\nb.png",
    ],
)
def test_a_table_names_nothing_outside_its_folder(tmp_path: Path, address: str) -> None:
    uri = written(tmp_path, "t.jsonl", [{"source": address, "target": "b.png", "key": "k"}])
    assert {row["role"]: row["reason"] for row in named(uri)} == {"source": "outside", "target": ""}


def test_a_folder_with_the_same_beginning_is_another_folder(tmp_path: Path) -> None:
    uri = written(tmp_path, "t.csv", [{"source": f"{tmp_path}2/a.png", "target": "/data2/a.png", "key": "k"}])
    assert [row["reason"] for row in named(uri, "/data")] == ["outside", "outside"]


def test_an_empty_cell_is_a_missing_role(tmp_path: Path) -> None:
    uri = written(tmp_path, "t.csv", [{"source": "", "target": "b.png", "key": "k"}])
    assert [row["role"] for row in named(uri)] == ["target"]


def test_lines_that_are_no_rows_are_kept_apart(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("source,target,key\na.png,b.png,k\nonly one cell\na.png,b.png,l,too many\n")
    ((table, broken),) = tables.read(str(path))
    assert table["key"].to_pylist() == ["k"]
    assert broken == ["only one cell", "a.png,b.png,l,too many"]


@pytest.mark.parametrize("text", ['{"source": \n', "[1, 2]\n", '{"key": 5}\n{"key": "x"}\n'])
def test_json_that_is_none_is_an_error_of_its_own(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.jsonl").write_text(text)
    with pytest.raises(ValueError, match="JSON"):
        list(tables.read(str(tmp_path / "t.jsonl")))


def test_an_unknown_suffix_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\.parquet"):
        table_format("s3://bucket/pairs.xlsx")


CELLS = st.one_of(st.none(), st.text(st.characters(exclude_categories=("Cs",)), max_size=30))


@settings(deadline=None)
@given(st.lists(st.fixed_dictionaries(dict.fromkeys(tables.COLUMNS, CELLS)), min_size=1, max_size=8))
def test_any_text_in_any_cell_stays_inside(rows: list[dict[str, str | None]]) -> None:
    table = pa.Table.from_pylist(rows, schema=pa.schema({name: pa.string() for name in tables.COLUMNS}))
    for row in tables.objects(table, "/safe/t.csv", []).to_pylist():
        if not row["reason"]:
            assert row["uri"].startswith("/safe/")
            assert ".." not in row["uri"].split("/")
            assert "::" not in row["uri"]
