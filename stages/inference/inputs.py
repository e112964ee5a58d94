"""The inputs of batch inference, cut into work units that are the same whenever and wherever they are done.

in:  shards: a unit is a range of row groups of one file of the split
     a folder, bucket, archive or Parquet table, of {key, uri[, instance]} or of the images themselves: its
     listing is written to `plan/` once, so that a rerun continues with the same units; a unit is `UNIT_ROWS`
     rows of it
out: unit -> Item, Item, ...   each with its key; `load` fetches and decodes its images, from any thread
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any
from weakref import finalize

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages import storage
from stages.base import Role, Split
from stages.config.infer import InferConfig
from stages.config.locations import FORMATS, Column, compile_pattern
from stages.errors import UserError
from stages.images import decode, geometry, geotiff
from stages.images.geotiff import Tags, TiffRows
from stages.images.kinds import Array, ImageRejected
from stages.models.architecture import Picture
from stages.objects import cells, listing, patterns, tables
from stages.objects.digest import Uint64s, key_hashes, no_rows, row_sums, spell
from stages.objects.fetch import Object, Reader
from stages.objects.tables import Columns
from stages.parallel.threads import Prefetch
from stages.shards import dataset
from stages.shards.dataset import DatasetSpec, RoleSpec
from stages.shards.row_groups import read_unit
from stages.storage.local import local_file

UNIT_ROWS = 64
LISTERS = 8  # parts of a location that are listed at the same time
UNITS_PER_CHUNK = 256  # of the plan: one small Parquet file with a row group a unit

PLAN = pa.schema(
    {
        "key": pa.string(),
        "uri": pa.string(),
        "size": pa.int64(),
        "etag": pa.string(),
        "instance": pa.string(),
        "error": pa.string(),
    }
)


@dataclass(frozen=True, slots=True)
class InputImages:
    """A decoded input: source (H, W, C) of the model's kind, and the map of instance ids it may need."""

    source: Array | TiffRows
    """An array, or a file whose rows are read when they are needed."""
    instance: Array | None = None
    tags: Tags = ()
    """Of the source's file: where it is on Earth."""


@dataclass(frozen=True, slots=True)
class Item:
    """One input. `load` raises ImageRejected if it cannot be used."""

    key: str
    uri: str
    load: Callable[[], InputImages]


@dataclass(frozen=True, slots=True)
class RowGroupRange:
    """Row groups `start` up to `stop` of a split's shard file."""

    split: Split
    name: str
    start: int
    stop: int


def shard_units(spec: DatasetSpec, split: Split) -> list[RowGroupRange]:
    """The units of a split: whole row groups, together `UNIT_ROWS` rows or more where the file has them."""
    return [
        RowGroupRange(split, file.name, start, stop)
        for file in spec.splits.get(split, ())
        for start, stop in tables.runs_of_rows(file.row_groups, UNIT_ROWS)
    ]


def shard_items(
    folder: str, spec: DatasetSpec, unit: RowGroupRange, *, size: tuple[int, int] | None
) -> Iterator[Item]:
    """The items of a unit of shards. Raises StageError if a shard is damaged.

    size   width and height that images are resized to; None: as they are stored
    """
    needed: dict[Role, RoleSpec] = {
        role: spec.roles[role] for role in ("source", "instance") if role in spec.roles
    }
    spec = replace(spec, roles=needed)
    for index in range(unit.start, unit.stop):
        table = read_unit(folder, {"file": unit.name, "group": index}, dataset.columns(spec))
        for row in range(table.num_rows):

            def load(table: pa.Table = table, row: int = row) -> InputImages:
                images = dataset.sample_of(folder, spec, unit.split, unit.name, table, row).images
                if "source" not in images:
                    raise ImageRejected("empty", "the pair has no source")
                if size is not None:
                    images = {r: geometry.resize(image, size, needed[r].kind) for r, image in images.items()}
                return InputImages(images["source"], images.get("instance"))

            yield Item(table["key"][row].as_py(), table["source_uri"][row].as_py() or "", load)


# -- objects ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class InputPlan:
    """A listing: its number of rows, and a digest that does not depend on their order."""

    rows: int
    digest: str
    duplicates: tuple[int, ...] = ()
    """Uint64s of keys that several objects have: their images keep the object's suffix in their names."""
    refused: tuple[int, ...] = ()
    """Uint64s of keys that several objects have even with the suffix: two forms of one name."""

    @property
    def units(self) -> int:
        """Number of units."""
        return -(-self.rows // UNIT_ROWS)


def location(config: InferConfig) -> str:
    """The URI of the config's `input`; "" if it has none."""
    return storage.absolute(config.input) if config.input else ""


def plan(config: InferConfig, output: str | None) -> InputPlan:
    """List the config's `input` by pages, and write the rows below `output` (None: only count and digest).

    Raises UserError if the location does not exist, refuses access, or holds nothing that fits the pattern.
    """
    uri = location(config)
    sums, hashes = no_rows(), [np.zeros(0, np.uint64)]
    waiting = PLAN.empty_table()
    rows = objects = chunks = 0
    chunk_rows = UNIT_ROWS * UNITS_PER_CHUNK

    def write_chunk() -> None:
        nonlocal waiting, chunks
        if output is not None:
            name = storage.join(output, "plan", f"chunk-{chunks:05d}.parquet")
            inside = waiting["uri"][0].as_py().startswith(cells.SCHEME)  # a unit then reads few row groups
            chunk = waiting.slice(0, chunk_rows).sort_by("uri" if inside else "key")
            storage.write_parquet(name, chunk, row_group_rows=UNIT_ROWS, compression="zstd")
        chunks += 1
        waiting = waiting.slice(chunk_rows)

    with storage.located(uri):
        for count, table in _tables(config):
            objects += count
            rows += table.num_rows
            sums += row_sums(*table.columns)
            hashes.append(key_hashes(table["key"]))  # of 100 million keys 0.8 GB
            waiting = pa.concat_tables([waiting, table])
            while waiting.num_rows >= chunk_rows:
                write_chunk()
        if waiting.num_rows:
            write_chunk()
    if not rows and objects:
        more = "; of tables only Parquet is read" if uri.lower().endswith((*FORMATS, ".txt", ".gz")) else ""
        raise UserError(f"{uri}: none of its {objects:,} objects fits infer.pattern {config.pattern!r}{more}")
    if not rows:
        raise UserError(f"{uri}: nothing is in it")
    keys, counts = np.unique(np.concatenate(hashes), return_counts=True)
    duplicates = keys[counts > 1]
    digest = spell(sums, rows)
    if config.instance_pattern and not config.columns:  # maps that change are other inputs too
        digest += listing_digest(config.instance or uri)
    return InputPlan(
        rows,
        digest,
        tuple(duplicates.tolist()),
        _refused(config, keys, duplicates) if len(duplicates) else (),
    )


def listing_digest(uri: str) -> str:
    """A digest of all that is at a location, in any order. Raises as `plan` does."""
    return plan(InferConfig(input=uri, pattern="{key}"), None).digest


def _refused(config: InferConfig, keys: Uint64s, duplicates: Uint64s) -> tuple[int, ...]:
    """Uint64s of the keys with suffix that are still not unique."""
    hashes = [np.zeros(0, np.uint64)]
    for _, table in _tables(config):
        twice = np.isin(key_hashes(table["key"]), duplicates)
        names = [
            with_suffix(row["key"] or "", row["uri"]) for row in table.filter(pa.array(twice)).to_pylist()
        ]
        hashes.append(key_hashes(pa.chunked_array([names], pa.string())))
    longer, counts = np.unique(np.concatenate(hashes), return_counts=True)
    return tuple(longer[(counts > 1) | np.isin(longer, keys)].tolist())


def with_suffix(key: str, uri: str) -> str:
    """The key followed by its object's suffix, which distinguishes a.jpg from a.png."""
    return f"{key}.{uri.rpartition('.')[2]}"


def _tables(config: InferConfig) -> Iterator[tuple[int, pa.Table]]:
    """For each page of the listing: its number of objects, and those that fit, as rows of the plan."""
    uri = location(config)
    if uri.lower().endswith(".parquet"):
        with cells.opened(tables.files(uri)[0][0]) as parquet:
            schema = parquet.schema_arrow
        images = any(map(cells.has_images, schema)) and not {"key", "uri"} <= set(schema.names)
        if images or config.columns:
            yield from _images_of_tables(uri, config.columns or _columns(uri, schema))
        else:
            yield from _rows_of_tables(uri, schema)
        return
    pattern, instances = compile_pattern(config.pattern), None
    if config.instance_pattern:
        folder = storage.absolute(config.instance) if config.instance else uri
        instances = storage.join(folder, config.instance_pattern)

    def fitting(unit: listing.Unit) -> Iterator[tuple[int, pa.Table]]:
        objects = listing.list_objects(uri, unit)
        while batch := list(islice(objects, listing.PAGE)):
            keys = patterns.match(pattern, pa.array([one.path for one in batch]))["key"].combine_chunks()
            found = zip(keys.to_pylist(), patterns.bad_keys(keys).to_pylist(), batch, strict=True)
            rows = []
            for key, bad, (_, image, size, etag, fault) in found:
                if key is not None:
                    instance = instances and instances.replace("{key}", key)
                    rows.append((key, image, size, etag, instance, fault or ("bad_key" if bad else None)))
            yield len(batch), _planned(rows)

    units = listing.split_location(uri, want=LISTERS)
    with closing(
        Prefetch([partial(fitting, unit) for unit in units], depth=2 * LISTERS, name="list")
    ) as pages:
        yield from pages


def _planned(rows: Sequence[tuple[Any, ...]]) -> pa.Table:
    return pa.Table.from_pylist([dict(zip(PLAN.names, row, strict=True)) for row in rows], schema=PLAN)


def _columns(uri: str, schema: pa.Schema) -> Columns:
    """The columns of a table that holds images. Raises UserError if several may be the sources."""
    images = [field.name for field in schema if cells.has_images(field)]
    source = "source" if "source" in schema.names else images[0]
    if source != "source" and len(images) > 1:
        raise UserError(
            f"{uri}: several columns hold images ({', '.join(images)}): name the sources' by infer.columns: "
            f"{{source: {images[0]}}}"
        )
    columns: dict[Column, str | None] = {"source": source, "key": "key", "instance": "instance"}
    return {name: written for name, written in columns.items() if written in schema.names}


def _images_of_tables(uri: str, columns: Columns) -> Iterator[tuple[int, pa.Table]]:
    for unit in tables.units(uri):
        for table, _ in tables.read(unit, columns, uri):
            found = tables.objects(table, unit.paths[0], ()).to_pylist()
            good = [row for row in found if not row["reason"]]
            maps = {row["key"]: row["uri"] for row in good if row["role"] == "instance"}
            rows = [
                (row["key"], row["uri"], -1, row["etag"], maps.get(row["key"]), row["reason"] or None)
                for row in found
                if row["role"] in ("source", "table")
            ]
            yield table.num_rows, _planned(rows)


def _rows_of_tables(uri: str, schema: pa.Schema) -> Iterator[tuple[int, pa.Table]]:
    columns: dict[Column, str | None] = {"source": "uri", "key": "key"}
    columns |= {"instance": "instance"} if "instance" in schema.names else {}
    for unit in tables.units(uri):
        for table, _ in tables.read(unit, columns, uri):
            folder = tables.folder_of(unit.paths[0]) + "/"
            lacks = pc.if_else(pc.is_null(table["source"]), "missing: the row has no uri", None)
            bad = pc.fill_null(patterns.bad_keys(table["key"]), True)
            rows = [table["key"], _located(table["source"], folder), np.full(len(bad), -1)]
            rows += [pc.coalesce(table["etag"], ""), _located(table["instance"], folder)]
            yield len(bad), pa.table([*rows, pc.if_else(bad, "bad_key", lacks)], schema=PLAN)


def _located(uris: pa.ChunkedArray, folder: str) -> pa.ChunkedArray:
    """URIs of a table, in whose folder those without a scheme are."""
    absolute = pc.match_substring_regex(uris, r"\A(?:/|[A-Za-z0-9+.-]+:)")
    return pc.if_else(absolute, uris, pc.binary_join_element_wise(folder, uris, ""))


def object_items(
    output: str,
    planned: InputPlan,
    unit: int,
    *,
    how: Picture,
    max_pixels: int,
    instances: bool,
    by_rows: int | None,
) -> Iterator[Item]:
    """The items of a unit of the plan; their objects are fetched when they are loaded.

    instances   whether the model needs an instance map
    by_rows     TIFFs with more pixels than this are read row by row, if they can be; None: none
    """
    reader = Reader()  # of this unit alone: it holds the members of the compressed archives it has read
    place = {"file": f"plan/chunk-{unit // UNITS_PER_CHUNK:05d}.parquet", "group": unit % UNITS_PER_CHUNK}
    rows = read_unit(output, place, PLAN.names).to_pylist()
    good = [row for row in rows if row["error"] is None]
    reader.expect(Object(row["uri"], row["size"], row["etag"]) for row in good)
    reader.expect(Object(row["instance"]) for row in good if instances and row["instance"] is not None)
    duplicates, refused = set(planned.duplicates), set(planned.refused)
    hashes = key_hashes(pa.chunked_array([[row["key"] for row in rows]], pa.string()))
    for row, hashed in zip(rows, hashes, strict=True):

        def load(row: dict[str, Any] = row) -> InputImages:
            if row["error"] is not None:
                raise ImageRejected(row["error"])
            if by_rows is not None and (rows := _large_tiff(row["uri"], how, by_rows)) is not None:
                return InputImages(rows, tags=rows.tags)
            data = reader.read(Object(row["uri"], row["size"], row["etag"]))
            source = decode.decode_image(data, how, max_pixels=max_pixels)
            if not instances:
                return InputImages(source, tags=geotiff.place_tags(data))
            if row["instance"] is None:
                raise ImageRejected("missing", "the model needs an instance map; set infer.instance_pattern")
            ids = decode.decode_image(
                reader.read(Object(row["instance"])), "instances", max_pixels=max_pixels
            )
            if ids.shape[:2] != source.shape[:2]:
                raise ImageRejected(
                    "size_mismatch", f"instance map {ids.shape[:2]}, source {source.shape[:2]}"
                )
            return InputImages(source, ids)

        key = row["key"] or ""
        if int(hashed) in duplicates:  # a.jpg and a.png would be written to one name
            key = with_suffix(key, row["uri"])
            if refused and int(key_hashes(pa.chunked_array([[key]]))[0]) in refused:
                row["error"] = "duplicate_key"
        yield Item(key, row["uri"], load)


def _large_tiff(uri: str, how: Picture, pixels: int) -> TiffRows | None:
    """A TIFF to read row by row; None if it has not so many pixels, or must be read whole."""
    if not uri.lower().endswith((".tif", ".tiff")) or "::" in uri:
        return None
    with ExitStack() as kept, suppress(FileNotFoundError):  # which reading it whole reports
        rows = geotiff.open_rows(kept.enter_context(local_file(uri)), how)
        if rows is not None:
            kept.callback(rows.file.close)
            if rows.shape[0] * rows.shape[1] > pixels:
                finalize(rows, kept.pop_all().close)
                return rows
    return None
