"""List every configured location.

in:  locations, each with a role and a key pattern
out: objects-*.parquet  {key, role, split, group, x, y, uri, size, etag, location}   one object a row
     rejects-*.parquet  {key, role, uri, reason}   bad_key, link, encrypted; of tables: outside, bad_row
     _listing.json      the objects' files that count, and how many objects each role has

A location is cut into units that are listed by parallel tasks; each writes its own files of at most
`ROWS_PER_FILE` rows, named by unit and number, so that a rerun overwrites what a killed run left.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from stages.base import Outcome, Resources
from stages.config.ingest import IngestConfig, LocationConfig
from stages.config.locations import compile_pattern
from stages.errors import UserError
from stages.objects import tables
from stages.objects.listing import Page, Unit, describe, etag_of, pages, split_location
from stages.objects.patterns import bad_keys, canonical_splits, match
from stages.progress import Progress
from stages.storage import absolute, filesystem, join, list_names, write_json, write_parquet

if TYPE_CHECKING:
    from stages.tracking.run import Run

VERSION = 1
ROWS_PER_BATCH = 16_000
ROWS_PER_FILE = 256_000
UNITS_PER_LOCATION = 64
LISTING_THREADS = 8  # units listed at once by the planner, and by each task

logger = logging.getLogger(__name__)

OBJECTS = pa.schema(
    {
        "key": pa.string(),
        "role": pa.string(),
        "split": pa.string(),
        "group": pa.string(),
        "x": pa.float64(),
        "y": pa.float64(),
        "uri": pa.string(),
        "size": pa.int64(),
        "etag": pa.string(),
        "location": pa.int32(),
    }
)
REJECTS = pa.schema({"key": pa.string(), "role": pa.string(), "uri": pa.string(), "reason": pa.string()})


# -- rules: a page of objects in, rows out ------------------------------------


def rows(location: LocationConfig, index: int, found: Page) -> tuple[pa.Table, pa.Table, int]:
    """Objects and rejects of a page, and how many objects the pattern does not speak of."""
    found = escape(found)
    captured = match(compile_pattern(location.pattern), pa.array(found.paths, pa.string()))
    count = len(found)
    table = pa.table(
        {
            "key": captured["key"],
            "role": pa.array([location.role], pa.string()).take(np.zeros(count, np.int64)),
            "split": canonical_splits(captured["split"]),
            "group": captured["group"],
            "x": captured["x"],
            "y": captured["y"],
            "uri": pa.array(found.uris, pa.string()),
            "size": pa.array(found.sizes, pa.int64()),
            "etag": pa.array(found.etags, pa.string()),
            "location": pa.array(np.full(count, index, np.int32)),
        },
        schema=OBJECTS,
    ).append_column("reason", pa.array(found.faults, pa.string()))
    table = table.filter(pc.is_valid(table["key"]))
    ignored = count - table.num_rows
    bad = pc.or_(bad_keys(table["key"]), pc.match_substring(table["uri"], "::"))
    if found.chained:
        bad = bad_keys(table["key"])
    reason = pc.if_else(pc.not_equal(table["reason"], ""), table["reason"], pc.if_else(bad, "bad_key", ""))
    table = table.set_column(table.num_columns - 1, "reason", reason)
    good = pc.equal(reason, "")
    objects, rejects = table.filter(good), table.filter(pc.invert(good))
    return objects.select(OBJECTS.names), rejects.select(REJECTS.names), ignored


def escape(found: Page) -> Page:
    """The same page in valid Unicode; names that are not (a file system's raw bytes) are written out."""
    try:
        "".join(found.paths).encode()
    except UnicodeEncodeError:
        clean = Page(chained=found.chained)
        for path, uri, size, etag, fault in found.rows():
            escaped = path.encode(errors="backslashreplace").decode()
            address = uri.encode(errors="backslashreplace").decode()
            clean.add(escaped, address, size, etag, fault if escaped == path else "bad_key")
        return clean
    return found


def fold(objects: pa.Table, rejects: pa.Table) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Two 64-bit sums over rows of (uri, size, etag), the same in whatever order they are added up."""
    total = np.zeros(2, np.uint64)
    text = pc.binary_join_element_wise(
        objects["uri"], objects["size"].cast(pa.string()), objects["etag"], "\n"
    )
    for array in (text, rejects["uri"]):
        values = np.asarray(array.to_pandas(), dtype=object)
        if len(values):
            for lane, key in enumerate(("pixloom-listing0", "pixloom-listing1")):
                hashed = pd.util.hash_array(values, hash_key=key, categorize=False)
                total[lane : lane + 1] += hashed.sum(dtype=np.uint64)  # as an array, which wraps around
    return total


def fold_table(uri: str) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """The sums of a table's file, as of one object."""
    fs, path = filesystem(uri)
    fs.invalidate_cache()
    info = fs.info(path)
    row = pa.table({"uri": [uri], "size": [info["size"]], "etag": [etag_of(info)]})
    return fold(row, REJECTS.empty_table())


def spell(sums: np.ndarray[Any, np.dtype[np.uint64]], count: int) -> str:
    """A digest's text."""
    return f"{int(sums[0]):016x}{int(sums[1] ^ np.uint64(count)):016x}"


def table_rows(
    location: LocationConfig, index: int, table: pa.Table, broken: list[str]
) -> tuple[pa.Table, pa.Table]:
    """Objects and rejects of a batch of a table's rows, and of lines that are no rows."""
    within = [absolute(uri) for uri in location.within]
    named = tables.objects(table, root(location), within)
    good = named.filter(pc.equal(named["reason"], ""))
    count = good.num_rows
    unknown = {
        "x": pa.nulls(count, pa.float64()),
        "y": pa.nulls(count, pa.float64()),
        "size": pa.array(np.full(count, -1)),
        "etag": pa.array(np.full(count, "", object), pa.string()),
        "location": pa.array(np.full(count, index, np.int32)),
    }
    objects = pa.table({**{name: good[name] for name in good.column_names if name != "reason"}, **unknown})
    rejects = named.filter(pc.not_equal(named["reason"], "")).select(REJECTS.names)
    lines = [line.encode(errors="backslashreplace").decode()[:200] for line in broken]
    no_rows = pa.table(
        {
            "key": lines,
            "role": ["table"] * len(lines),
            "uri": [location.uri] * len(lines),
            "reason": ["bad_row"] * len(lines),
        },
        schema=REJECTS,
    )
    return objects.select(OBJECTS.names), pa.concat_tables([rejects, no_rows])


# -- listing, with or without Ray ---------------------------------------------


def batches(found: Iterable[Page]) -> Iterator[Page]:
    """Pages put together, so that the rules work on long columns."""
    batch: Page | None = None
    for page in found:
        if batch is None:
            batch = Page(chained=page.chained)
        batch.extend(page)
        if len(batch) >= ROWS_PER_BATCH:
            yield batch
            batch = None
    if batch is not None:
        yield batch


def place(config: IngestConfig, index: int) -> str:
    """How an error names a location."""
    return f"ingest.locations.{index}.uri: {config.locations[index].uri}"


@contextmanager
def explained(config: IngestConfig, index: int) -> Iterator[None]:
    """Turns the errors of a location that are the user's to mend into a UserError that names it."""
    try:
        yield
    except Exception as error:
        text = describe(error)
        if text is None:
            raise
        raise UserError(f"{place(config, index)}: {text}") from error


def root(location: LocationConfig) -> str:
    """The location's URI, independent of the working directory."""
    head, chained, outer = location.uri.removeprefix("file://").rpartition("::")
    return head + chained + absolute(outer)


def units(config: IngestConfig) -> list[tuple[int, Unit]]:
    """The units of all locations: parts of a listing, or a Parquet table's row groups.

    Raises:
        UserError: a location is not there, or not to be had.
    """
    found: list[tuple[int, Unit]] = []
    for index, location in enumerate(config.locations):
        with explained(config, index):
            if location.role == "table":
                cut = [Unit("table", row_group=n) for n in range(tables.count_row_groups(root(location)))]
            else:
                cut = split_location(root(location), want=UNITS_PER_LOCATION)
        found += [(index, unit) for unit in cut]
    return found


def unit_rows(
    location: LocationConfig, index: int, unit: Unit, *, requests: int
) -> Iterator[tuple[pa.Table, pa.Table, int]]:
    """Objects, rejects and the number of ignored objects of a unit, batch by batch."""
    if unit.kind == "table":
        for table, broken in tables.read(root(location), [unit.row_group]):
            yield *table_rows(location, index, table, broken), 0
    else:
        for batch in batches(pages(root(location), unit, requests=requests)):
            yield rows(location, index, batch)


def digest(config: IngestConfig) -> str:
    """What the locations hold now: a hash of every matching object's (uri, size, etag), in no order.

    Constant memory and no Ray: the planner asks this on every run, to notice changed input. Objects that no
    pattern speaks of do not count; a note beside the images must not train a model anew.

    Raises:
        UserError: a location is not there, or not to be had.
    """

    def of_unit(item: tuple[int, Unit]) -> tuple[np.ndarray[Any, np.dtype[np.uint64]], int]:
        index, unit = item
        location, total, count = config.locations[index], np.zeros(2, np.uint64), 0
        with explained(config, index):
            if unit.kind == "table":  # the file itself stands for its rows
                return fold_table(root(location)), 1
            for objects, rejects, _ in unit_rows(location, index, unit, requests=LISTING_THREADS):
                total += fold(objects, rejects)
                count += objects.num_rows + rejects.num_rows
        return total, count

    total, count = np.zeros(2, np.uint64), 0
    with ThreadPoolExecutor(LISTING_THREADS) as threads:
        for part, number in threads.map(of_unit, units(config)):
            total += part
            count += number
    return spell(total, count)


def counted(good: pa.Table, bad: pa.Table, ignored: int) -> Counter[str]:
    """What a batch adds to the counts."""
    counts = Counter(
        listed=good.num_rows + bad.num_rows + ignored,
        ignored=ignored,
        objects=good.num_rows,
        rejected=bad.num_rows,
    )
    for prefix, column in (("role_", good["role"]), ("reject_", bad["reason"])):
        counts.update(
            {f"{prefix}{row['values']}": row["counts"] for row in column.value_counts().to_pylist()}
        )
    return counts


def list_unit(item: Mapping[str, Any], *, config: IngestConfig, output: str, requests: int) -> dict[str, Any]:
    """List one unit into its files. Returns {location, counts (JSON), files (JSON), sums, error}."""
    index, unit = int(item["location"]), Unit(**json.loads(item["spec"]))
    location = config.locations[index]
    counts: Counter[str] = Counter()
    files: dict[str, int] = {}
    sums = np.zeros(2, np.uint64)

    def write(kind: str, tables: list[pa.Table]) -> None:
        table = pa.concat_tables(tables)
        del tables[1:]
        if table.num_rows:
            number = sum(name.startswith(kind) for name in files)
            name = f"{kind}-{int(item['unit']):05d}-{number:04d}.parquet"
            write_parquet(join(output, name), table, compression="zstd")
            files[name] = table.num_rows

    objects, rejects = [OBJECTS.empty_table()], [REJECTS.empty_table()]
    error_text = ""
    try:
        with explained(config, index):
            for good, bad, ignored in unit_rows(location, index, unit, requests=requests):
                objects.append(good)
                rejects.append(bad)
                sums += fold(good, bad)
                counts.update(counted(good, bad, ignored))
                for kind, waiting in (("objects", objects), ("rejects", rejects)):
                    if sum(table.num_rows for table in waiting) >= ROWS_PER_FILE:
                        write(kind, waiting)
        write("objects", objects)
        write("rejects", rejects)
    except UserError as error:  # carried as a value: Ray would wrap it in its own
        error_text = str(error)
    return {
        "location": index,
        "counts": json.dumps(counts),
        "files": json.dumps(files),
        "sums": json.dumps([int(value) for value in sums]),
        "error": error_text,
    }


def list_units(item: Mapping[str, Any], **settings: Any) -> list[dict[str, Any]]:
    """`list_unit` of the units of one task, at once.

    In threads, since tasks of a fraction of a core made Ray start more workers than the machine has cores
    and end them again: 16 s more for any listing on two cores.
    """
    with ThreadPoolExecutor(LISTING_THREADS) as threads:
        return list(threads.map(partial(list_unit, **settings), item["units"]))


def run(config: IngestConfig, resources: Resources, *, output: str, track: Run) -> Outcome:
    """List all locations into `output`, an absolute folder URI.

    Raises:
        UserError: a location is missing, empty or not to be had, or its pattern matches nothing.
    """
    items = [
        {"unit": number, "location": index, "spec": json.dumps(asdict(unit))}
        for number, (index, unit) in enumerate(units(config))
    ]
    counts = [Counter[str]() for _ in config.locations]
    sums = np.zeros((len(config.locations), 2), np.uint64)
    files: dict[str, int] = {}
    tasks = [{"units": items[n : n + LISTING_THREADS]} for n in range(0, len(items), LISTING_THREADS)]
    listed = ray.data.from_items(tasks, override_num_blocks=len(tasks)).flat_map(
        partial(list_units, config=config, output=output, requests=resources.io_threads)
    )
    with Progress("ingest", total=None, unit="objects") as progress:
        for row in listed.iter_rows():
            index = row["location"]
            if row["error"]:
                raise UserError(row["error"])
            found = json.loads(row["counts"])
            counts[index].update(found)
            sums[index] += np.array(json.loads(row["sums"]), np.uint64)
            files.update(json.loads(row["files"]))
            progress.advance(found.get("objects", 0))
    check(config, counts)
    finish(config, output, counts, files)
    for location, total, count in zip(config.locations, sums, counts, strict=True):
        version = spell(total, count["objects"] + count["rejected"])
        told = {"num_objects": count["objects"], "num_rejected": count["rejected"]}
        track.dataset(location.role, uri=location.uri, digest=version, context="ingest", counts=told)
    return Outcome(counts={"locations": len(counts), **sum(counts, Counter[str]())})


def check(config: IngestConfig, counts: list[Counter[str]]) -> None:
    """Every location must have given something.

    Raises:
        UserError: a location is empty, or its pattern matches nothing.
    """
    for index, (location, count) in enumerate(zip(config.locations, counts, strict=True)):
        if not count["listed"]:
            raise UserError(f"{place(config, index)}: there is nothing in it")
        if not count["objects"] + count["rejected"]:
            raise UserError(
                f"ingest.locations.{index}.pattern: {location.pattern!r} matches none of the "
                f"{count['listed']:,} objects of {location.uri}"
            )


def finish(config: IngestConfig, output: str, counts: list[Counter[str]], files: Mapping[str, int]) -> None:
    """Write `_listing.json`, and remove files that a killed run of another cut has left."""
    total = sum(counts, Counter[str]())
    write_json(
        join(output, "_listing.json"),
        {
            "files": {name: n for name, n in sorted(files.items()) if name.startswith("objects-")},
            "roles": {name.removeprefix("role_"): n for name, n in total.items() if name.startswith("role_")},
            "rejected": total["rejected"],
            "locations": [
                {"uri": location.uri, "role": location.role, **count}
                for location, count in zip(config.locations, counts, strict=True)
            ],
        },
    )
    fs, path = filesystem(output)
    for name in list_names(output):
        if name.startswith(("objects-", "rejects-")) and name not in files:
            with suppress(FileNotFoundError):  # a driver beside this one may tidy up too
                fs.rm_file(f"{path}/{name}")
