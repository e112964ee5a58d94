"""Rows from listed objects, their digest, and the wiring."""

from __future__ import annotations

import json
import os
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from stages import ingest, pair, storage
from stages.base import Resources
from stages.config.ingest import IngestConfig, LocationConfig
from stages.errors import UserError
from stages.ingest import LocationUnit
from stages.objects import Listed
from stages.objects.digest import no_rows, spell
from stages.objects.listing import Unit
from stages.tracking.run import Run
from tests.stores.faults import Fault, FaultProxy
from tests.stores.files import FileServer
from tests.stores.seaweed import SeaweedS3
from tests.support.pairs import scatter_and_gather


def config(*locations: dict[str, Any]) -> IngestConfig:
    return IngestConfig.model_validate({"locations": locations})


def location(**values: Any) -> LocationConfig:
    return LocationConfig.model_validate({"uri": "/data", "role": "target"} | values)


def listed(*paths: str, fault: str = "") -> list[Listed]:
    return [Listed(path, f"/data/{path}", 5, "v1", fault) for path in paths]


def make_files(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


# -- rules --------------------------------------------------------------------


def test_an_object_becomes_a_row() -> None:
    objects, rejects, ignored = ingest.rows(
        location(pattern="{split}/{group}_{key}.png"), 3, listed("Train/oslo_1.png", "README.md")
    )
    assert objects.to_pylist() == [
        {
            "key": "Train/oslo/1", "role": "target", "split": "train", "group": "oslo", "x": None, "y": None,
            "uri": "/data/Train/oslo_1.png", "size": 5, "etag": "v1", "location": 3,
        }
    ]  # fmt: skip
    assert (rejects.num_rows, ignored) == (0, 1)


@pytest.mark.parametrize(
    "path", ["a/../../b.png", "a\nb.png", "x" * 600 + ".png", "a//b.png", "tar://a::b.png"]
)
def test_hostile_names_are_rejects_with_a_reason(path: str) -> None:
    objects, rejects, ignored = ingest.rows(location(), 0, listed(path, "good.png"))
    assert objects["key"].to_pylist() == ["good"]
    assert rejects["reason"].to_pylist() == ["bad_key"]
    assert ignored == 0


def test_a_member_whose_folder_has_the_mark_of_a_chain_is_a_reject() -> None:
    archive = location(uri="/data/a.zip", pattern="*/{key}.png")
    _, rejects, _ = ingest.rows(archive, 0, listed("a::b/1.png"))
    assert rejects["reason"].to_pylist() == ["bad_key"]


def test_members_that_are_links_are_rejects() -> None:
    _, rejects, _ = ingest.rows(location(), 0, listed("a.png", fault="link"))
    assert rejects["reason"].to_pylist() == ["link"]


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"pattern": "{nope}.png"}, "pattern"),
        ({"uri": ""}, "uri"),
        ({"uri": "tar://x.png"}, "uri"),
        ({"role": "photo"}, "role"),
        ({"role": "table", "uri": "/data/pairs.xlsx"}, "table ends in"),
        ({"within": ["/x"]}, "for tables"),
        ({"columns": {"source": "x"}}, "`columns` is for tables"),
        ({"role": "table", "uri": "/data/t.parquet", "columns": {"key": "x"}}, "neither source nor target"),
        ({"role": "table", "uri": "/t.parquet", "columns": {"source": "x", "target": "X "}}, "column twice"),
        ({"role": "table", "uri": "/{split}/{split}.parquet"}, "{split} twice"),
    ],
)
def test_a_location_that_cannot_be_is_refused(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        location(**values)


def test_a_chain_is_made_independent_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ingest.root(location(uri="data/x")) == f"{tmp_path}/data/x"
    assert ingest.root(location(uri="tar://train::data/x.tar")) == f"tar://train::{tmp_path}/data/x.tar"
    assert ingest.root(location(uri="s3://bucket/x")) == "s3://bucket/x"
    assert ingest.root(location(uri=f"file://{tmp_path}/x")) == f"{tmp_path}/x"


# -- the digest ---------------------------------------------------------------


def test_the_digest_changes_with_every_object_and_with_nothing_else(tmp_path: Path) -> None:
    make_files(tmp_path, *(f"{folder}/{number}.png" for folder in "abc" for number in range(5)))
    listed = config({"uri": str(tmp_path), "role": "target"})
    first = ingest.survey(listed)
    assert ingest.survey(listed) == first
    make_files(tmp_path, "notes.md")
    assert ingest.survey(listed) == first, "what no pattern speaks of does not count"
    stat = (tmp_path / "a/1.png").stat()
    (tmp_path / "a/1.png").write_bytes(b"another")
    changed = ingest.survey(listed)
    assert changed != first
    (tmp_path / "a/1.png").write_bytes(b"x")
    os.utime(tmp_path / "a/1.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert ingest.survey(listed) == first
    (tmp_path / "b/2.png").rename(tmp_path / "b/7.png")
    assert ingest.survey(listed) not in (first, changed)


def test_the_digest_does_not_depend_on_how_the_location_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_files(tmp_path, *(f"{folder}/{number}.png" for folder in "abc" for number in range(5)))
    listed = config({"uri": str(tmp_path), "role": "target"})
    first = ingest.survey(listed)
    monkeypatch.setattr(ingest, "UNITS_PER_LOCATION", 1)
    monkeypatch.setattr(ingest, "ROWS_PER_BATCH", 2)
    assert ingest.survey(listed) == first


def test_a_table_that_changes_changes_the_digest(tmp_path: Path) -> None:
    table = tmp_path / "pairs.csv"
    table.write_text("source,target\na.png,b.png\n")
    listed = config({"uri": str(table), "role": "table"})
    first = ingest.survey(listed)
    assert ingest.survey(listed) == first
    table.write_text("source,target\na.png,c.png\nd.png,e.png\n")
    assert ingest.survey(listed) != first


def test_tables_that_hold_images_change_the_digest_whatever_changes(tmp_path: Path) -> None:
    table = pa.table({"source": [b"a", b"b"], "target": [b"c", b"d"]})
    pq.write_table(table, tmp_path / "train-0.parquet", row_group_size=1)
    every = config({"uri": f"{tmp_path}/*.parquet", "role": "table"})
    alone = config({"uri": f"{tmp_path}/train-0.parquet", "role": "table"})
    seen = {name: [ingest.survey(one).digest] for name, one in (("every", every), ("alone", alone))}
    assert [ingest.survey(every).digest, ingest.survey(alone).digest] == [seen["every"][0], seen["alone"][0]]
    pq.write_table(table, tmp_path / "train-1.parquet")
    seen["every"].append(ingest.survey(every).digest)
    pq.write_table(pa.table({"source": [b"a", b"x"], "target": [b"c", b"d"]}), tmp_path / "train-0.parquet")
    seen["every"].append(ingest.survey(every).digest)
    seen["alone"].append(ingest.survey(alone).digest)
    assert len(set(seen["every"])) == 3
    assert len(set(seen["alone"])) == 2


def test_a_config_without_columns_keeps_its_fingerprint() -> None:
    assert "columns" not in location().model_dump(mode="json")
    named = location(role="table", uri="/data/t.parquet", columns={"source": "a", "key": None})
    assert named.model_dump(mode="json")["columns"] == {"source": "a", "key": None}


def test_a_table_that_is_damaged_cut_off_or_empty_is_one_line_with_its_name(tmp_path: Path) -> None:
    for name in ("train-0", "train-1"):
        pq.write_table(pa.table({"source": [b"a"], "target": [b"b"]}), tmp_path / f"{name}.parquet")
    whole = (tmp_path / "train-1.parquet").read_bytes()
    for data in (b"", b"no table", whole[:-20]):
        (tmp_path / "train-1.parquet").write_bytes(data)
        with pytest.raises(UserError, match=r"^ingest\.locations\.0\.uri: .*/train-1\.parquet: ") as caught:
            list_all(config({"uri": f"{tmp_path}/*.parquet", "role": "table"}), str(tmp_path / "out"))
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError, match=r"^ingest\.locations\.0\.uri: .*/train-1\.parquet: "):
            ingest.survey(config({"uri": f"{tmp_path}/train-1.parquet", "role": "table"}))
    none = pa.table({"source": pa.array([], pa.binary()), "target": pa.array([], pa.binary())})
    pq.write_table(none, tmp_path / "train-1.parquet")
    empty = config({"uri": f"{tmp_path}/train-1.parquet", "role": "table"})
    with pytest.raises(UserError, match="there is nothing in it"):
        ingest.check(empty, list_all(empty, str(tmp_path / "out")))


def test_a_location_that_is_not_there_is_named(tmp_path: Path) -> None:
    make_files(tmp_path, "a.png")
    listed = config({"uri": str(tmp_path), "role": "source"}, {"uri": f"{tmp_path}/none", "role": "target"})
    with pytest.raises(UserError, match=r"^ingest\.locations\.1\.uri: .*/none: there is no such"):
        ingest.survey(listed)


# -- one unit -----------------------------------------------------------------


def list_all(listed: IngestConfig, output: str) -> ingest.Listing:
    """What the tasks do, in this process."""
    unit = partial(ingest.list_unit, config=listed, output=output, requests=4)
    return ingest.list_units(ingest.units(listed), unit=unit)


def read(folder: Path, prefix: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob(f"{prefix}-*.parquet")))


def test_a_unit_writes_files_of_bounded_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "ROWS_PER_FILE", 10)
    monkeypatch.setattr(ingest, "ROWS_PER_BATCH", 4)
    monkeypatch.setattr("stages.objects.listing.PAGE", 4)
    make_files(tmp_path / "data", *(f"{number}.png" for number in range(30)))
    unit = LocationUnit(7, 0, Unit("tree"))
    listed = config({"uri": f"{tmp_path}/data", "role": "target"})
    listing = ingest.list_unit(unit, config=listed, output=str(tmp_path / "out"), requests=1)
    assert listing.files == {
        f"objects-00007-{number:04d}.parquet": rows for number, rows in enumerate((12, 12, 6))
    }
    assert sorted(read(tmp_path / "out", "objects")["key"].to_pylist()) == sorted(map(str, range(30)))


def test_a_location_of_which_nothing_can_be_used_says_why(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("source,target\n/x/a.png,b.png,c\n/x/a.png,../b.png\n")
    listed = config({"uri": f"{tmp_path}/pairs.csv", "role": "table"})
    listing = list_all(listed, f"{tmp_path}/out")
    with pytest.raises(
        UserError, match=r"none of its 3 .*/x/a.png \(outside, line 3, column source\); .*b.png \("
    ) as info:
        ingest.check(listed, listing)
    assert "pairs.csv (bad_row, line 2: it has 3 cells, the header 2: /x/a.png,b.png,c)" in str(info.value)


def test_a_table_gives_objects_of_several_roles(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("key,source,target\nk,a.png,../b.png\nbroken\n")
    listed = config({"uri": f"{tmp_path}/pairs.csv", "role": "table"})
    listing = list_all(listed, str(tmp_path / "out"))
    assert listing.counts[0] == {
        "listed": 3, "ignored": 0, "objects": 1, "rejected": 2, "bytes": 0,
        "role_source": 1, "reject_outside": 1, "reject_bad_row": 1,
    }  # fmt: skip
    (row,) = read(tmp_path / "out", "objects").to_pylist()
    assert (row["key"], row["uri"], row["size"], row["etag"]) == ("k", f"{tmp_path}/a.png", -1, "")


@pytest.mark.parametrize("ranges", [True, False])
def test_a_published_archive_loads_by_its_url(tmp_path: Path, ranges: bool) -> None:
    make_files(tmp_path / "facades", "train/1.jpg", "train/2.jpg", "val/3.jpg", "._val/3.jpg")
    with tarfile.open(tmp_path / "facades.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "facades", "facades")
    with FileServer(tmp_path, ranges=ranges) as server:
        uri = f"tar://facades::{server.url}/facades.tar.gz"
        list_all(config({"uri": uri, "role": "pair", "pattern": "{split}/{key}.jpg"}), str(tmp_path / "out"))
    rows = {row["key"]: row for row in read(tmp_path / "out", "objects").to_pylist()}
    assert set(rows) == {"train/1", "train/2", "val/3"}
    assert rows["val/3"]["uri"] == f"tar://facades/val/3.jpg::{server.url}/facades.tar.gz"
    assert rows["val/3"]["split"] == "val"
    assert "@" in rows["val/3"]["etag"]


def test_an_archive_that_is_damaged_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.tar.gz").write_bytes(b"not gzip")
    with pytest.raises(UserError, match=r"ingest\.locations\.0\.uri: .*x\.tar\.gz: "):
        ingest.survey(config({"uri": f"{tmp_path}/x.tar.gz", "role": "pair"}))


@pytest.mark.s3
def test_a_bucket_is_listed_and_paired_in_the_bucket_through_faults(
    s3_store: SeaweedS3, s3_bucket: str, client_options: None
) -> None:
    """A fifth of the requests is answered 503, and of the writes that did happen 500: no row is lost."""
    client = s3_store.client()
    names = [f"{number:02d}" for number in range(40)]
    for name in names:
        client.pipe_file(f"{s3_bucket}/data/{name}_photo.png", b"photo")
        client.pipe_file(f"{s3_bucket}/data/{name}_label.png", b"label")
    faults = [
        Fault("status_after", times=2, method="PUT", code=500, error="InternalError"),
        Fault("status", share=0.2),
    ]
    listed = config(
        {"uri": f"s3://{s3_bucket}/data", "role": "source", "pattern": "{key}_label.png"},
        {"uri": f"s3://{s3_bucket}/data", "role": "target", "pattern": "{key}_photo.png"},
    )
    work = f"s3://{s3_bucket}/work"
    with FaultProxy(s3_store.address, faults, seed=3) as proxy:
        storage.configure({"s3": s3_store.options(endpoint=proxy.url)})
        files = sorted(list_all(listed, work).files)
        joined = scatter_and_gather(
            files, work, work, partitions=1, roles=("source", "target"), config=pair.PairConfig()
        )
        print(f"faults: {proxy.counts}")
        assert proxy.counts["status"]
        assert proxy.counts["status_after"]
        pairs = storage.read_parquet(f"{work}/part-00000.parquet")
    assert joined.counts == {"train": 40}
    assert pairs["key"].to_pylist() == names
    assert pairs["source_size"].to_pylist() == [5] * 40
    etags = {client.info(f"{s3_bucket}/data/00_photo.png")["ETag"].strip('"')}
    assert set(pairs["target_etag"].to_pylist()) == etags


@pytest.mark.s3
def test_a_place_that_cannot_be_written_is_an_error_not_a_loss(
    s3_store: SeaweedS3, s3_bucket: str, client_options: None, tmp_path: Path
) -> None:
    make_files(tmp_path, "a.png")
    storage.configure({"s3": s3_store.options(read_only=True)})
    listed = config({"uri": str(tmp_path), "role": "target"})
    complaint = rf"^s3://{s3_bucket}/work/objects-00000-0000\.parquet: access denied"
    with pytest.raises(UserError, match=complaint):
        list_all(listed, f"s3://{s3_bucket}/work")


# -- wiring -------------------------------------------------------------------


def run(listed: IngestConfig, output: Path) -> Any:
    return ingest.run(listed, Resources(), output=str(output), track=Run())


@pytest.mark.ray
def test_locations_are_listed_and_again_to_the_same_end(ray_local: None, tmp_path: Path) -> None:
    make_files(
        tmp_path / "photo", *(f"{city}/{number}.jpg" for city in ("oslo", "bern") for number in range(6))
    )
    make_files(
        tmp_path / "label", *(f"{city}/{number}.png" for city in ("oslo", "bern") for number in range(5))
    )
    make_files(tmp_path / "label", "oslo/bad\n.png", "README.md")
    listed = config(
        {"uri": f"{tmp_path}/photo", "role": "target", "pattern": "{group}/{key}.jpg"},
        {"uri": f"{tmp_path}/label", "role": "source", "pattern": "{group}/{key}.png"},
    )
    output = tmp_path / "objects"
    outcome = run(listed, output)
    assert outcome.counts == {
        "locations": 2, "listed": 24, "ignored": 1, "objects": 22, "rejected": 1,
        "role_target": 12, "role_source": 10, "reject_bad_key": 1,
    }  # fmt: skip
    listing = json.loads((output / "_listing.json").read_text())
    assert listing["roles"] == {"target": 12, "source": 10}
    assert listing["rejected"] == 1
    assert sum(listing["files"].values()) == 22
    assert set(listing["files"]) == {path.name for path in output.glob("objects-*")}
    first = {path.name: path.read_bytes() for path in output.iterdir()}
    (output / "objects-00099-0000.parquet").write_bytes(b"left by a killed run of another cut")
    run(listed, output)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == first
    alone = ingest.list_units(ingest.units(listed), unit=partial(ingest.survey_unit, config=listed))
    sums, counts = sum(alone.sums.values(), no_rows()), alone.total
    seen = ingest.survey(listed)
    assert seen.digest == spell(sums, 23)  # in tasks, and in this process
    assert seen.counts == counts
    assert (counts["objects"], counts["role_source"], counts["rejected"]) == (22, 10, 1)
    sizes = [pq.read_table(path)["size"].to_numpy().sum() for path in output.glob("objects-*")]
    assert counts["bytes"] == sum(sizes)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("files", "pattern", "complaint"),
    [
        ([], "{key}.*", r"ingest\.locations\.0\.uri: .* nothing in it"),
        (
            ["a.jpg", "b.jpg"],
            "{key}.png",
            r"ingest\.locations\.0\.pattern: '{key}.png' matches none of the 2",
        ),
    ],
)
def test_a_location_that_gives_nothing_is_the_users_error(
    ray_local: None, tmp_path: Path, files: list[str], pattern: str, complaint: str
) -> None:
    make_files(tmp_path / "data", "x", *files)
    (tmp_path / "data" / "x").unlink()
    with pytest.raises(UserError, match=complaint):
        run(config({"uri": f"{tmp_path}/data", "role": "target", "pattern": pattern}), tmp_path / "objects")


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [("{key}.png", "{key}_mask.png"), ("{key}.*", "{key}_mask.*"), ("{key}.png", "{key}_mask.*")],
)
def test_what_a_narrower_pattern_of_the_folder_matches_is_not_the_wider_locations(
    wide: str, narrow: str, tmp_path: Path
) -> None:
    for name in ("1.png", "1_mask.png", "2.png", "2_mask.png", "3.png"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"x")
    uri = str(tmp_path / "in")
    listed = config(
        {"uri": uri, "role": "target", "pattern": wide},
        {"uri": f"{uri}/", "role": "source", "pattern": narrow},
    )
    list_all(listed, f"{tmp_path}/out")
    found = [
        row for table in (tmp_path / "out").glob("objects-*") for row in pq.read_table(table).to_pylist()
    ]
    assert sorted((row["role"], row["key"]) for row in found) == [
        ("source", "1"), ("source", "2"), ("target", "1"), ("target", "2"), ("target", "3")
    ]  # fmt: skip


def test_a_suffix_that_is_written_out_is_narrower_than_any_suffix() -> None:
    both = config(
        {"uri": "/data", "role": "source", "pattern": "{key}.png"},
        {"uri": "/data/", "role": "target", "pattern": "{key}.*"},
    )
    assert [ingest.narrower(both, index) for index in (0, 1)] == [[], ["{key}.png"]]
