"""Pairs written down in a table, whose text is not to be trusted."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st

from stages.config.locations import table_format
from stages.objects import tables
from stages.objects.listing import Unit

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
    return [
        row
        for unit in tables.units(uri)
        for table, _ in tables.read(unit, {})
        for row in tables.objects(table, uri, within).to_pylist()
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


def test_a_parquet_table_is_read_by_runs_of_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = written(tmp_path, "t.parquet", ROWS)
    assert [unit.row_groups for unit in tables.units(uri)] == [(0, 2)]
    monkeypatch.setattr(tables, "ROWS", 1)
    first, second = tables.units(uri)
    assert first.row_groups == (0, 1)
    ((table, _),) = tables.read(second, {})
    assert table.select(["key", "line"]).to_pylist() == [{"key": "0002", "line": 2}]


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
        "..\\secret.png",
        "C:\\data\\secret.png",
        "\\\\server\\share\\secret.png",
        "s3://other/x.png",
        "http://169.254.169.254/latest/meta-data",
        "tar://x.png::/etc/archive.tar",
        "a/x.png::file:///etc/passwd",
        "a\nb.png",
    ],
)
def test_a_table_names_nothing_outside_its_folder(tmp_path: Path, address: str) -> None:
    uri = written(tmp_path, "t.jsonl", [{"source": address, "target": "b.png", "key": "k"}])
    assert {row["role"]: (row["reason"], row["detail"]) for row in named(uri)} == {
        "source": ("outside", "line 1, column source"),
        "target": ("", ""),
    }


@pytest.mark.parametrize(
    "cell",
    [
        "./img/a.png",
        "img//a.png",
        "img/./a.png",
        "x/../img/a.png",
        "img\\a.png",
        ".\\img\\a.png",
        " img/a.png ",
    ],
)
def test_one_file_is_one_address_however_it_is_written(tmp_path: Path, cell: str) -> None:
    for name in ("t.csv", "t.jsonl", "t.parquet"):
        (row,) = named(written(tmp_path, name, [{"source": cell}]))
        assert (row["uri"], row["key"], row["reason"]) == (f"{tmp_path}/img/a.png", "img/a", "")
    table = pa.Table.from_pylist([{"source": f"s3://b/x/{cell.strip()}", "line": 1}], schema=tables.TABLE)
    (row,) = tables.objects(table, "s3://b/t.csv", []).to_pylist()
    assert (row["uri"], row["key"], row["reason"]) == ("s3://b/x/img/a.png", "x/img/a", "")


@pytest.mark.parametrize(
    "data",
    [
        b"source;target;key\na.png;b.png;k\n",
        b"sep=;\r\nsource;target;key\r\na.png;b.png;k\r\n",
        b"source|target|key\na.png|b.png|k\n",
        b"source\ttarget\tkey\na.png\tb.png\tk\n",
        b"source,target,key\r\na.png,b.png,k\r\n",
        b"source,target,key\ra.png,b.png,k\r",
        b" Source , TARGET,Key\na.png, b.png,k \n\n",
        b',"Key","source","target"\n0,"k","a.png","b.png"\n',
        "\ufeffsource,target,key\na.png,b.png,k".encode(),
        '\ufeff"Source","target","key"\r\n".\\a.png","sub/../b.png","k"\r\n'.encode(),
        "source,target,key\na.png,b.png,k\n".encode("utf-16"),
        "source;target;key\r\na.png;b.png;k\r\n".encode("utf-16-be"),
        "source\ttarget\tkey\na.png\tb.png\tk\n".encode("utf-16-le"),
    ],
)
def test_what_spreadsheets_write_is_read(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "t.csv").write_bytes(data)
    assert [(row["key"], row["role"], row["uri"]) for row in named(f"{tmp_path}/t.csv")] == [
        ("k", "source", f"{tmp_path}/a.png"),
        ("k", "target", f"{tmp_path}/b.png"),
    ]


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        (
            "t.csv",
            b"image,mask\na.png,b.png\n",
            r"line 1: .* column `source` or `target`, only 'image', 'mask'",
        ),
        ("t.csv", b"", "line 1: .* only nothing"),
        ("t.csv", b"source,target,Source\na,b,c\n", "line 1: the column `source` is there twice"),
        ("t.csv", b"source,target\n\xfc.png,b.png\n", "save the table as UTF-8"),
        ("t.csv", b'source,target\na,b\n"' + b"x\n" * 100_000, "line 3.*: field larger"),
        ("t.csv", b'source,target\na,b\n"c,d\ne,f\n', "line 3: unexpected end of data"),
        ("t.jsonl", b'{"image": "a.png"}\n', "line 1: .* only 'image'"),
        (
            "t.jsonl",
            b'[{"source": "a.png"}]\n',
            "line 1: not a JSON object but a list; write one object a line",
        ),
        ("t.jsonl", b'\n{"source": \n', "line 2: not JSON"),
        ("t.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("t.jsonl", b'{"source": "a", "key": 5}\n', "line 1, column key: 5 is no JSON string"),
    ],
)
def test_a_table_that_cannot_be_read_says_where_and_what_is_expected(
    tmp_path: Path, name: str, data: bytes, complaint: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=complaint):
        list(tables.read(Unit("table", (str(tmp_path / name),)), {}))


@pytest.mark.parametrize(
    ("cell", "complaint"),
    [
        ({"data": b"x"}, "column Source: it holds struct"),
        (5, "column Source: it holds int64, and neither paths"),
    ],
)
def test_a_column_of_another_type_is_refused_with_its_name(tmp_path: Path, cell: Any, complaint: str) -> None:
    pq.write_table(pa.table({"Source": [cell], "target": ["b.png"]}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=complaint):
        list(tables.read(Unit("table", (f"{tmp_path}/t.parquet",)), {}))


def test_a_table_of_a_store_is_read_in_batches(client_options: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROWS", 2)
    with fsspec.open("memory://tables/t.csv", "wb") as file:
        file.write(b"source,key\n" + b"".join(b'"a\n%d",k%d\n' % (n, n) for n in range(5)))
    batches = [table for table, _ in tables.read(Unit("table", ("memory://tables/t.csv",)), {})]
    assert [table.num_rows for table in batches] == [2, 2, 1]
    assert [line for table in batches for line in table["line"].to_pylist()] == [2, 4, 6, 8, 10]


def test_a_folder_with_the_same_beginning_is_another_folder(tmp_path: Path) -> None:
    uri = written(tmp_path, "t.csv", [{"source": f"{tmp_path}2/a.png", "target": "/data2/a.png", "key": "k"}])
    assert [row["reason"] for row in named(uri, "/data")] == ["outside", "outside"]


def test_an_empty_cell_is_a_missing_role(tmp_path: Path) -> None:
    uri = written(tmp_path, "t.csv", [{"source": "", "target": "b.png", "key": "k"}])
    assert [row["role"] for row in named(uri)] == ["target"]


def test_lines_that_are_no_rows_are_kept_apart(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("source,target,key\na.png,b.png,k\nonly one cell\na.png,b.png,l,too many\n")
    ((table, broken),) = tables.read(Unit("table", (str(path),)), {})
    assert table["key"].to_pylist() == ["k"]
    assert broken == [
        "line 3: it has 1 cells, the header 3: only one cell",
        "line 4: it has 4 cells, the header 3: a.png,b.png,l,too many",
    ]


def test_an_unknown_suffix_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\.parquet"):
        table_format("s3://bucket/pairs.xlsx")


CELLS = st.one_of(st.none(), st.text(st.characters(exclude_categories=("Cs",)), max_size=30))


@settings(deadline=None)
@given(st.lists(st.fixed_dictionaries(dict.fromkeys(tables.COLUMNS, CELLS)), min_size=1, max_size=8))
def test_any_text_in_any_cell_stays_inside(rows: list[dict[str, str | None]]) -> None:
    table = pa.Table.from_pylist(rows, schema=tables.TABLE)
    for row in tables.objects(table, "/safe/t.csv", []).to_pylist():
        if not row["reason"]:
            assert row["uri"].startswith("/safe/")
            assert ".." not in row["uri"].split("/")
            assert "::" not in row["uri"]
