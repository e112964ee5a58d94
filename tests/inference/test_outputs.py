"""Names of generated images."""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pytest
from hypothesis import given, strategies as st

from stages import storage
from stages.inference import outputs
from stages.inference.outputs import MAX_SEGMENT, finished_units, output_name, part_uri
from stages.objects.fetch import Object, Reader
from stages.objects.listing import list_objects, split_location
from stages.storage import write_bytes
from tests.stores.seaweed import SeaweedS3

ODD = ["Größe", "a(b)", "写真/1", "#1 & 2", "it's [x]{y}", "a;b!$@", "50=~^`"]


def test_plain_keys_keep_their_names() -> None:
    assert output_name("test/aachen/aachen_000001", ".png") == "images/test/aachen/aachen_000001.png"
    assert output_name("a b-c+d=e", ".jpg", sample=2) == "samples/2/a b-c+d=e.jpg"
    for key in ODD:
        assert output_name(key, ".png") == f"images/{key}.png"


@pytest.mark.s3
def test_odd_names_are_names_in_a_store_and_on_this_machine(
    s3_store: SeaweedS3, s3_bucket: str, client_options: None, tmp_path: Path
) -> None:
    storage.configure({"s3": s3_store.options()})
    for folder in (f"s3://{s3_bucket}/out", str(tmp_path)):
        for key in ODD:
            write_bytes(uri := storage.join(folder, output_name(key, ".png")), key.encode())
            assert Reader().read(Object(uri)) == key.encode()
        units = split_location(folder, want=2)
        listed = [one.path for unit in units for one in list_objects(folder, unit)]
        assert sorted(listed) == sorted(f"images/{key}.png" for key in ODD)


@pytest.mark.parametrize(
    "key", ["../../etc/passwd", "..", ".", "a//b", "/abs", "C:\\x", "a\x00b", "é\u202e", "~root"]
)
def test_a_hostile_key_stays_in_its_folder(key: str) -> None:
    parts = PurePosixPath(output_name(key, ".png")).parts
    assert parts[0] == "images"
    assert not any(part in {"..", ".", ""} or part.startswith(".") for part in parts)
    assert output_name(key, ".png").isprintable()


@given(st.text(max_size=400), st.text(max_size=400))
def test_two_keys_never_get_one_name(one: str, other: str) -> None:
    assert (one == other) == (output_name(one, ".png") == output_name(other, ".png"))
    assert all(len(part.encode()) <= MAX_SEGMENT + 8 for part in output_name(one, ".png").split("/"))


def test_no_image_has_the_path_of_the_folder_of_another() -> None:
    assert output_name("a", ".png") == "images/a.png"
    assert output_name("a.png/b.png", ".png", 1) == "samples/1/a%2Epng/b.png.png"
    assert output_name("a%2Epng/b", ".png") == "images/a%252Epng/b.png"
    assert output_name("v1.0/a.png/b", ".jpg") == "images/v1.0/a.png/b.jpg"  # as before


def test_long_segments_that_begin_alike_differ() -> None:
    assert output_name("x" * 400, ".png") != output_name("x" * 401, ".png")


def test_only_whole_table_parts_count_as_finished(tmp_path) -> None:
    for name in (
        part_uri(str(tmp_path), 7),
        f"{tmp_path}/table/.part-00008.parquet.x.partial",
        f"{tmp_path}/table/part-x.parquet",
    ):
        write_bytes(name, b"x")
    assert finished_units(str(tmp_path)) == {7}


def test_a_resumed_run_counts_finished_units_and_reads_no_part_of_a_finished_thousand(tmp_path: Path) -> None:
    output, units = str(tmp_path), 1002
    for unit in (0, 1000):
        rows = [{"key": f"{unit}/{n}", "error": "empty: no bytes" if n else None} for n in range(3)]
        storage.write_parquet(outputs.part_uri(output, unit), pa.Table.from_pylist(rows, schema=outputs.ROWS))
    counts = outputs.UnitCounts(output, units)
    assert counts.total == {"images": 2, "error_empty": 4}
    assert counts.finished.left == set(range(1002)) - {0, 1000}
    for unit in range(1, 1000):
        Path(outputs.part_uri(output, unit)).touch()
        counts.add(unit, Counter(images=1))
    Path(outputs.part_uri(output, 0)).write_bytes(b"not read")
    again = outputs.UnitCounts(output, units)
    assert again.total == counts.total == {"images": 1001, "error_empty": 4}
    assert again.finished.left == {1001}
