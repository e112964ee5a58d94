"""Pair the images that share a key.

in:  objects-*.parquet   {key, role, split, group, x, y, uri, size, etag}   one object a row
out: part-*.parquet      {key, split, group, and per role R: R_uri, R_size, R_etag, R_crop, R_derive}
     rejects-*.parquet   {key, role, uri, reason, detail}
     _listing.json       the names of the parts

The objects of a key meet by a hash shuffle, so no side is ever in memory as a whole. The hash of a key is
its partition. A first set of tasks (`scatter`) writes each object to the task that joins its partition; a
second set (`gather`) joins the rows of a run of partitions and writes a part for each. The hash is of the key
in lower case: keys that differ only in case meet too, and get a reject reason that says so. A part has about
`pairs_per_shard` pairs and becomes one shard per split. Pairs whose images are inside tables are dealt again
among the partitions of their task, neighbours together (`deal`).

The shuffle goes through Parquet files in the output folder. Ray Data's `groupby` took 34 s for 1 M objects
and 19 s for 10 k on 2 cores (workers' start included) where files took 15 s and 6 s, and it holds all rows in
the memory of its aggregators.
"""

from __future__ import annotations

import hashlib
import logging
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial, reduce
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages import storage
from stages.base import Outcome, Resources, Role, Split
from stages.config.pair import PairConfig, SplitConfig
from stages.errors import StageError, UserError
from stages.objects import cells
from stages.objects.digest import key_hashes
from stages.objects.tables import ROLES, keys_of, reject_text
from stages.parallel.cluster import each
from stages.parallel.monitoring import count_rejected
from stages.progress import Progress

if TYPE_CHECKING:
    from stages.tracking.run import Run

VERSION = 2
ROWS_PER_TASK = (128_000, 1_000_000)  # least, most
SPLIT_BINS = 1 << 16
EXCHANGE = "_exchange-"  # folder of the shuffle's files; followed by its start in seconds and a random name
EXCHANGE_KEPT = 24 * 3600.0  # seconds; a later run deletes exchange folders that are older

logger = logging.getLogger(__name__)

Ints = np.ndarray[Any, np.dtype[np.int64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]

OTHER_HALF: Mapping[str, str] = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
SPLITS: tuple[Split, ...] = ("train", "val", "test")

EXAMPLES = 3  # rejected images that a message quotes
WANTED = ("buffer", "excluded")
"""Reasons of pairs that the config leaves out, so no faults of the data."""
ADVICE: Mapping[str, str] = {
    "duplicate_": "several images of one role have one key: give a table a `key` column (`columns: "
    "{key: null}` numbers the rows of one that holds images), or let the pattern capture more",
    "no_position": "pair.split.regions needs {x} or {y} in the pattern, as its regions have it",
    "no_": "no image of this role has the key: compare the locations' patterns",
    "case_differs": "keys must also agree in upper and lower case",
    "bad_split": "a split is train, val or test, and the same for all images of a key",
}
"""What to do about a reject reason, by how it begins; the first that fits."""


# -- rules: hashes and splits -------------------------------------------------


def partition_of(keys: pa.Array | pa.ChunkedArray, partitions: int) -> Ints:
    """The partition of each key, 0 .. partitions - 1; keys that differ only in case share one."""
    return (key_hashes(pc.utf8_lower(keys)) % np.uint64(partitions)).astype(np.int64)


def split_bins(table: pa.Table, seed: int) -> Ints:
    """The bin of each row, 0 .. SPLIT_BINS - 1: of the hash of its group or, if it has none, its key."""
    return (key_hashes(pc.coalesce(table["group"], table["key"]), seed) >> np.uint64(48)).astype(np.int64)


def split_histogram(table: pa.Table, seed: int) -> Ints:
    """The number of rows without a split in each of the `SPLIT_BINS` bins."""
    loose = table.filter(pc.is_null(table["split"]))
    return np.bincount(split_bins(loose, seed), minlength=SPLIT_BINS)


def split_cuts(histogram: Ints, config: SplitConfig) -> tuple[int, int]:
    """Two bins: rows in bins below the first are val, below the second test, the others train.

    The cuts follow the counts and not the hash's value, so shares are exact up to one group or bin; by the
    hash's value they were off by 1.3 % with 500 pairs. All rows of a group have one hash, so one split.
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
    for region in reversed(config.regions):  # the first region that holds a position counts
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
    objects: pa.Table,
    roles: Sequence[Role],
    config: PairConfig,
    cuts: tuple[int, int],
    excluded: Sequence[str] = (),
) -> tuple[pa.Table, pa.Table]:
    """Pairs, sorted by key, and rejects.

    Args:
        objects: rows of ingest's schema; of each key all rows or none.
        roles: the roles that the data set has; the columns of the pairs.
        config: what makes a pair.
        cuts: from `split_cuts`.
        excluded: keys of pairs to leave out.
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
        rows = np.flatnonzero(role_of_row == number)
        row_of[role] = np.full(len(order), -1, np.int64)
        row_of[role][key_of_row[rows]] = rows
        twice = np.bincount(key_of_row[rows], minlength=len(order)) > 1
        if twice.any():  # a table may hold a row twice
            distinct = objects.group_by(objects.column_names, use_threads=False).aggregate([])
            if distinct.num_rows < objects.num_rows:
                return join_roles(distinct, roles, config, cuts, excluded)
        reasons[twice & (reasons == "")] = f"duplicate_{role}"
    lacking = np.zeros(len(order), bool)
    for role in roles:
        if role not in config.optional:
            lacks = (row_of[role] < 0) & (reasons == "")
            lacking |= lacks
            reasons[lacks] = f"no_{role}"
    reasons[lacking & _case_twins(key_names)] = "case_differs"
    listed = pc.is_in(key_names, pa.array(excluded, pa.string())).to_numpy(zero_copy_only=False)
    reasons[listed & (reasons == "")] = "excluded"

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
    details = np.where(unknown & ~placed, split.to_numpy(zero_copy_only=False), "")
    return pa.table(columns), _rejects(table, key_of_row, reasons, details)


def _case_twins(names: pa.Array) -> Mask:
    """Whether each key differs from another one only in case."""
    lower = pc.utf8_lower(names).dictionary_encode().indices.to_numpy()
    twins: Mask = np.bincount(lower, minlength=1)[lower] > 1 if len(lower) else np.zeros(0, bool)
    return twins


def _shared_columns(
    table: pa.Table, key_of_row: Ints, row_of: Mapping[Role, Ints], count: int, reasons: np.ndarray[Any, Any]
) -> dict[str, pa.Array]:
    """Split, group and position of each pair, from the first role that has them.

    Roles that name different splits get the reason `bad_split`.
    """
    shared: dict[str, pa.Array] = {}
    for name in ("split", "group", "x", "y"):
        column = table[name].combine_chunks()
        value = pa.nulls(count, column.type)
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


def _rejects(
    table: pa.Table, key_of_row: Ints, reasons: np.ndarray[Any, Any], details: np.ndarray[Any, Any]
) -> pa.Table:
    rows = np.flatnonzero(reasons[key_of_row] != "")
    rows = rows[np.argsort(key_of_row[rows], kind="stable")]
    taken = table.select(["key", "role", "uri"]).take(pa.array(rows))
    for name, texts in (("reason", reasons), ("detail", details)):
        taken = taken.append_column(name, pa.array(texts[key_of_row[rows]], pa.string()))
    return taken


def cut(rows: pa.Table, numbers: Ints) -> list[tuple[int, pa.Table]]:
    """The rows of each number, with the number; rows of one number keep their order."""
    order = np.argsort(numbers, kind="stable")
    ordered = rows.take(pa.array(order))
    values, starts = np.unique(numbers[order], return_index=True)
    counts = np.diff(starts, append=len(order))
    return [
        (int(value), ordered.slice(start, count))
        for value, start, count in zip(values, starts, counts, strict=True)
    ]


def deal(pairs: pa.Table, roles: Sequence[Role], partitions: Ints) -> Ints:
    """The partitions of pairs, with those whose images are inside tables dealt again in the tables' order.

    Each partition keeps its number of pairs. Neighbours in a table get the same one, so that a task of the
    shard stage reads few row groups, which are the least that can be read of a table.
    """
    uris = [pairs[f"{role}_uri"] for role in roles]
    in_table = [pc.fill_null(pc.starts_with(uri, cells.SCHEME), False) for uri in uris]
    inside = np.flatnonzero(reduce(pc.or_, in_table).to_numpy())
    if not len(inside):
        return partitions
    place = pc.coalesce(*(cells.places(uri.take(pa.array(inside))) for uri in uris))
    order = inside[pc.sort_indices(place).to_numpy()]
    dealt = partitions.copy()
    dealt[order] = np.sort(partitions[inside])
    return dealt


# -- the shuffle, without Ray -------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shuffle:
    """Where and how the tasks exchange rows. Only `partitions` shows in the output."""

    objects: str  # folder of ingest's files
    exchange: str  # folder of the files between the tasks
    partitions: int
    partitions_per_task: int
    seed: int

    def file(self, gather: int, scatter: int) -> str:
        """The file that one scattering task writes for one gathering task."""
        return storage.join(self.exchange, f"{gather:05d}", f"{scatter:05d}.parquet")


@dataclass(frozen=True, slots=True)
class ScatterTask:
    """Files of objects that one task reads, and the task's number."""

    number: int
    files: Sequence[str]


@dataclass(frozen=True, slots=True)
class Scattered:
    """The gathering tasks that a scattering task wrote a file for, and its part of the split histogram."""

    number: int
    gathers: Sequence[int]
    histogram: Ints


@dataclass(frozen=True, slots=True)
class GatherTask:
    """One run of partitions to join, and the scattering tasks that wrote a file for it."""

    number: int
    scatters: Sequence[int]


@dataclass(frozen=True, slots=True)
class Gathered:
    """What a gathering task wrote: files, pairs by split and rejects by reason, the text of some rejects."""

    files: Sequence[str]
    counts: Counter[str]
    examples: Sequence[str]


def scatter(task: ScatterTask, *, shuffle: Shuffle) -> Scattered:
    """Write some of the objects to the tasks that join them."""
    table = pa.concat_tables(storage.read_parquet(storage.join(shuffle.objects, name)) for name in task.files)
    gathers = cut(table, partition_of(table["key"], shuffle.partitions) // shuffle.partitions_per_task)
    for number, rows in gathers:
        storage.write_parquet(shuffle.file(number, task.number), rows, compression="lz4")
    anchors = table.filter(pc.is_in(table["role"], pa.array(["pair", "target"])))
    histogram = split_histogram(anchors, shuffle.seed)
    return Scattered(task.number, [number for number, _ in gathers], histogram)


def gather(
    task: GatherTask,
    *,
    shuffle: Shuffle,
    output: str,
    roles: Sequence[Role],
    config: PairConfig,
    cuts: tuple[int, int],
    threads: int,
    excluded: Sequence[str] = (),
) -> Gathered:
    """Join the objects of a run of partitions and write their parts and rejects.

    Raises:
        StageError: the exchanged files were removed.
    """
    exchanged = [shuffle.file(task.number, number) for number in task.scatters]
    with ThreadPoolExecutor(threads) as pool:
        try:
            tables = list(pool.map(storage.read_parquet, exchanged))
        except FileNotFoundError as error:
            raise StageError(
                f"pair: {shuffle.exchange} was removed while it was in use: run again"
            ) from error
        pairs, rejects = join_roles(pa.concat_tables(tables), roles, config, cuts, excluded)
        del tables
        partitions = deal(pairs, roles, partition_of(pairs["key"], shuffle.partitions))
        numbers = {"part": partitions, "rejects": partition_of(rejects["key"], shuffle.partitions)}
        files = {
            f"{kind}-{partition:05d}.parquet": table
            for kind, rows in (("part", pairs), ("rejects", rejects))
            for partition, table in cut(rows, numbers[kind])
        }

        def write(name: str) -> None:
            storage.write_parquet(storage.join(output, name), files[name], compression="zstd")

        list(pool.map(write, files))
    counts = Counter(pairs["split"].to_pylist())
    reasons = rejects.group_by("reason").aggregate([("key", "count_distinct")])
    counts.update({f"reject_{row['reason']}": row["key_count_distinct"] for row in reasons.to_pylist()})
    faults = rejects.filter(pc.invert(pc.is_in(rejects["reason"], pa.array(WANTED))))
    return Gathered(list(files), counts, list(map(reject_text, faults.slice(0, EXAMPLES).to_pylist())))


@dataclass(frozen=True, slots=True)
class Layout:
    """How the work is cut into tasks; of these numbers only `partitions` shows in the output."""

    scatters: Sequence[ScatterTask]
    partitions: int
    partitions_per_task: int

    @classmethod
    def of(cls, config: PairConfig, listing: Mapping[str, Any]) -> Layout:
        """The layout for a listing of ingest's."""
        roles, files = listing["roles"], listing["files"]
        total = sum(files.values())
        pairs = roles.get("pair", 0) + max(roles.get("source", 0), roles.get("target", 0))
        partitions = max(1, -(-pairs // config.pairs_per_shard))
        # Tasks exchange (total / rows) squared files, so large data get larger tasks: up to 300 MB each.
        rows = min(max(total // 64, ROWS_PER_TASK[0]), ROWS_PER_TASK[1])
        if any("inside_tables" in location for location in listing.get("locations", ())):
            rows = ROWS_PER_TASK[1]  # each task's pairs are in all row groups, so each reads the whole tables
        groups: list[list[str]] = []
        group_rows = 0
        for name, count in sorted(files.items()):
            if not groups or group_rows + count > rows:
                groups.append([])
                group_rows = 0
            groups[-1].append(name)
            group_rows += count
        scatters = [ScatterTask(number, names) for number, names in enumerate(groups)]
        gathers = min(partitions, max(1, -(-total // rows)))
        return cls(scatters, partitions, partitions_per_task=-(-partitions // gathers))

    @property
    def gathers(self) -> int:
        """The number of tasks that join."""
        return -(-self.partitions // self.partitions_per_task)


def excluded_keys(config: PairConfig) -> list[str]:
    """The keys that `pair.exclude` lists, sorted. Raises UserError if it cannot be read or has none."""
    if config.exclude is None:
        return []
    with storage.located(f"pair.exclude: {config.exclude}"):
        return sorted(set(keys_of(storage.absolute(config.exclude))))


def digest(config: PairConfig) -> str:
    """A digest of the keys that are left out."""
    return hashlib.sha256("\n".join(map(repr, excluded_keys(config))).encode()).hexdigest()


def check_roles(config: PairConfig, objects: Mapping[str, int]) -> tuple[Role, ...]:
    """The roles of every pair, from the number of listed objects of each role.

    Raises:
        UserError: source or target cannot come from them.
    """
    roles = {role for role, count in objects.items() if count}
    if "pair" in roles:
        if config.source_half is None:
            raise UserError("pair.source_half: locations have the role pair, so say which half is the source")
        roles |= {"source", "target"}
    if config.derive_source:
        if "source" in roles:
            raise UserError("pair.derive_source: locations already give sources; it needs targets alone")
        roles.add("source")
    for role in ("source", "target"):
        if role not in roles:
            raise UserError(
                f"ingest.locations: none gives an object of role {role} (or pair, or a table's column {role})"
            )
    return tuple(role for role in ROLES if role in roles)


def outcome(
    config: PairConfig, counts: Mapping[str, int], unusable: int, output: str, examples: Sequence[str] = ()
) -> Outcome:
    """The stage's counts; `unusable` objects were rejected when they were listed.

    examples: some rejected images, for the message

    Raises:
        StageError: more was rejected than the config allows.
    """
    pairs: dict[str, int] = {split: counts.get(split, 0) for split in SPLITS}
    reasons = {name: n for name, n in sorted(counts.items()) if name.startswith("reject_")}
    wanted = {reason: reasons.pop(f"reject_{reason}", 0) for reason in WANTED}
    rejected = sum(reasons.values()) + unusable
    total = sum(pairs.values()) + rejected
    named = {name.removeprefix("reject_"): n for name, n in reasons.items()}
    named |= {"left out by ingest": unusable} if unusable else {}
    text = ", ".join(f"{name} {n:,}" for name, n in named.items())
    if rejected > config.max_reject_fraction * total or not any(pairs.values()):
        raise StageError(
            f"pair: {rejected:,} of {total:,} pairs rejected, pair.max_reject_fraction allows "
            f"{config.max_reject_fraction:.3g} ({text or 'there was nothing to pair'}), "
            + "".join(f"{example}; " for example in examples[:EXAMPLES])
            + "".join(f"{advice}; " for advice in dict.fromkeys(map(_advice, reasons)) if advice)
            + f"{output}/rejects-*.parquet lists them"
        )
    if rejected:
        logger.warning("pair: %d of %d pairs rejected: %s", rejected, total, text)
    return Outcome(counts={"pairs": sum(pairs.values()), **pairs, "rejected": rejected, **reasons, **wanted})


def _advice(count: str) -> str:
    reason = count.removeprefix("reject_")
    return next((text for start, text in ADVICE.items() if reason.startswith(start)), "")


def tidy(output: str, exchange: str, files: set[str]) -> None:
    """Remove the exchanged files, and what killed runs left: parts of another layout, old exchanges."""
    for name in storage.list_folders(output):
        start = name.removeprefix(EXCHANGE).partition("-")[0]
        if name == exchange.rpartition("/")[2] or (
            start.isdigit() and time.time() - int(start) > EXCHANGE_KEPT
        ):
            storage.remove(storage.join(output, name))
    for name in storage.list_names(output):
        if name.startswith(("part-", "rejects-")) and name not in files:
            storage.remove(storage.join(output, name))


# -- wiring: the only function here that needs Ray ----------------------------


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
    excluded = excluded_keys(config)
    listing = storage.read_json(storage.join(objects, "_listing.json"))
    roles = check_roles(config, listing["roles"])
    layout = Layout.of(config, listing)
    # A random name keeps two drivers apart; the parts they write are the same.
    exchange = storage.join(output, f"{EXCHANGE}{int(time.time())}-{uuid.uuid4().hex}")
    shuffle = Shuffle(objects, exchange, layout.partitions, layout.partitions_per_task, config.split.seed)
    histogram = np.zeros(SPLIT_BINS, np.int64)
    scatters: defaultdict[int, list[int]] = defaultdict(list)  # of each gathering task
    counts: Counter[str] = Counter()
    files: set[str] = set()
    examples: list[str] = listing["examples"]
    with Progress("pair", total=len(layout.scatters) + layout.gathers, unit="tasks") as progress:
        for part in each(partial(scatter, shuffle=shuffle), layout.scatters, stage="pair"):
            histogram += part.histogram
            for number in part.gathers:
                scatters[number].append(part.number)
            progress.advance()
        call = partial(
            gather,
            shuffle=shuffle,
            output=output,
            roles=roles,
            config=config,
            cuts=split_cuts(histogram, config.split),
            threads=resources.io_threads,
            excluded=excluded,
        )
        tasks = [GatherTask(number, sorted(scatters[number])) for number in sorted(scatters)]
        for done in each(call, tasks, stage="pair"):
            counts.update(done.counts)
            reasons = {name: n for name, n in done.counts.items() if name.startswith("reject_")}
            count_rejected("pair", {name.removeprefix("reject_"): n for name, n in reasons.items()})
            files.update(done.files)
            examples += done.examples
            progress.advance()
    tidy(output, exchange, files)
    parts = sorted(name for name in files if name.startswith("part-"))
    storage.write_json(storage.join(output, "_listing.json"), {"parts": parts})
    if (count := counts["reject_excluded"]) < len(excluded):
        logger.warning(
            "pair.exclude: %s lists %d keys, and %d are of pairs", config.exclude, len(excluded), count
        )
    return outcome(config, counts, listing["rejected"], output, examples)
