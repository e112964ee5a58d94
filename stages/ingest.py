"""List every configured location.

in:  locations, each with a role and a key pattern
out: objects-*.parquet  {key, role, split, group, x, y, uri, size, etag, location}   one object a row
     rejects-*.parquet  {key, role, uri, reason, detail}  bad_key, link, encrypted; tables: outside, bad_row
     _listing.json      the objects' files that count, and how many objects each role has

A location is cut into units, which tasks list in parallel. Each unit has its own files of about
`ROWS_PER_FILE` rows, named by unit and number, so that a rerun overwrites what a killed run left.
"""

from __future__ import annotations

import gc
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial, reduce
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from stages.base import Outcome, Resources, Seen
from stages.config.ingest import IngestConfig, LocationConfig
from stages.config.locations import compile_pattern, is_archive
from stages.errors import UserError
from stages.objects import Listed, cells, inventory, tables
from stages.objects.digest import Uint64s, no_rows, row_sums, spell
from stages.objects.listing import Unit, list_objects, split_location
from stages.objects.patterns import bad_keys, canonical_splits, match
from stages.objects.tables import REJECTS, reject_text
from stages.parallel.cluster import each
from stages.progress import Progress
from stages.storage import (
    absolute,
    etag_of,
    filesystem,
    join,
    list_names,
    located,
    remove,
    retried,
    write_json,
    write_parquet,
)

if TYPE_CHECKING:
    from stages.tracking.run import Run

VERSION = 3
ROWS_PER_BATCH = 16_000
ROWS_PER_FILE = 256_000
UNITS_PER_LOCATION = 64
EXAMPLES = 3  # rejects of a location that a message quotes
LISTING_THREADS = 8  # units that the planner, and each task, lists at the same time

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


# -- rules: listed objects in, rows out ---------------------------------------


def rows(
    location: LocationConfig, index: int, listed: Sequence[Listed], others: Iterable[str] = ()
) -> tuple[pa.Table, pa.Table, int]:
    """Objects and rejects of those listed, and how many are neither.

    others   patterns of the same folder, whose objects are not the location's
    """
    count, columns = len(listed), zip(*listed, strict=True)
    paths, uris, sizes, etags, faults = (pa.array(column) for column in columns)
    captured = match(compile_pattern(location.pattern), paths)
    taken = [pc.is_valid(match(compile_pattern(other), paths)["key"]) for other in others]
    names = paths if is_archive(location.uri) else uris
    bad = pc.or_(bad_keys(captured["key"]), pc.match_substring(names, "::"))
    table = pa.table(
        {
            "key": captured["key"],
            "role": pa.repeat(location.role, count),
            "split": canonical_splits(captured["split"]),
            "group": captured["group"],
            "x": captured["x"],
            "y": captured["y"],
            "uri": uris,
            "size": sizes,
            "etag": etags,
            "location": pa.array(np.full(count, index, np.int32)),
            "reason": pc.if_else(pc.not_equal(faults, ""), faults, pc.if_else(bad, "bad_key", "")),
            "detail": pa.repeat("", count),
        }
    ).filter(reduce(pc.and_not, taken, pc.is_valid(captured["key"])))
    good = pc.equal(table["reason"], "")
    objects, rejects = table.filter(good), table.filter(pc.invert(good))
    return objects.select(OBJECTS.names), rejects.select(REJECTS.names), count - table.num_rows


def table_rows(
    location: LocationConfig, index: int, uri: str, table: pa.Table, broken: list[str]
) -> tuple[pa.Table, pa.Table]:
    """Objects and rejects of a batch of rows of the table `uri`; `broken` lines are no rows, so rejects."""
    within = [absolute(uri) for uri in location.within]
    candidates = tables.objects(table, uri, within)
    good = candidates.filter(pc.equal(candidates["reason"], ""))
    count = good.num_rows
    unknown = {
        "x": pa.nulls(count, pa.float64()),
        "y": pa.nulls(count, pa.float64()),
        "size": pa.array(np.full(count, -1)),
        "location": pa.array(np.full(count, index, np.int32)),
    }
    objects = pa.table({**dict(zip(good.column_names, good.columns, strict=True)), **unknown})
    rejects = candidates.filter(pc.not_equal(candidates["reason"], "")).select(REJECTS.names)
    name = shown(location, uri)
    wrong = {"key": "", "role": "table", "uri": name, "reason": "bad_row"}
    no_rows = pa.Table.from_pylist([wrong | {"detail": text[:200]} for text in broken], schema=REJECTS)
    return objects.select(OBJECTS.names), pa.concat_tables([rejects, no_rows])


def counts_of(objects: pa.Table, rejects: pa.Table, ignored: int) -> Counter[str]:
    """The counts that these rows add."""
    counts = Counter(
        listed=objects.num_rows + rejects.num_rows + ignored,
        ignored=ignored,
        objects=objects.num_rows,
        rejected=rejects.num_rows,
        bytes=pc.sum(pc.max_element_wise(objects["size"], 0)).as_py() or 0,
    )
    if inside := pc.sum(pc.starts_with(objects["uri"], cells.SCHEME)).as_py():
        counts["inside_tables"] = inside
    for prefix, column in (("role_", objects["role"]), ("reject_", rejects["reason"])):
        counts.update(
            {f"{prefix}{row['values']}": row["counts"] for row in column.value_counts().to_pylist()}
        )
    return counts


# -- listing, without Ray -----------------------------------------------------


@dataclass(frozen=True, slots=True)
class LocationUnit:
    """A unit of a location, and its number among the units of all locations."""

    number: int
    location: int
    unit: Unit


@dataclass(slots=True)
class Listing:
    """The files that listing some units wrote, with their rows; of each location counts, sums and rejects.

    The sums are of the rows, in any order: they become the location's digest.
    """

    files: dict[str, int] = field(default_factory=dict)
    examples: defaultdict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    counts: defaultdict[int, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    sums: defaultdict[int, Uint64s] = field(default_factory=lambda: defaultdict(no_rows))

    def add(self, other: Listing) -> None:
        """Add the listing of other units."""
        self.files |= other.files
        for location, examples in other.examples.items():
            self.add_examples(location, examples)
        for location, counts in other.counts.items():
            self.counts[location].update(counts)
        for location, sums in other.sums.items():
            self.sums[location] += sums

    def add_rows(self, location: int, objects: pa.Table, rejects: pa.Table, ignored: int) -> None:
        """Count a location's rows, and the objects that gave none."""
        self.sums[location] += row_sums(objects["uri"], objects["size"], objects["etag"])
        self.sums[location] += row_sums(rejects["uri"])
        self.counts[location].update(counts_of(objects, rejects, ignored))

    def add_examples(self, location: int, examples: Iterable[str]) -> None:
        """Keep a few of a location's rejects, for its messages."""
        self.examples[location] = [*self.examples[location], *examples][:EXAMPLES]

    @property
    def total(self) -> Counter[str]:
        """The counts of all locations."""
        return sum(self.counts.values(), Counter[str]())


def place(config: IngestConfig, index: int) -> str:
    """How an error names a location."""
    return f"ingest.locations.{index}.uri: {config.locations[index].uri}"


def root(location: LocationConfig) -> str:
    """The location's URI, independent of the working directory."""
    head, chained, outer = location.uri.removeprefix("file://").rpartition("::")
    return head + chained + absolute(outer)


def shown(location: LocationConfig, table: str) -> str:
    """How a message names a table of a location: as the config does, if it names one."""
    return location.uri if table == root(location) else table


def cut_location(location: LocationConfig) -> list[Unit]:
    """The units of a location: parts of a listing, tables or row groups of one, an inventory's files."""
    if location.inventory is not None:
        return inventory.units(location.inventory, root(location))
    if location.role == "table":
        return tables.units(root(location))
    return split_location(root(location), want=UNITS_PER_LOCATION)


def units(config: IngestConfig, *, inventories: bool = True) -> list[LocationUnit]:
    """The units of all locations.

    inventories   False: leave out locations that have an inventory

    Raises:
        UserError: there is no such location, or it cannot be read.
    """
    numbered: list[LocationUnit] = []
    for index, location in enumerate(config.locations):
        if location.inventory is not None and not inventories:
            continue
        with located(place(config, index)):
            cut = cut_location(location)
        numbered += [LocationUnit(number, index, unit) for number, unit in enumerate(cut, len(numbered))]
    return numbered


def narrower(config: IngestConfig, index: int) -> list[str]:
    """Patterns of the location's folder that match fewer names: {key}_mask.png next to {key}.png.

    What they match is not the location's: else every mask would be a photo without a mask, too.
    """
    location = config.locations[index]
    folder, own = root(location).rstrip("/"), location.pattern
    others = {one.pattern for one in config.locations if root(one).rstrip("/") == folder} - {own}
    return sorted(one for one in others if any(_fit(own, one)) and not all(_fit(one, own)))


def _fit(pattern: str, other: str) -> list[bool]:
    """Whether names of another pattern match, with two suffixes if it leaves the suffix open."""
    names = [f"{other[:-1]}{suffix}" if other.endswith("*") else other for suffix in ("png", "jpg")]
    return match(compile_pattern(pattern), pa.array(names))["key"].is_valid().to_pylist()  # type: ignore[no-any-return]


def unit_rows(
    config: IngestConfig, index: int, unit: Unit, *, requests: int
) -> Iterator[tuple[pa.Table, pa.Table, int]]:
    """Objects, rejects and the number of ignored objects of a unit, batch by batch."""
    location = config.locations[index]
    if unit.kind == "table":
        (uri,) = unit.paths
        with located(f"ingest.locations.{index}.uri: {shown(location, uri)}"):
            for table, broken in tables.read(unit, location.columns, root(location)):
                yield *table_rows(location, index, uri, table, broken), 0
    else:
        if location.inventory is not None:
            listed = inventory.list_objects(location.inventory, unit, root(location))
        else:
            listed = list_objects(root(location), unit, requests=requests)
        others = narrower(config, index)
        while batch := list(islice(listed, ROWS_PER_BATCH)):
            yield rows(location, index, batch, others)


def survey(config: IngestConfig) -> Seen:
    """A digest of every matching object's (uri, size, etag), in no order: it changes if a location's data do.

    Its counts are of objects and their bytes; `unread` are tables and inventories, whose rows are not read.

    The planner computes it in every run, in constant memory: over the cluster if it has joined one, else in
    this process. Objects that no pattern matches do not count: a note next to the images must not train a
    model again. Of an inventory only the manifest is read, by one request.

    Raises:
        UserError: there is no such location, or it cannot be read.
    """
    seen = Listing()
    for index, location in enumerate(config.locations):
        if location.inventory is not None:
            with located(place(config, index)):
                version = inventory.version(location.inventory)
            seen.sums[index] += row_sums(pa.array([location.uri]), pa.array([version]))
            seen.counts[index]["unread"] += 1
    items = units(config, inventories=False)
    call = partial(list_units, unit=partial(survey_unit, config=config))
    for part in each(call, tasks_of(items), stage="changes") if ray.is_initialized() else [call(items)]:
        seen.add(part)
    count = sum(seen.total[name] for name in ("objects", "rejected", "unread"))
    return Seen(spell(sum(seen.sums.values(), no_rows()), count), seen.total)


def tasks_of(items: Sequence[LocationUnit]) -> list[Sequence[LocationUnit]]:
    """Tasks of as many units as a task has threads."""
    return [items[n : n + LISTING_THREADS] for n in range(0, len(items), LISTING_THREADS)]


def survey_unit(item: LocationUnit, *, config: IngestConfig) -> Listing:
    """The sums and the counts of a unit's rows; no file is written."""
    index, seen = item.location, Listing()
    with located(place(config, index)):
        if item.unit.kind == "table":  # its rows change only if the file does
            first, stop = item.unit.row_groups
            count = 1 if stop is None else stop - first
            seen.sums[index] += table_sums(item.unit.paths[0]) * np.uint64(count)
            seen.counts[index]["unread"] += count
        else:
            for objects, rejects, _ in unit_rows(config, index, item.unit, requests=LISTING_THREADS):
                seen.add_rows(index, objects, rejects, 0)
    return seen


def table_sums(uri: str) -> Uint64s:
    """The part of the digest that a table's file adds, as one object."""
    fs, path = filesystem(uri)
    fs.invalidate_cache()
    info = retried(lambda: fs.info(path))
    return row_sums(pa.array([uri]), pa.array([info["size"]]), pa.array([etag_of(info)]))


def list_unit(item: LocationUnit, *, config: IngestConfig, output: str, requests: int) -> Listing:
    """List one unit into its files.

    Raises:
        UserError: the location cannot be read, or the output not be written.
    """
    index = item.location
    listing = Listing()
    waiting = {"objects": [OBJECTS.empty_table()], "rejects": [REJECTS.empty_table()]}
    written = Counter[str]()

    def write(kind: str, at_least: int) -> None:
        """Write the rows that wait to a file if they are as many."""
        if sum(table.num_rows for table in waiting[kind]) >= at_least:
            table = pa.concat_tables(waiting[kind])
            name = f"{kind}-{item.number:05d}-{written[kind]:04d}.parquet"
            write_parquet(join(output, name), table, compression="zstd")
            listing.files[name] = table.num_rows
            written[kind] += 1
            del waiting[kind][1:]

    with located(place(config, index)):
        for objects, rejects, ignored in unit_rows(config, index, item.unit, requests=requests):
            listing.add_rows(index, objects, rejects, ignored)
            listing.add_examples(index, map(reject_text, rejects.slice(0, EXAMPLES).to_pylist()))
            for kind, table in (("objects", objects), ("rejects", rejects)):
                waiting[kind].append(table)
                write(kind, at_least=ROWS_PER_FILE)
    for kind in waiting:
        write(kind, at_least=1)
    return listing


def list_units(task: Sequence[LocationUnit], *, unit: Callable[[LocationUnit], Listing]) -> Listing:
    """The listing of a task's units. `unit`: `list_unit` or `survey_unit`, with its settings.

    Threads, since tasks of a fraction of a core made Ray start more workers than the machine has cores and
    end them again: 16 s more for any listing on two cores.
    """
    total = Listing()
    gc.freeze()  # or the many collections look through all modules too: a listing takes twice as long
    with ThreadPoolExecutor(LISTING_THREADS) as threads:
        for listing in threads.map(unit, task):
            total.add(listing)
    return total


def check(config: IngestConfig, listing: Listing) -> None:
    """Every location must have an object that its pattern matches and that can be used.

    Raises:
        UserError: a location has none.
    """
    for index, location in enumerate(config.locations):
        count = listing.counts[index]
        if not count["listed"]:
            raise UserError(f"{place(config, index)}: there is nothing in it")
        if not count["objects"] + count["rejected"]:
            raise UserError(
                f"ingest.locations.{index}.pattern: {location.pattern!r} matches none of the "
                f"{count['listed']:,} objects of {location.uri}"
            )
        if not count["objects"]:
            raise UserError(
                f"{place(config, index)}: none of its {count['rejected']:,} images can be used: "
                + "; ".join(listing.examples[index])
            )


def finish(config: IngestConfig, output: str, listing: Listing) -> None:
    """Write `_listing.json`, and remove files that a killed run with other units left."""
    total = listing.total
    write_json(
        join(output, "_listing.json"),
        {
            "files": {name: n for name, n in sorted(listing.files.items()) if name.startswith("objects-")},
            "roles": {name.removeprefix("role_"): n for name, n in total.items() if name.startswith("role_")},
            "rejected": total["rejected"],
            "examples": [text for examples in listing.examples.values() for text in examples][:EXAMPLES],
            "locations": [
                {"uri": location.uri, "role": location.role, **listing.counts[index]}
                for index, location in enumerate(config.locations)
            ],
        },
    )
    for name in list_names(output):
        if name.startswith(("objects-", "rejects-")) and name not in listing.files:
            remove(join(output, name))


# -- wiring: the only function here that needs Ray ----------------------------


def run(config: IngestConfig, resources: Resources, *, output: str, track: Run) -> Outcome:
    """List all locations into `output`, an absolute folder URI.

    Raises:
        UserError: a location is missing, empty or cannot be read, or its pattern matches nothing.
    """
    tasks = tasks_of(units(config))
    unit = partial(list_unit, config=config, output=output, requests=resources.io_threads)
    listing = Listing()
    with Progress("ingest", total=None, unit="objects") as progress:
        for part in each(partial(list_units, unit=unit), tasks, stage="ingest"):
            listing.add(part)
            progress.advance(part.total["objects"])
    check(config, listing)
    finish(config, output, listing)
    for index, location in enumerate(config.locations):
        count = listing.counts[index]
        version = spell(listing.sums[index], count["objects"] + count["rejected"])
        counts = {"num_objects": count["objects"], "num_rejected": count["rejected"]}
        track.dataset(location.role, uri=location.uri, digest=version, context="ingest", counts=counts)
    counts = {"locations": len(config.locations), **listing.total}
    return Outcome(metrics={"bytes": float(counts.pop("bytes", 0))}, counts=counts)
