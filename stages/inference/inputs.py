"""What batch inference reads, cut into units of work that are the same whenever and wherever they are done.

shards    a unit is a run of row groups of one file of the split
objects   a folder, bucket or archive: its listing is written down once, a unit is `UNIT_ROWS` rows of it;
          a Parquet table of {key, uri[, instance]} is written down the same way

    unit -> Item, Item, ...     each with its key; `load` fetches and decodes it, from any thread

The listing is kept (`plan/`), so that a rerun continues with the very units that were begun.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages import storage
from stages.base import Kind, Role, Split
from stages.config.locations import Pattern, compile_pattern
from stages.errors import UserError
from stages.images import decode, geometry
from stages.images.kinds import Array, ImageRejected
from stages.objects import listing, patterns
from stages.objects.fetch import Object, Reader
from stages.shards import dataset
from stages.shards.dataset import DatasetSpec
from stages.shards.row_groups import read_unit

Value = TypeVar("Value")

UNIT_ROWS = 64
LISTERS = 8  # parts of a location that are listed at once
Hashes = np.ndarray[Any, np.dtype[np.uint64]]
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
class Loaded:
    """An input, decoded: source (H, W, C) of the model's kind, and the map of instance ids it may need."""

    source: Array
    instance: Array | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """One input. `load` raises ImageRejected for what cannot be used."""

    key: str
    uri: str
    load: Callable[[], Loaded]


@dataclass(frozen=True, slots=True)
class Run:
    """Row groups `start` up to `stop` of a file."""

    name: str
    start: int
    stop: int


def shard_units(spec: DatasetSpec, split: Split, rows: int = UNIT_ROWS) -> list[Run]:
    """The units of a split: whole row groups, together at least `rows` rows where the file has them."""
    units: list[Run] = []
    for file in spec.splits.get(split, ()):
        start = held = 0
        for index, count in enumerate(file.row_groups):
            held += count
            if held >= rows or index == len(file.row_groups) - 1:
                units.append(Run(file.name, start, index + 1))
                start, held = index + 1, 0
    return units


def shard_items(folder: str, spec: DatasetSpec, run: Run, *, size: tuple[int, int] | None) -> Iterator[Item]:
    """The sources of a unit, resized to `size` (width, height) if asked. StageError for a damaged shard."""
    roles: list[Role] = [role for role in ("source", "instance") if role in spec.roles]
    columns = ["key", "source_uri", *(name for role in roles for name in (role, f"{role}_crc"))]
    for index in range(run.start, run.stop):
        table = read_unit(folder, {"file": run.name, "group": index}, columns)
        for row in range(table.num_rows):
            key = table["key"][row].as_py()

            def load(table: pa.Table = table, row: int = row, key: str = key) -> Loaded:
                found = {role: _stored(folder, spec, run.name, key, role, table, row) for role in roles}
                if size is not None:
                    found = {
                        role: None if image is None else geometry.resize(image, size, spec.roles[role].kind)
                        for role, image in found.items()
                    }
                source = found["source"]
                if source is None:
                    raise ImageRejected("empty", "the pair has no source")
                return Loaded(source, found.get("instance"))

            yield Item(key, table["source_uri"][row].as_py() or "", load)


def _stored(
    folder: str, spec: DatasetSpec, name: str, key: str, role: Role, table: pa.Table, row: int
) -> Array | None:
    value: Any = table[role][row]
    if not value.is_valid:
        return None
    try:
        crc = table[f"{role}_crc"][row].as_py()
        return dataset.decode_role(memoryview(value.as_buffer()), crc, spec.roles[role], spec.size)
    except ImageRejected as why:
        raise dataset.corrupt(folder, name, key, role, why) from why


# -- objects ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Planned:
    """A listing written down: number of rows, and a digest that does not depend on their order."""

    rows: int
    digest: str
    duplicates: tuple[int, ...] = ()
    """Hashes of keys that several objects have: those keep their suffix."""
    refused: tuple[int, ...] = ()
    """Hashes of keys that several objects have even with their suffix: two forms of one name."""

    @property
    def units(self) -> int:
        """Number of units."""
        return -(-self.rows // UNIT_ROWS)


@dataclass(frozen=True, slots=True)
class Location:
    """Where the sources are. `instance_pattern` makes an instance map's path from the source's key."""

    uri: str
    pattern: str
    instance: str = ""
    instance_pattern: str = ""


def plan(where: Location, output: str | None) -> Planned:
    """List `where`, page by page, and write the rows down below `output` (None: only count and digest).

    Raises UserError where the location is not there, not to be had, or holds nothing that fits.
    """
    total, hashes = np.zeros(2, np.uint64), [np.zeros(0, np.uint64)]
    chunk: list[pa.Table] = []
    held = written = rows = seen = 0

    def flush(everything: bool) -> None:
        nonlocal held, written
        size = UNIT_ROWS * UNITS_PER_CHUNK
        while held >= size or (everything and held):
            table = pa.concat_tables(chunk)
            if output is not None:
                uri = storage.join(output, "plan", f"chunk-{written:05d}.parquet")
                rows_of_chunk = table.slice(0, size).sort_by("key")
                storage.write_parquet(uri, rows_of_chunk, row_group_rows=UNIT_ROWS, compression="zstd")
            written += 1
            chunk[:] = [table.slice(size)]
            held = chunk[0].num_rows

    try:
        for count, table in _tables(where):
            seen += count
            if not table.num_rows:
                continue
            total += _fold(table)
            hashes.append(key_hashes(table["key"]))
            chunk.append(table)
            held += table.num_rows
            rows += table.num_rows
            flush(everything=False)
        flush(everything=True)
    except (UserError, StopIteration):
        raise
    except Exception as error:
        text = listing.describe(error)
        if text is None:
            raise
        raise UserError(f"infer.input: {where.uri}: {text}") from error
    if not rows:
        told = (
            f"none of its {seen:,} objects fits infer.pattern {where.pattern!r}"
            if seen
            else "nothing is in it"
        )
        raise UserError(f"infer.input: {where.uri}: {told}")
    known, counts = np.unique(np.concatenate(hashes), return_counts=True)
    twice = known[counts > 1]
    return Planned(
        rows,
        f"{int(total[0]):016x}{int(total[1]):016x}-{rows}",
        tuple(int(value) for value in twice),
        _refused(where, known, twice) if len(twice) else (),
    )


def _refused(where: Location, known: Hashes, twice: Hashes) -> tuple[int, ...]:
    """Of the keys that several objects have, those that their suffix does not tell apart."""
    longer = [np.zeros(0, np.uint64)]
    for _, table in _tables(where):
        same = np.isin(key_hashes(table["key"]), twice)
        names = [
            with_suffix(row["key"] or "", row["uri"]) for row in table.filter(pa.array(same)).to_pylist()
        ]
        longer.append(key_hashes(pa.chunked_array([pa.array(names, pa.string())])))
    found, counts = np.unique(np.concatenate(longer), return_counts=True)
    return tuple(int(value) for value in found[(counts > 1) | np.isin(found, known)])


def with_suffix(key: str, uri: str) -> str:
    """A key that keeps its object's suffix: what tells a.jpg and a.png apart."""
    return f"{key}.{uri.rpartition('.')[2]}"


def _tables(where: Location) -> Iterator[tuple[int, pa.Table]]:
    """Objects seen, and those of them that fit, in the plan's columns."""
    if where.uri.lower().endswith(".parquet"):
        yield from _rows_of_table(where.uri)
        return
    pattern = compile_pattern(where.pattern)
    units = listing.split_location(where.uri, want=LISTERS)

    def tables(unit: listing.Unit) -> Iterator[tuple[int, pa.Table]]:
        for page in listing.pages(where.uri, unit):
            yield len(page), _fitting(page, pattern, where)

    yield from _at_once([partial(tables, unit) for unit in units])


def _at_once(sources: Sequence[Callable[[], Iterator[Value]]]) -> Iterator[Value]:
    """What several iterators give, each in a thread of its own, as it comes; a few values wait at most."""
    ready: queue.Queue[Value | BaseException | None] = queue.Queue(2 * LISTERS)
    stopped = threading.Event()

    def put(value: Value | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                ready.put(value, timeout=0.5)
            except queue.Full:
                continue
            return

    def drain(source: Callable[[], Iterator[Value]]) -> None:
        try:
            for value in source():
                put(value)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:  # raised again where it is read
            put(error)

    with ThreadPoolExecutor(LISTERS, thread_name_prefix="list") as pool:
        for source in sources:
            pool.submit(drain, source)
        left = len(sources)
        try:
            while left:
                value = ready.get()
                if isinstance(value, BaseException):
                    raise value
                if value is None:
                    left -= 1
                else:
                    yield value
        finally:
            stopped.set()


def _fitting(page: listing.Page, pattern: Pattern, where: Location) -> pa.Table:
    paths = pa.array([_valid(path) for path in page.paths], pa.string())
    keys = patterns.match(pattern, paths)["key"].combine_chunks()
    bad = patterns.bad_keys(keys).to_pylist()
    rows = []
    for key, path, valid, uri, size, etag, fault, refused in zip(
        keys.to_pylist(), page.paths, paths.to_pylist(), page.uris, page.sizes, page.etags, page.faults, bad,
        strict=True,
    ):  # fmt: skip
        if key is None:
            continue
        error = fault or ("bad_key" if refused or valid != path else None)
        instance = None
        if where.instance_pattern:
            instance = storage.join(where.instance or where.uri, where.instance_pattern.replace("{key}", key))
        rows.append((key, _valid(uri), size, etag, instance, error))
    columns = [[row[i] for row in rows] for i in range(len(PLAN))]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, PLAN, strict=True)], schema=PLAN)


def _rows_of_table(uri: str) -> Iterator[tuple[int, pa.Table]]:
    fs, path = storage.filesystem(uri)
    with fs.open(path, "rb") as handle:
        file = pq.ParquetFile(handle)
        missing = {"key", "uri"} - set(file.schema_arrow.names)
        if missing:
            raise UserError(f"infer.input: {uri}: the table has no column {sorted(missing)[0]!r}")
        names = [n for n in ("key", "uri", "instance") if n in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=UNIT_ROWS * 16, columns=names):
            count = batch.num_rows
            keys = batch["key"].cast(pa.string())
            bad = patterns.bad_keys(keys).to_pylist()
            columns = {
                "key": keys,
                "uri": batch["uri"].cast(pa.string()),
                "size": pa.array([-1] * count, pa.int64()),
                "etag": pa.array([""] * count),
                "instance": batch["instance"].cast(pa.string())
                if "instance" in names
                else pa.nulls(count, pa.string()),
                "error": pa.array(["bad_key" if b or b is None else None for b in bad], pa.string()),
            }
            yield count, pa.table(columns, schema=PLAN)


def _valid(text: str) -> str:
    """Text in valid Unicode: a file system's raw bytes are written out."""
    return text.encode(errors="backslashreplace").decode()


def key_hashes(keys: pa.ChunkedArray) -> Hashes:
    """64 bits a key: what the planner keeps of 100 million keys is 0.8 GB, not the keys."""
    return np.fromiter(
        (
            int.from_bytes(hashlib.blake2b((key or "").encode(), digest_size=8).digest(), "little")
            for key in keys.to_pylist()
        ),
        np.uint64,
    )


def _fold(table: pa.Table) -> np.ndarray[Any, np.dtype[np.uint64]]:
    total = np.zeros(2, np.uint64)
    for row in zip(*(table[name].to_pylist() for name in PLAN.names), strict=True):
        digest = hashlib.blake2b(repr(row).encode(), digest_size=16).digest()
        total += np.frombuffer(digest, np.uint64)
    return total


def object_items(
    output: str, planned: Planned, unit: int, *, kind: Kind, max_pixels: int, instances: bool
) -> Iterator[Item]:
    """The sources of a unit, to be fetched when loaded."""
    reader = Reader()  # of this unit alone: it holds the members of compressed archives that it met
    place = {"file": f"plan/chunk-{unit // UNITS_PER_CHUNK:05d}.parquet", "group": unit % UNITS_PER_CHUNK}
    rows = read_unit(output, place, PLAN.names).to_pylist()
    reader.stream_archives(
        Object(row["uri"], row["size"], row["etag"]) for row in rows if row["error"] is None
    )
    twice, refused = set(planned.duplicates), set(planned.refused)
    hashes = key_hashes(pa.chunked_array([[row["key"] for row in rows]], pa.string()))
    for row, hashed in zip(rows, hashes, strict=True):

        def load(row: dict[str, Any] = row) -> Loaded:
            if row["error"] is not None:
                raise ImageRejected(row["error"])
            data = reader.read(Object(row["uri"], row["size"], row["etag"]))
            source = decode.decode_image(data, kind, max_pixels=max_pixels)
            if not instances:
                return Loaded(source)
            if row["instance"] is None:
                raise ImageRejected("missing", "the model needs an instance map; set infer.instance_pattern")
            ids = decode.decode_image(
                reader.read(Object(row["instance"])), "instances", max_pixels=max_pixels
            )
            if ids.shape[:2] != source.shape[:2]:
                raise ImageRejected(
                    "size_mismatch", f"instance map {ids.shape[:2]}, source {source.shape[:2]}"
                )
            return Loaded(source, ids)

        key = row["key"] or ""
        if int(hashed) in twice:  # a.jpg and a.png: one name would be written twice
            key = with_suffix(key, row["uri"])
            if refused and int(key_hashes(pa.chunked_array([[key]]))[0]) in refused:
                row["error"] = "duplicate_key"
        yield Item(key, row["uri"], load)
