"""S3 Inventory, as AWS writes it, in place of a listing."""

from __future__ import annotations

import gzip
import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import pyarrow as pa
import pyarrow.orc
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from stages import ingest, storage
from stages.config.ingest import IngestConfig
from stages.errors import UserError

KEYS = ["photos/a 1+2.png", "photos/ü.png", "photos/sub/", "other/b.png", "photos/c.png", "photos/gone.png"]
SCHEMAS = {
    "CSV": "Bucket, Key, VersionId, IsLatest, IsDeleteMarker, Size, LastModifiedDate, ETag",
    "Parquet": "message s3.inventory { required binary bucket (UTF8); required binary key (UTF8); }",
    "ORC": "struct<bucket:string,key:string,size:bigint,e_tag:string>",
}


def rows() -> list[dict[str, Any]]:
    return [
        {
            "bucket": "b", "key": key, "version_id": "", "is_latest": True, "is_delete_marker": "gone" in key,
            "size": 10 + n, "last_modified_date": "2026-11-28T01:00:00.000Z", "e_tag": f"tag{n}",
        }
        for n, key in enumerate(KEYS)
    ] + [{**dict.fromkeys(("bucket", "version_id", "last_modified_date"), "x"), "key": "photos/c.png",
          "is_latest": False, "is_delete_marker": False, "size": 1, "e_tag": "old"}]  # fmt: skip


def write_inventory(folder: Path, kind: str, *, bucket: str = "b") -> str:
    """An inventory of `rows` in two data files; returns its manifest's URI."""
    (folder / "data").mkdir(parents=True)
    (folder / "2026-11-28T01-00Z").mkdir()
    files = []
    for n, part in enumerate((rows()[:3], rows()[3:])):
        path = folder / "data" / f"{n}.{kind.lower()}"
        table = pa.Table.from_pylist(part)
        if kind == "Parquet":
            pq.write_table(table, path)
        elif kind == "ORC":
            pa.orc.write_table(table, path)
        else:
            lines = [
                ",".join(
                    '"' + (quote_plus(v, safe="/") if k == "key" else str(v).lower()) + '"'
                    for k, v in row.items()
                )
                for row in part
            ]
            path.write_bytes(gzip.compress("\n".join(lines).encode() + b"\n"))
        checksum = hashlib.md5(path.read_bytes()).hexdigest()  # noqa: S324 - as AWS does
        key = f"inventories/b/daily/data/{path.name}"
        files.append({"key": key, "size": path.stat().st_size, "MD5checksum": checksum})
    manifest = {
        "sourceBucket": bucket, "destinationBucket": "arn:aws:s3:::elsewhere", "version": "2016-11-30",
        "fileFormat": kind, "fileSchema": SCHEMAS[kind], "files": files,
    }  # fmt: skip
    uri = folder / "2026-11-28T01-00Z" / "manifest.json"
    uri.write_text(json.dumps(manifest))
    return str(uri)


def config(manifest: str, uri: str = "s3://b/photos", **values: Any) -> IngestConfig:
    return IngestConfig.model_validate(
        {"locations": [{"uri": uri, "role": "target", "inventory": manifest, **values}]}
    )


def listed(config: IngestConfig, output: Path) -> list[tuple[str, str, int, str]]:
    unit = partial(ingest.list_unit, config=config, output=str(output), requests=2)
    listing = ingest.list_units(ingest.units(config), unit=unit)
    tables = [storage.read_parquet(f"{output}/{name}") for name in listing.files if "objects" in name]
    found = [(r["key"], r["uri"], r["size"], r["etag"]) for table in tables for r in table.to_pylist()]
    return sorted(found)


@pytest.mark.parametrize("kind", SCHEMAS)
def test_an_inventory_lists_what_is_below_the_location(tmp_path: Path, kind: str) -> None:
    manifest = write_inventory(tmp_path / "daily", kind)
    assert listed(config(manifest, pattern="{key}.png"), tmp_path / "out") == [
        ("a 1+2", "s3://b/photos/a 1+2.png", 10, "tag0"),
        ("c", "s3://b/photos/c.png", 14, "tag4"),
        ("ü", "s3://b/photos/ü.png", 11, "tag1"),
    ]


def test_only_the_manifest_is_read_to_see_that_nothing_changed(tmp_path: Path) -> None:
    manifest = write_inventory(tmp_path / "daily", "Parquet")
    before = ingest.survey(config(manifest))
    for file in (tmp_path / "daily" / "data").iterdir():
        file.unlink()
    assert ingest.survey(config(manifest)) == before
    Path(manifest).write_text(Path(manifest).read_text() + "\n")
    assert ingest.survey(config(manifest)) != before


def test_an_inventory_that_is_none_or_of_another_bucket_or_damaged_is_refused(tmp_path: Path) -> None:
    other = write_inventory(tmp_path / "other", "Parquet", bucket="x")
    with pytest.raises(
        UserError, match=r"locations\.0\.uri: s3://b/photos: .*it lists the bucket x, and not b"
    ):
        ingest.units(config(other))
    with pytest.raises(UserError, match=r"no/manifest\.json: there is no such manifest"):
        ingest.survey(config(str(tmp_path / "no" / "manifest.json")))
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match="not a manifest of S3 Inventory"):
        ingest.units(config(str(tmp_path / "manifest.json")))
    manifest = write_inventory(tmp_path / "daily", "CSV")
    file = tmp_path / "daily" / "data" / "0.csv"
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(UserError, match=r"0\.csv: it differs from the file that the manifest names"):
        listed(config(manifest), tmp_path / "out")


@pytest.mark.parametrize("change", [{"inventory": "s3://b/x.json"}, {"uri": "/data"}, {"role": "table"}])
def test_an_inventory_needs_a_bucket_and_a_manifest(change: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="inventory"):
        config(
            **{"manifest": "s3://b/i/manifest.json", "uri": "s3://b/p.csv"}
            | {{"inventory": "manifest"}.get(k, k): v for k, v in change.items()}
        )
