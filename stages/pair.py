"""Pair the images that share a key.

in:  objects-*.parquet   {key, role, split, group, x, y, uri, size, etag}   one object a row
out: part-*.parquet      {key, split, group, and per role R: R_uri, R_size, R_etag, R_crop, R_derive}
     rejects-*.parquet   {key, role, uri, reason}

A key's objects meet by a hash shuffle, so no side is ever held whole: a bucket is the hash of the key, a
task gets all rows of a run of buckets, joins them with Arrow and numpy and writes each bucket's part. The
hash is of the key in lower case, so that keys that differ only in case meet too, and are told apart with a
reason of their own. A part holds about `pairs_per_shard` pairs and becomes one shard per split.

The shuffle goes through Parquet files in the output folder and not through Ray Data's `groupby`, which took
34 s for 1 M objects and 19 s for 10 k on 2 cores (workers' start included) where files took 15 s and 6 s,
and which holds all rows in its aggregators' memory. Ray Data deals out the tasks.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from ray.exceptions import RayError

from stages.base import Outcome, Resources, Role, Split
from stages.config.pair import PairConfig, SplitConfig
from stages.errors import StageError, UserError
from stages.parallel.cluster import failure
from stages.progress import Progress
from stages.storage import filesystem, join, read_json, read_parquet, write_parquet

if TYPE_CHECKING:
    from stages.tracking.run import Run

VERSION = 1
ROWS_PER_TASK = (128_000, 1_000_000)  # least, most
SPLIT_BINS = 1 << 16
EXCHANGE = "_exchange-"  # then the second it was begun, and a name of its own
EXCHANGE_KEPT = 24 * 3600.0  # seconds: what a killed run has exchanged is removed by a later run after these

logger = logging.getLogger(__name__)


Uint64s = np.ndarray[Any, np.dtype[np.uint64]]
Ints = np.ndarray[Any, np.dtype[np.int64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]

ROLES: tuple[Role, ...] = get_args(Role)
OTHER_HALF: Mapping[str, str] = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
SPLITS: tuple[Split, ...] = ("train", "val", "test")
REJECTS = pa.schema({"key": pa.string(), "role": pa.string(), "uri": pa.string(), "reason": pa.string()})


# -- rules: hashes and splits -------------------------------------------------


def hashes(text: pa.Array | pa.ChunkedArray, seed: int = 0) -> Uint64s:
    """A stable 64-bit hash of each string (SipHash), uniform and the same on every machine."""
    values = np.asarray(text.to_pandas(), dtype=object)
    key = f"pixloom {seed % 10**8:08d}"
    hashed: Uint64s = pd.util.hash_array(values, hash_key=key, categorize=False)
    return hashed


def buckets(keys: pa.Array | pa.ChunkedArray, count: int) -> Ints:
    """The bucket of each key, 0 .. count - 1; keys that differ only in case share one."""
    return (hashes(pc.utf8_lower(keys)) % np.uint64(count)).astype(np.int64)


def split_bins(table: pa.Table, seed: int) -> Ints:
    """Where each row lies on the line that the splits cut: its group's, or else its key's hash, as a bin."""
    return (hashes(pc.coalesce(table["group"], table["key"]), seed) >> np.uint64(48)).astype(np.int64)


def split_histogram(table: pa.Table, seed: int) -> Ints:
    """How many rows without a split lie in each of the `SPLIT_BINS` bins."""
    loose = table.filter(pc.is_null(table["split"]))
    return np.bincount(split_bins(loose, seed), minlength=SPLIT_BINS)


def split_cuts(histogram: Ints, config: SplitConfig) -> tuple[int, int]:
    """Bins below the first cut are val, below the second test, the others train.

    Cutting by the counts and not by the hash's value keeps the shares exact up to one group or bin, where
    chance would be off by 1.3 % with 500 pairs. No group is ever torn, since a group has one hash.
    """
    total = np.concatenate([[0], np.cumsum(histogram)])
    cuts = [
        int(np.abs(total - share * total[-1]).argmin()) for share in (config.val, config.val + config.test)
    ]
    return cuts[0], max(cuts)


def assign_splits(table: pa.Table, config: SplitConfig, cuts: tuple[int, int]) -> pa.Array:
    """The split of each row {key, split, group, x, y}; "buffer" and "no_position" for those in none."""
    if config.regions:
        loose = _by_position(table, config)
    else:
        bins = split_bins(table, config.seed)
        loose = np.where(bins < cuts[0], "val", np.where(bins < cuts[1], "test", "train"))
    return pc.coalesce(table["split"].combine_chunks(), pa.array(loose, pa.string()))


def _by_position(table: pa.Table, config: SplitConfig) -> np.ndarray[Any, Any]:
    positions = {axis: table[axis].to_numpy() for axis in ("x", "y")}
    split = np.full(table.num_rows, "train", object)
    distances = []
    for region in reversed(config.regions):  # the first region that holds a position is the one that counts
        away = np.zeros(table.num_rows)
        for axis, span in (("x", region.x), ("y", region.y)):
            if span is not None:
                away = np.maximum(away, np.maximum(span[0] - positions[axis], positions[axis] - span[1]))
        split[away <= 0] = region.split
        distances.append((region.split, away))
    for name, away in distances:
        split[(away <= config.buffer) & (split != name) & (config.buffer > 0)] = "buffer"
    lost = np.isnan(np.sum([away for _, away in distances], axis=0))
    split[lost] = "no_position"
    return split


# -- rules: the join ----------------------------------------------------------


def spread(objects: pa.Table, config: PairConfig) -> pa.Table:
    """Objects with `crop` and `derive`: a `pair` image becomes a source and a target."""
    none = pa.array(np.full(objects.num_rows, "", object), pa.string())
    whole = objects.append_column("crop", none).append_column("derive", none)
    role = whole["role"]
    parts = [whole.filter(pc.not_equal(role, "pair"))]
    halves = whole.filter(pc.equal(role, "pair"))
    if halves.num_rows:
        assert config.source_half is not None
        for name, half in (("source", config.source_half), ("target", OTHER_HALF[config.source_half])):
            parts.append(_with(halves, role=name, crop=half))
    if config.derive_source:
        targets = pa.concat_tables(parts)
        targets = targets.filter(pc.equal(targets["role"], "target"))
        parts.append(_with(targets, role="source", derive=config.derive_source))
    table = pa.concat_tables(parts)
    if config.reverse:
        role = table["role"]
        swapped = pc.if_else(
            pc.equal(role, "source"), "target", pc.if_else(pc.equal(role, "target"), "source", role)
        )
        table = table.set_column(table.schema.get_field_index("role"), "role", swapped)
    return table


def _with(table: pa.Table, **values: str) -> pa.Table:
    for name, value in values.items():
        column = pa.array(np.full(table.num_rows, value, object), pa.string())
        table = table.set_column(table.schema.get_field_index(name), name, column)
    return table


def join_roles(
    objects: pa.Table, roles: Sequence[Role], config: PairConfig, cuts: tuple[int, int]
) -> tuple[pa.Table, pa.Table]:
    """Pairs, sorted by key, and rejects, of objects that hold all rows of each key they hold.

    Args:
        objects: rows of ingest's schema.
        roles: the roles that the data set has; the columns of the pairs.
        config: what makes a pair.
        cuts: from `split_cuts`.
    """
    table = spread(objects, config)
    keys = table["key"].combine_chunks().dictionary_encode()
    order = pc.sort_indices(keys.dictionary).to_numpy()
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    key_of_row: Ints = rank[keys.indices.to_numpy()]  # rows -> keys in sorted order
    key_names = keys.dictionary.take(pa.array(order))
    role_of_row = pc.index_in(table["role"], pa.array(ROLES)).to_numpy()

    row_of: dict[Role, Ints] = {}  # per role: the row of each key, -1 where it has none
    reasons = np.full(len(order), "", object)
    for number, role in enumerate(ROLES):
        mine = np.flatnonzero(role_of_row == number)
        row_of[role] = np.full(len(order), -1, np.int64)
        row_of[role][key_of_row[mine]] = mine
        twice = np.bincount(key_of_row[mine], minlength=len(order)) > 1
        reasons[twice & (reasons == "")] = f"duplicate_{role}"
    lacking = np.zeros(len(order), bool)
    for role in roles:
        if role not in config.optional:
            lacks = (row_of[role] < 0) & (reasons == "")
            lacking |= lacks
            reasons[lacks] = f"no_{role}"
    reasons[lacking & _case_twins(key_names)] = "case_differs"

    shared = pa.table({"key": key_names, **_shared_columns(table, key_of_row, row_of, len(order), reasons)})
    split = assign_splits(shared, config.split, cuts)
    unknown = pc.invert(pc.is_in(split, pa.array(SPLITS))).to_numpy(zero_copy_only=False) & (reasons == "")
    placed = np.isin(split.to_numpy(zero_copy_only=False), ["buffer", "no_position"])
    reasons[unknown & ~placed] = "bad_split"
    reasons[unknown & placed] = split.to_numpy(zero_copy_only=False)[unknown & placed]

    good = np.flatnonzero(reasons == "")
    columns = {"key": key_names.take(pa.array(good)), "split": split.take(pa.array(good))}
    columns["group"] = shared["group"].take(pa.array(good))
    for role in roles:
        at = row_of[role][good]
        take = pa.array(at, pa.int64(), mask=at < 0)
        for name in ("uri", "size", "etag", "crop", "derive"):
            columns[f"{role}_{name}"] = table[name].take(take)
    return pa.table(columns), _rejects(table, key_of_row, reasons)


def _case_twins(names: pa.Array) -> Mask:
    """Which keys equal another one but for their case."""
    lower = pc.utf8_lower(names).dictionary_encode().indices.to_numpy()
    twins: Mask = np.bincount(lower, minlength=1)[lower] > 1 if len(lower) else np.zeros(0, bool)
    return twins


def _shared_columns(
    table: pa.Table, key_of_row: Ints, row_of: Mapping[Role, Ints], count: int, reasons: np.ndarray[Any, Any]
) -> dict[str, pa.Array]:
    """What a pair has once: its split, group and position, from the first role that says so.

    Roles that name different splits give the reason `bad_split`.
    """
    shared: dict[str, pa.Array] = {}
    for name, kind in (
        ("split", pa.string()),
        ("group", pa.string()),
        ("x", pa.float64()),
        ("y", pa.float64()),
    ):
        column = table[name].combine_chunks()
        value = pa.nulls(count, kind)
        for role in ROLES:
            rows = row_of[role]
            value = pc.coalesce(value, column.take(pa.array(rows, mask=rows < 0)))
        shared[name] = value
    own = table["split"].combine_chunks()
    differs = pc.not_equal(own, shared["split"].take(pa.array(key_of_row)))
    clash = key_of_row[pc.fill_null(differs, False).to_numpy(zero_copy_only=False)]
    mask = np.zeros(count, bool)
    mask[clash] = True
    reasons[mask & (reasons == "")] = "bad_split"
    return shared


def _rejects(table: pa.Table, key_of_row: Ints, reasons: np.ndarray[Any, Any]) -> pa.Table:
    reason_of_row = reasons[key_of_row]
    rows = np.flatnonzero(reason_of_row != "")
    rows = rows[np.argsort(key_of_row[rows], kind="stable")]
    taken = table.select(["key", "role", "uri"]).take(pa.array(rows))
    return taken.append_column("reason", pa.array(reason_of_row[rows], pa.string()))


# -- wiring -------------------------------------------------------------------


def scatter(
    item: Mapping[str, Any], *, objects: str, exchange: str, parts: int, parts_per_task: int, seed: int
) -> dict[str, Any]:
    """Deal some of the objects' files to the tasks that join them.

    Returns {number, tasks (JSON): which tasks have a file of it, histogram: bytes of int64}.
    """
    names = json.loads(item["files"])
    table = pa.concat_tables(read_parquet(join(objects, name)) for name in names)
    task = buckets(table["key"], parts) // parts_per_task
    order = np.argsort(task, kind="stable")
    ordered = table.take(pa.array(order))
    dealt = runs(task[order])
    for number, start, stop in dealt:
        uri = exchanged(exchange, number, int(item["number"]))
        write_parquet(uri, ordered.slice(start, stop - start), compression="lz4")
    anchors = table.filter(pc.is_in(table["role"], pa.array(["pair", "target"])))
    return {
        "number": item["number"],
        "tasks": json.dumps([number for number, _, _ in dealt]),
        "histogram": split_histogram(anchors, seed).tobytes(),
    }


def exchanged(exchange: str, task: int, scatter: int) -> str:
    """Where a scattering task leaves what a joining task takes."""
    return join(exchange, f"{task:05d}", f"{scatter:05d}.parquet")


def gather(
    item: Mapping[str, Any],
    *,
    exchange: str,
    output: str,
    roles: Sequence[Role],
    config: PairConfig,
    cuts: tuple[int, int],
    parts: int,
    threads: int,
) -> dict[str, Any]:
    """Join the objects dealt to a task and write its parts. Returns {counts (JSON), files (JSON)}.

    Raises:
        StageError: something has removed what was exchanged.
    """
    dealt = [exchanged(exchange, int(item["task"]), number) for number in json.loads(item["scatters"])]
    with ThreadPoolExecutor(threads) as pool:
        try:
            tables = list(pool.map(read_parquet, dealt))
        except FileNotFoundError as error:
            raise StageError(f"pair: {exchange} was removed while it was in use: run again") from error
        pairs, rejects = join_roles(pa.concat_tables(tables), roles, config, cuts)
        del tables
        files = {
            f"{kind}-{bucket:05d}.parquet": table
            for kind, rows in (("part", pairs), ("rejects", rejects))
            for bucket, table in by_bucket(rows, parts)
        }
        list(pool.map(lambda name: write_parquet(join(output, name), files[name], compression="zstd"), files))
    counts = Counter(pairs["split"].to_pylist())
    reasons = rejects.group_by("reason").aggregate([("key", "count_distinct")])
    counts.update({f"reject_{row['reason']}": row["key_count_distinct"] for row in reasons.to_pylist()})
    return {"counts": json.dumps(counts), "files": json.dumps(list(files))}


def runs(numbers: Ints) -> list[tuple[int, int, int]]:
    """Runs of equal numbers in a sorted array: (number, start, stop)."""
    starts = np.flatnonzero(np.diff(numbers, prepend=-1))
    return [
        (int(numbers[start]), int(start), int(stop))
        for start, stop in zip(starts, np.append(starts, len(numbers))[1:], strict=True)
    ]


def by_bucket(rows: pa.Table, parts: int) -> list[tuple[int, pa.Table]]:
    """Rows cut by the bucket of their key; those of a bucket stay in the order they were in."""
    bucket = buckets(rows["key"], parts)
    order = np.argsort(bucket, kind="stable")
    ordered = rows.take(pa.array(order))
    return [(number, ordered.slice(start, stop - start)) for number, start, stop in runs(bucket[order])]


def run(
    config: PairConfig,
    resources: Resources,
    *,
    output: str,
    track: Run,  # noqa: ARG001 - every stage is given one; the runner logs this one's counts
    objects: str,
) -> Outcome:
    """Pair the objects in folder `objects` into `output`, both absolute folder URIs.

    Raises:
        UserError: the locations' roles cannot make pairs, or the config does not say how.
        StageError: more keys were rejected than the config allows.
    """
    listing = read_json(join(objects, "_listing.json"))
    roles = check_roles(config, listing["roles"])
    layout = Layout.of(config, listing)
    # A name of its own, so that two drivers at once keep apart; the parts they write are the same.
    exchange = join(output, f"{EXCHANGE}{int(time.time())}-{uuid.uuid4().hex}")
    histogram = np.zeros(SPLIT_BINS, np.int64)
    scatters: list[list[int]] = [[] for _ in range(layout.tasks)]  # of each joining task: who dealt to it
    counts: Counter[str] = Counter()
    files: set[str] = set()
    deal = partial(
        scatter,
        objects=objects,
        exchange=exchange,
        parts=layout.parts,
        parts_per_task=layout.parts_per_task,
        seed=config.split.seed,
    )
    with Progress("pair", total=layout.scatters + layout.tasks, unit="tasks") as progress:
        for row in each(deal, layout.items):
            histogram += np.frombuffer(row["histogram"], np.int64)
            for task in json.loads(row["tasks"]):
                scatters[task].append(row["number"])
            progress.advance()
        joining = partial(
            gather,
            exchange=exchange,
            output=output,
            roles=roles,
            config=config,
            cuts=split_cuts(histogram, config.split),
            parts=layout.parts,
            threads=resources.io_threads,
        )
        items = [{"task": n, "scatters": json.dumps(who)} for n, who in enumerate(scatters) if who]
        for row in each(joining, items):
            counts.update(json.loads(row["counts"]))
            files.update(json.loads(row["files"]))
            progress.advance()
    tidy(output, exchange, files)
    return outcome(config, counts, listing["rejected"], output)


def each(task: Callable[[dict[str, Any]], dict[str, Any]], items: list[dict[str, Any]]) -> Iterator[Any]:
    """The task's row for each item, in no order. Raises the task's own error."""
    try:
        yield from ray.data.from_items(items, override_num_blocks=len(items)).map(task).iter_rows()
    except RayError as error:
        raise failure("pair", error) from error


@dataclass(frozen=True, slots=True)
class Layout:
    """How the work is cut; of these numbers only `parts` shows in the output."""

    items: list[dict[str, Any]]  # the objects' files each scattering task reads
    parts: int
    parts_per_task: int

    @classmethod
    def of(cls, config: PairConfig, listing: Mapping[str, Any]) -> Layout:
        """The layout for what ingest listed."""
        roles, files = listing["roles"], listing["files"]
        total = sum(files.values())
        pairs = roles.get("pair", 0) + max(roles.get("source", 0), roles.get("target", 0))
        parts = max(1, -(-pairs // config.pairs_per_shard))
        # Tasks exchange (total / rows) squared files, so large data gets larger tasks: up to 300 MB each.
        rows = min(max(total // 64, ROWS_PER_TASK[0]), ROWS_PER_TASK[1])
        groups: list[list[str]] = []
        held = 0
        for name, count in sorted(files.items()):
            if not groups or held + count > rows:
                groups.append([])
                held = 0
            groups[-1].append(name)
            held += count
        items = [{"number": number, "files": json.dumps(names)} for number, names in enumerate(groups)]
        tasks = min(parts, max(1, -(-total // rows)))
        return cls(items=items, parts=parts, parts_per_task=-(-parts // tasks))

    @property
    def scatters(self) -> int:
        """Tasks that deal objects out."""
        return len(self.items)

    @property
    def tasks(self) -> int:
        """Tasks that join."""
        return -(-self.parts // self.parts_per_task)


def check_roles(config: PairConfig, found: Mapping[str, int]) -> tuple[Role, ...]:
    """The roles every pair has, out of the roles that were listed.

    Raises:
        UserError: source or target cannot come from them.
    """
    there = {role for role, count in found.items() if count}
    if "pair" in there:
        if config.source_half is None:
            raise UserError("pair.source_half: locations have the role pair, so say which half is the source")
        there |= {"source", "target"}
    if config.derive_source:
        if "source" in there:
            raise UserError("pair.derive_source: locations already give sources; it needs targets alone")
        there.add("source")
    for role in ("source", "target"):
        if role not in there:
            raise UserError(f"ingest.locations: none gives an object of role {role} (or pair)")
    return tuple(role for role in ROLES if role in there)


def outcome(config: PairConfig, counts: Mapping[str, int], unusable: int, output: str) -> Outcome:
    """What the stage says of itself. `unusable` objects were rejected when they were listed.

    Raises:
        StageError: more was rejected than the config allows.
    """
    pairs: dict[str, int] = {split: counts.get(split, 0) for split in SPLITS}
    reasons = {name: n for name, n in sorted(counts.items()) if name.startswith("reject_")}
    left_out = reasons.pop("reject_buffer", 0)  # asked for, so not a fault of the data
    rejected = sum(reasons.values()) + unusable
    total = sum(pairs.values()) + rejected
    said = ", ".join(f"{name.removeprefix('reject_')} {n:,}" for name, n in reasons.items())
    said += f", not usable by name {unusable:,}" if unusable else ""
    if rejected > config.max_reject_fraction * total or not any(pairs.values()):
        raise StageError(
            f"pair: {rejected:,} of {total:,} pairs rejected, pair.max_reject_fraction allows "
            f"{config.max_reject_fraction:.3g} ({said or 'there was nothing to pair'}); "
            f"they are listed in {output}/rejects-*.parquet"
        )
    if rejected:
        logger.warning("pair: %d of %d pairs rejected: %s", rejected, total, said)
    return Outcome(
        counts={"pairs": sum(pairs.values()), **pairs, "rejected": rejected, **reasons, "buffer": left_out}
    )


def tidy(output: str, exchange: str, files: set[str]) -> None:
    """Remove the exchanged files, and what killed runs have left: parts of another layout, old exchanges."""
    fs, path = filesystem(output)
    mine = exchange.rpartition("/")[2]
    fs.invalidate_cache()
    for entry in fs.ls(path, detail=True):
        name = entry["name"].rstrip("/").rpartition("/")[2]
        begun = name.removeprefix(EXCHANGE).partition("-")[0]
        if name == mine or (begun.isdigit() and time.time() - int(begun) > EXCHANGE_KEPT):
            with suppress(FileNotFoundError):  # a driver beside this one may tidy up too
                fs.rm(f"{path}/{name}", recursive=True)
        elif name.startswith(("part-", "rejects-")) and name not in files:
            with suppress(FileNotFoundError):
                fs.rm_file(f"{path}/{name}")
