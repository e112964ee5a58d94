"""Images inside Parquet tables: named without reading them, and read once a row group."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from stages import storage
from stages.images.kinds import ImageRejected
from stages.objects import cells, tables
from stages.objects.fetch import Object, Reader
from stages.storage import local_etag
from tests.stores.faults import Fault, FaultProxy
from tests.stores.files import FileServer
from tests.stores.seaweed import SeaweedS3

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def image(text: str, path: str | None = None) -> dict[str, Any]:
    return {"bytes": text.encode(), "path": path}


def write(path: Path, columns: dict[str, Any], rows: int = 2, **options: Any) -> str:
    """A table: lists of dicts become columns of images, as Hugging Face's `datasets` writes them."""
    made = {
        name: pa.array(values, IMAGE) if isinstance(values, list) and isinstance(values[0], dict) else values
        for name, values in columns.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(made), path, row_group_size=rows, **options)
    return str(path)


def rows_of(location: str, columns: dict[Any, str | None] | None = None) -> list[dict[str, Any]]:
    return [
        row
        for unit in tables.units(location)
        for table, _ in tables.read(unit, columns or {}, location)
        for row in tables.objects(table, unit.paths[0], []).to_pylist()
    ]


def objects_of(location: str, columns: dict[Any, str | None] | None = None) -> dict[tuple[str, str], Object]:
    rows = rows_of(location, columns)
    assert {row["reason"] for row in rows} == {""}
    return {(row["key"], row["role"]): Object(row["uri"], -1, row["etag"]) for row in rows}


def contents(listed: dict[tuple[str, str], Object]) -> dict[tuple[str, str], str]:
    reader = Reader(attempts=5, first_wait=0.001)
    reader.expect(listed.values())
    return {name: reader.read(one).decode() for name, one in listed.items()}


def test_bytes_of_every_type_are_named_by_row_and_read(tmp_path: Path) -> None:
    texts = [f"image {n}" for n in range(5)]
    uri = write(
        tmp_path / "t.parquet",
        {
            "id": [f"k{n}" for n in range(5)],
            "struct": [image(text) for text in texts],
            "plain/x": pa.array([text.encode() for text in texts], pa.binary()),
            "large": pa.array([text.encode() for text in texts], pa.large_binary()),
            "view": pa.array([text.encode() for text in texts], pa.binary_view()),
            "dictionary": pa.array([text.encode() for text in texts]).dictionary_encode(),
        },
    )
    roles = {"source": "struct", "target": "plain/x", "label": "large", "instance": "view"}
    columns = {**roles, "features": "dictionary", "key": "id"}
    listed = objects_of(uri, columns)
    assert listed["k2", "target"].uri == f"parquet://0000000003/plain%2Fx::{uri}"
    assert listed["k2", "target"].etag == local_etag(Path(uri).stat())
    assert contents(listed) == {
        (f"k{n}", role): texts[n] for n in range(5) for role in columns if role != "key"
    }


def test_keys_are_a_column_or_the_paths_or_the_numbers_of_the_rows(tmp_path: Path) -> None:
    uri = write(
        tmp_path / "t.parquet",
        {
            "source": [image("a", "x/1.png"), image("b", None), image("c", "../../etc/pass wd.png")],
            "target": [image("d", "other.png"), image("e", "y\\2.png"), image("f", "/z.jpg")],
            "name": ["n1", "", None],
        },
    )
    assert sorted({key for key, _ in objects_of(uri)}) == ["etc/pass wd", "x/1", "y/2"]
    numbered = objects_of(uri, {"source": "source", "target": "target", "key": None})
    assert sorted({key for key, _ in numbered}) == ["t/000001", "t/000002", "t/000003"]
    chosen = objects_of(uri, {"source": "source", "target": "target", "key": "name"})
    assert sorted({key for key, _ in chosen}) == ["etc/pass wd", "n1", "y/2"]
    write(tmp_path / "u.parquet", {"source": [image("a")], "target": [image("b", "")]})
    assert {key for key, _ in objects_of(f"{tmp_path}/u.parquet")} == {"u/000001"}


def test_a_file_that_the_library_of_hugging_face_wrote_is_read() -> None:
    """The file is of `datasets` 5.2.0 (`embed_table_storage`, then `to_parquet`), its images are drawn."""
    uri = str(Path(__file__).with_name("huggingface.parquet"))
    listed = objects_of(uri, {"source": "edges", "target": "photo"})
    expected = {(f"{n}_edges", role) for n in range(3) for role in ("source", "target")}
    assert listed.keys() == expected
    reader = Reader(attempts=1, first_wait=0.0)
    reader.expect(listed.values())
    for (_, role), one in listed.items():
        with Image.open(io.BytesIO(reader.read(one))) as decoded:
            assert (decoded.format, decoded.size) == ("PNG" if role == "source" else "JPEG", (24, 16))


def test_tables_of_a_location_have_the_split_of_their_names(tmp_path: Path) -> None:
    for name in ("train-0", "train-1", "Validation-0"):
        write(tmp_path / f"data/{name}.parquet", {"source": [image(name, "1.png")], "target": [image("t")]})
    write(tmp_path / "data/notes.parquet", {"text": ["no image"]})
    (tmp_path / "data/test-0.parquet").mkdir()
    location = f"{tmp_path}/data/{{split}}-*.parquet"
    rows = rows_of(location, {"source": "source", "target": "target", "key": None})
    assert sorted((row["key"], row["split"]) for row in rows if row["role"] == "source") == [
        ("Validation-0/000001", "val"),
        ("train-0/000001", "train"),
        ("train-1/000001", "train"),
    ]
    by_path = rows_of(f"{tmp_path}/data/{{split}}-{{0..0}}.parquet")
    assert sorted({row["key"] for row in by_path}) == ["Validation/1", "train/1"]
    nested = write(tmp_path / "convert/train/0.parquet", {"source": [image("s")], "target": [image("t")]})
    (row, _) = rows_of(f"{tmp_path}/convert/{{split}}/*.parquet")
    assert (row["key"], row["split"]) == ("train/0/000001", "train")
    assert row["uri"] == f"parquet://0000000001/source::{nested}"
    with pytest.raises(FileNotFoundError):
        tables.units(f"{tmp_path}/data/none-*.parquet")


def test_a_cell_without_bytes_is_a_path_and_a_row_without_both_is_a_reject(tmp_path: Path) -> None:
    uri = write(
        tmp_path / "t.parquet",
        {
            "source": [
                image("a"),
                {"bytes": None, "path": "in/b.png"},
                {"bytes": None, "path": "../c.png"},
                None,
                {"bytes": None, "path": None},
            ],
            "target": [None, image("t"), image("t"), image("t"), {"bytes": None, "path": None}],
            "key": list("abcde"),
        },
        rows=2,
    )
    rows = [
        (r["key"], r["role"], r["uri"].rpartition("/")[0], r["reason"], r["detail"]) for r in rows_of(uri)
    ]
    folder = str(tmp_path)
    assert sorted(rows) == [
        ("a", "source", f"parquet://0000000001/source::{folder}", "", ""),
        ("b", "source", f"{folder}/in", "", ""),
        ("b", "target", f"parquet://0000000002/target::{folder}", "", ""),
        ("c", "source", str(tmp_path.parent), "outside", "line 3, column source"),
        ("c", "target", f"parquet://0000000003/target::{folder}", "", ""),
        ("d", "target", f"parquet://0000000004/target::{folder}", "", ""),
        ("e", "table", folder, "bad_row", "line 5: it has no image"),
    ]


@pytest.mark.parametrize("path", ["parquet://0000000001/source::/etc/x.parquet", "/etc/passwd", "a::b.png"])
def test_a_hostile_path_beside_the_bytes_is_a_name_at_most(tmp_path: Path, path: str) -> None:
    uri = write(tmp_path / "t.parquet", {"source": [image("a", path)], "target": [image("b", path)]})
    for row in rows_of(uri):
        assert row["uri"] == f"parquet://0000000001/{row['role']}::{uri}"
        assert row["reason"] == ("bad_key" if "::" in path else "")
        assert not row["key"].startswith("/")
    without = write(tmp_path / "u.parquet", {"source": [{"bytes": None, "path": path}], "target": ["b.png"]})
    assert [row["reason"] for row in rows_of(without) if row["role"] == "source"] == ["outside"]


def test_a_table_without_statistics_gives_the_same_rows(tmp_path: Path) -> None:
    columns = {"source": [image("a"), {"bytes": None, "path": "b.png"}], "target": [image("c"), image("d")]}
    name = tmp_path / "t.parquet"
    with_them = rows_of(write(name, columns, rows=1))
    without = rows_of(write(name, columns, rows=1, write_statistics=False))
    assert [row["uri"] for row in without] == [row["uri"] for row in with_them]


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        ({}, "there is no column `source` or `target`, only 'id', 'photo' (images), 'mask' (images)"),
        (
            {"source": "image", "target": "mask"},
            "there is no column 'image' (`columns.source`), only 'id', 'photo' (images), 'mask' (images)",
        ),
        ({"source": "id", "target": "mask"}, "column id: it holds int64, and neither paths nor images"),
        ({"source": "photo", "target": "mask", "key": "photo"}, "column photo: it holds struct"),
    ],
)
def test_a_missing_or_wrong_column_is_said_with_the_columns_there_are(
    tmp_path: Path, columns: dict[Any, str | None], complaint: str
) -> None:
    uri = write(tmp_path / "t.parquet", {"id": [1], "photo": [image("a")], "mask": pa.array([b"m"])})
    with pytest.raises(ValueError, match=re.escape(complaint)) as caught:
        rows_of(uri, columns)
    assert "\n" not in str(caught.value)


def test_a_row_group_that_would_fill_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = write(tmp_path / "t.parquet", {"source": [image("a" * 9000)], "target": [image("b")]})
    monkeypatch.setattr(cells, "MOST_BYTES", 8000)
    with pytest.raises(
        ValueError, match=r"column source: row group 0 has .* write fewer rows in a row group"
    ):
        rows_of(uri)


def test_another_version_of_a_table_is_never_read(tmp_path: Path) -> None:
    uri = write(tmp_path / "t.parquet", {"source": [image("a")], "target": [image("b")]})
    listed = objects_of(uri)
    write(tmp_path / "t.parquet", {"source": [image("other")], "target": [image("b")]})
    for one in listed.values():
        with pytest.raises(ImageRejected, match="changed"):
            Reader().read(one)
    Path(uri).unlink()
    for one in listed.values():
        with pytest.raises(ImageRejected, match="missing"):
            Reader().read(one)


def test_cells_that_are_not_there_are_missing(tmp_path: Path) -> None:
    uri = write(
        tmp_path / "t.parquet", {"source": [image("a"), {"bytes": None, "path": None}], "x": ["b", "c"]}
    )
    for place in (
        "0000000002/source",
        "0000000000/source",
        "0000000003/source",
        "0000000001/y",
        "0000000001/x",
    ):
        with pytest.raises(ImageRejected, match="missing"):
            Reader().read(Object(f"parquet://{place}::{uri}"))
    assert Reader().read(Object(f"parquet://1/source::{uri}")) == b"a"


def destroy(uri: str, group: int | None = None) -> None:
    """Overwrite the pages of the first column, in one row group or in all."""
    data, metadata = bytearray(Path(uri).read_bytes()), pq.read_metadata(uri)
    for number in range(metadata.num_row_groups) if group is None else [group]:
        chunk = metadata.row_group(number).column(0)
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    Path(uri).write_bytes(data)


def test_a_damaged_row_group_rejects_its_own_images(tmp_path: Path) -> None:
    texts = {key: key * 500 for key in "abcdef"}
    cell = [image(text) for text in texts.values()]
    uri = write(tmp_path / "t.parquet", {"source": cell, "target": cell, "key": list(texts)})
    listed = {key: Object(one.uri) for (key, role), one in objects_of(uri).items() if role == "source"}
    destroy(uri, group=1)
    reader = Reader(attempts=2, first_wait=0.001)
    reader.expect(listed.values())
    assert {key: reader.read(listed[key]).decode() for key in "abef"} == {key: texts[key] for key in "abef"}
    for key in "cd":
        with pytest.raises(ImageRejected, match="unreadable: row group 1, column source: "):
            reader.read(listed[key])


def test_listing_reads_no_image(tmp_path: Path) -> None:
    cell = [image(f"{n}" * 500, f"{n}.png") for n in range(6)]
    uri = write(tmp_path / "t.parquet", {"source": cell, "target": cell})
    before = [(row["key"], row["uri"]) for row in rows_of(uri)]
    destroy(uri)
    assert [(row["key"], row["uri"]) for row in rows_of(uri)] == before
    assert len(before) == 12


def test_a_table_on_a_file_server_is_read_in_place(tmp_path: Path) -> None:
    cell = [image(f"{n}" * 500, f"{n}.png") for n in range(6)]
    write(tmp_path / "t-0.parquet", {"source": cell, "target": cell})
    with FileServer(tmp_path) as server:
        read = contents(objects_of(f"{server.url}/t-{{0..0}}.parquet"))
    assert read == {(f"{n}", role): f"{n}" * 500 for n in range(6) for role in ("source", "target")}


@pytest.fixture
def proxied(s3_store: SeaweedS3, client_options: None) -> Iterator[FaultProxy]:
    with FaultProxy(s3_store.address, [], seed=1) as proxy:
        storage.configure({"s3": s3_store.options(endpoint=proxy.url)})
        yield proxy


def gets(proxy: FaultProxy) -> int:
    return sum(count for agent, count in proxy.agents.items() if agent.startswith("GET "))


@pytest.mark.s3
def test_each_row_group_of_a_store_is_one_request_whatever_the_order(
    proxied: FaultProxy, s3_store: SeaweedS3, s3_bucket: str, tmp_path: Path
) -> None:
    cell = [image(f"{n:02d}" * 5000, f"{n}.png") for n in range(40)]
    local = write(tmp_path / "t.parquet", {"source": cell, "target": cell}, rows=8)
    s3_store.client().put_file(local, f"{s3_bucket}/data/t.parquet")
    listed = objects_of(f"s3://{s3_bucket}/data/*.parquet")
    assert len(listed) == 80
    names = sorted(listed, key=lambda name: hash((name, 3)))
    before = gets(proxied)
    reader = Reader()
    reader.expect(listed.values())
    for key, role in names:
        assert reader.read(listed[key, role]) == f"{int(key):02d}".encode() * 5000
    assert gets(proxied) - before == 2 * 5 + 1  # of each column five row groups; the footer


@pytest.mark.s3
def test_a_failing_store_rejects_no_cell(
    proxied: FaultProxy, s3_store: SeaweedS3, s3_bucket: str, tmp_path: Path
) -> None:
    cell = [image(f"{n}" * 5000, f"{n}.png") for n in range(8)]
    local = write(tmp_path / "t.parquet", {"source": cell, "target": cell})
    s3_store.client().put_file(local, f"{s3_bucket}/t.parquet")
    listed = objects_of(f"s3://{s3_bucket}/t.parquet")
    proxied.faults = [
        Fault("truncate", times=2, method="GET"),
        Fault("reset", times=2, method="GET"),
        Fault("status", share=0.2, code=503),
    ]
    read = contents(listed)
    assert all(text == key * 5000 for (key, _), text in read.items())
    assert proxied.counts["truncate"]
    assert proxied.counts["reset"]
