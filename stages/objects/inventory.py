"""S3 Inventory: the daily listing that a store writes of a bucket, read in place of listing the bucket.

in:  manifest.json of one day, as AWS writes it, and its data files (Parquet, CSV or ORC)
out: `units`: one a data file; `list_objects`: those below a location in a data file; `version`: the
     manifest's checksum, since neither a manifest nor its data change

AWS keeps `<inventory>/<day>/manifest.json` and the data of all days in `<inventory>/data/`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.orc
import pyarrow.parquet as pq

from stages.base import absolute
from stages.objects import Listed
from stages.objects.listing import Unit
from stages.storage import read_bytes
from stages.storage.local import local_file

ROWS = 16_000  # that are in memory at once
_COLUMNS = {
    "key": "key",
    "size": "size",
    "etag": "etag",
    "islatest": "latest",
    "isdeletemarker": "deleted",
}  # in a schema's spelling, without case and underscores: ETag of CSV files, e_tag of the others


def version(uri: str) -> str:
    """The checksum of a manifest: it is another one if the store listed the bucket again."""
    return hashlib.md5(_bytes(uri), usedforsecurity=False).hexdigest()


def _bytes(uri: str) -> bytes:
    try:
        return read_bytes(absolute(uri))
    except FileNotFoundError as error:
        raise ValueError(f"{uri}: there is no such manifest") from error


def _manifest(uri: str) -> dict[str, Any]:
    """A manifest. Raises ValueError if it is none."""
    content = json.loads(_bytes(uri))
    if not isinstance(content, dict) or not {"sourceBucket", "fileFormat", "files"} <= content.keys():
        raise ValueError(
            f"{uri}: not a manifest of S3 Inventory: it has no sourceBucket, fileFormat and files"
        )
    if content["fileFormat"].lower() not in _READERS:
        raise ValueError(f"{uri}: its fileFormat {content['fileFormat']!r} is not CSV, ORC or Parquet")
    return content


def units(uri: str, location: str) -> list[Unit]:
    """The units of an inventory: a data file each.

    Raises ValueError if it is of another bucket than the location.
    """
    manifest = _manifest(uri)
    bucket = location.removeprefix("s3://").partition("/")[0]
    if manifest["sourceBucket"] != bucket:
        raise ValueError(f"{uri}: it lists the bucket {manifest['sourceBucket']}, and not {bucket}")
    return [Unit("inventory", (file["key"],)) for file in manifest["files"]]


def list_objects(uri: str, unit: Unit, location: str) -> Iterator[Listed]:
    """The objects below a location that a data file lists.

    Raises FileNotFoundError if the file is gone; ValueError if it is another one than the manifest names.
    """
    manifest = _manifest(uri)
    (key,) = unit.paths
    (file,) = (file for file in manifest["files"] if file["key"] == key)
    source = f"{absolute(uri).rsplit('/', 2)[0]}/data/{key.rpartition('/')[2]}"
    with local_file(source) as path:
        if file.get("MD5checksum") and _md5(path) != file["MD5checksum"]:
            raise ValueError(f"{source}: it differs from the file that the manifest names (MD5checksum)")
        read = _READERS[manifest["fileFormat"].lower()]
        for table in read(path, manifest.get("fileSchema", "")):
            for start in range(0, table.num_rows, ROWS):
                yield from _below(table.slice(start, ROWS), location)


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _parquet(path: Path, _: str) -> Iterator[pa.Table]:
    with pq.ParquetFile(path) as file:
        columns = [name for name in file.schema_arrow.names if _spelt(name) in _COLUMNS]
        for batch in file.iter_batches(ROWS, columns=columns):
            yield pa.Table.from_batches([batch])


def _orc(path: Path, _: str) -> Iterator[pa.Table]:
    file = pa.orc.ORCFile(path)
    columns = [name for name in file.schema.names if _spelt(name) in _COLUMNS]
    for stripe in range(file.nstripes):
        yield pa.Table.from_batches([file.read_stripe(stripe, columns=columns)])


def _csv(path: Path, schema: str) -> Iterator[pa.Table]:
    names = [name.strip() for name in schema.split(",")]
    text = dict.fromkeys(names, pa.string())
    with gzip.open(path) as file:
        options = {
            "read_options": pa.csv.ReadOptions(column_names=names),
            "convert_options": pa.csv.ConvertOptions(column_types=text, strings_can_be_null=False),
        }
        for batch in pa.csv.open_csv(file, **options):
            table = pa.Table.from_batches([batch])
            key = next(name for name in names if _spelt(name) == "key")
            coded = table[key].combine_chunks()
            place = pc.match_substring_regex(coded, "[%+]")
            plain = pa.array([unquote_plus(one) for one in coded.filter(place).to_pylist()], pa.string())
            keys = pc.replace_with_mask(coded, place, plain)
            yield table.set_column(names.index(key), key, keys)


_READERS = {"parquet": _parquet, "orc": _orc, "csv": _csv}


def _spelt(name: str) -> str:
    return re.sub("_", "", name).lower()


def _below(rows: pa.Table, location: str) -> Iterator[Listed]:
    """The objects below a location: the newest versions that are not deleted."""
    bucket, _, prefix = location.removeprefix("s3://").rstrip("/").partition("/")
    prefix = f"{prefix}/" if prefix else ""
    names = {_COLUMNS[_spelt(name)]: name for name in rows.column_names if _spelt(name) in _COLUMNS}
    table = pa.table({name: rows[written] for name, written in names.items()})
    keep = pc.and_(pc.starts_with(table["key"], prefix), pc.invert(pc.ends_with(table["key"], "/")))
    for name, wanted in (("latest", "true"), ("deleted", "false")):
        if name in names:
            said = pc.utf8_lower(table[name].cast(pa.string()))
            keep = pc.and_(keep, pc.fill_null(pc.equal(said, wanted), True))
    table = table.filter(keep)
    keys: Sequence[str] = table["key"].to_pylist()
    sizes = table["size"].to_pylist() if "size" in names else [-1] * len(keys)
    etags = table["etag"].to_pylist() if "etag" in names else [""] * len(keys)
    for key, size, etag in zip(keys, sizes, etags, strict=True):
        number = -1 if size in (None, "") else int(size)
        yield Listed(key[len(prefix) :], f"s3://{bucket}/{key}", number, (etag or "").strip('"'))
