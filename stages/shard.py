"""Fetch, verify, decode and normalise every pair once.

in:  part-<bucket>.parquet         {key, split, group, per role R: R_uri, R_size, R_etag, R_crop, R_derive}
out: <split>-<bucket>.parquet      {key, group, per role R: R, R_crc, R_uri, R_width, R_height, R_mean, ...}
     quarantine-<bucket>.parquet   {key, role, uri, reason, detail}
     _parts/<bucket>.json          written last for each bucket: what came of it
     dataset.json, card.json, card.md, samples.png

One task a bucket, which reads its objects with many threads and never holds more than a row group of images.
A bucket whose marker is there is not done again. All names and bytes follow from the input, so two runs that
write the same folder write the same files.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from stages import storage
from stages.base import Encoding, Kind, Outcome, Resources, Role, Split
from stages.config.shard import ShardConfig
from stages.errors import PixloomError, StageError, UserError
from stages.images import colour, decode, encode, geometry, kinds
from stages.images.derive import derive
from stages.images.kinds import Array, ImageRejected
from stages.models.fast.heap import keep_freed_memory
from stages.objects.fetch import Object, Reader, in_order
from stages.progress import Progress
from stages.shards import card, dataset
from stages.shards.card import Statistics
from stages.shards.dataset import DatasetSpec, RoleSpec, ShardFile

if TYPE_CHECKING:
    from stages.tracking.run import Run

VERSION = 1

ROW_GROUP_BYTES = 8 << 20  # a row group is what training reads at once: big enough for a fast GET
ROW_GROUP_ROWS = 64
DECODERS = 4  # images unpacked at once by a task: bounds memory, whatever the number of reading threads
TASK_BLOCKS = 4096  # Ray Data blocks at most; beyond that a block holds several buckets
ASPECT_TOLERANCE = 0.02
DEFAULT_KINDS: Mapping[Role, Kind] = {
    "source": "rgb",
    "target": "rgb",
    "label": "labels",
    "instance": "instances",
    "features": "channels",
}
# What an encoding leaves of raw bytes, for the choice of row group alone.
_SHRINKS: Mapping[Encoding, float] = {"raw": 1.0, "png": 0.5, "jpeg": 0.15, "webp": 0.1}

logger = logging.getLogger(__name__)


QUARANTINE = pa.schema(
    {
        "key": pa.string(),
        "role": pa.string(),
        "uri": pa.string(),
        "reason": pa.string(),
        "detail": pa.string(),
    }
)


# -- rules: an image, a pair --------------------------------------------------


def role_specs(config: ShardConfig, roles: Iterable[Role]) -> dict[Role, RoleSpec]:
    """How each role is read, and stored but for `features`. Raises UserError if a number is missing."""
    specs: dict[Role, RoleSpec] = {}
    for role in roles:
        kind = config.kinds.get(role, DEFAULT_KINDS[role])
        if kind == "labels" and config.classes is None:
            raise UserError(f"shard.classes: role '{role}' holds label ids, say how many there are")
        if role == "features" and config.features is None:
            raise UserError("shard.features: there are feature maps, say how many channels they have")
        count = config.features if role == "features" else config.channels
        specs[role] = RoleSpec(
            kind=kind,
            encoding=encode.stored_encoding(kind, config.encoding),
            classes=config.classes if kind == "labels" else None,
            channel_count=count if kind == "channels" else None,
        )
    return specs


def stored_specs(specs: Mapping[Role, RoleSpec]) -> dict[Role, RoleSpec]:
    """How each role is stored: features become channels of the source, after its own (or its classes)."""
    stored: dict[Role, RoleSpec] = {role: spec for role, spec in specs.items() if role != "features"}
    if "features" in specs:
        count = (specs["source"].classes or specs["source"].channels) + specs["features"].channels
        encoding = encode.stored_encoding("channels", specs["source"].encoding)
        stored["source"] = RoleSpec(kind="channels", encoding=encoding, channel_count=count)
    return stored


def with_features(source: Array, spec: RoleSpec, features: Array) -> Array:
    """A source as networks see it (H, W, C), one-hot if it holds ids, then its features: float32."""
    if spec.classes is not None:
        seen = (source == np.arange(spec.classes, dtype=np.uint8)).astype(np.float32)
    else:
        seen = kinds.normalise(source, spec.kind)
    return np.concatenate([seen, features], axis=2)


def row_group_rows(config: ShardConfig, specs: Mapping[Role, RoleSpec]) -> int:
    """Rows of a row group: the config's, or as many as make about `ROW_GROUP_BYTES`."""
    if config.row_group_rows is not None:
        return config.row_group_rows
    width, height = config.size
    row = sum(
        width * height * spec.channels * kinds.dtype(spec.kind).itemsize * _SHRINKS[spec.encoding]
        for spec in specs.values()
    )
    return max(1, min(ROW_GROUP_ROWS, int(ROW_GROUP_BYTES / row)))


def check_labels(ids: Array, config: ShardConfig) -> Array:
    """Label ids with the ignored one mapped to the void class. Raises ImageRejected `label_range`."""
    assert config.classes is not None
    if config.ignore_label is not None:
        void = config.classes - 1 if config.void_class is None else config.void_class
        ids = np.where(ids == config.ignore_label, np.uint8(void), ids)
    if ids.size and int(ids.max()) >= config.classes:
        raise ImageRejected("label_range", f"id {int(ids.max())}, classes are 0..{config.classes - 1}")
    return ids


def same_shape(sizes: Mapping[Role, tuple[int, int]]) -> None:
    """Images of a pair must show the same frame: one aspect ratio within 2 %, or a pixel of rounding.

    Their resolutions may differ, as those of a photo and a smaller label map do. Raises ImageRejected.
    """
    widest = max(sizes.values())
    for role, (width, height) in sizes.items():
        expected = width * widest[1] / widest[0]
        if abs(height - expected) > max(1.0, ASPECT_TOLERANCE * expected):
            raise ImageRejected(
                "size_mismatch", f"{role} is {width}x{height}, another role {widest[0]}x{widest[1]}"
            )


@dataclass(frozen=True, slots=True)
class Stored:
    """An image as it goes into a shard."""

    data: bytes
    crc: int
    uri: str
    original: tuple[int, int]
    measures: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Reject:
    """A pair that cannot be used, and which of its images is to blame."""

    key: str
    role: str
    uri: str
    reason: str
    detail: str


@dataclass(slots=True)
class Pair:
    """A pair ready to be written."""

    key: str
    split: Split
    group: str | None
    stored: dict[Role, Stored] = field(default_factory=dict)


class Maker:
    """Makes pairs out of rows. Its rules are those above; what it holds is how objects are read."""

    def __init__(self, config: ShardConfig, specs: Mapping[Role, RoleSpec], reader: Reader) -> None:
        self.config, self.specs, self.reader = config, specs, reader
        self.stored = stored_specs(specs)
        self._decoding = threading.Semaphore(DECODERS)

    def __call__(self, row: Mapping[str, Any]) -> Pair | Reject:
        """The pair of a row, or why there is none. Raises UserError, StageError if the store fails."""
        pair = Pair(row["key"], row["split"], row.get("group"))
        sizes: dict[Role, tuple[int, int]] = {}
        fetched: dict[str, bytes] = {}
        decoded: dict[tuple[str, Kind], Array] = {}
        arrays: dict[Role, Array] = {}
        for role, spec in self.specs.items():
            uri = row.get(f"{role}_uri")
            if uri is None:
                continue  # optional, and this pair lacks it
            try:
                if uri not in fetched:
                    fetched[uri] = self.reader.read(_object(row, role))
                with self._decoding:
                    arrays[role], sizes[role] = self._image(row, role, spec, fetched[uri], decoded)
                same_shape(sizes)
            except ImageRejected as why:
                return Reject(pair.key, role, uri, why.reason, why.detail)
        if "features" in arrays:
            arrays["source"] = with_features(arrays["source"], self.specs["source"], arrays.pop("features"))
        for role, array in arrays.items():
            with self._decoding:
                stored = self._store(array, self.stored[role], row[f"{role}_uri"], sizes[role])
            pair.stored[role] = stored
        return pair

    def _image(
        self,
        row: Mapping[str, Any],
        role: Role,
        spec: RoleSpec,
        data: bytes,
        decoded: dict[tuple[str, Kind], Array],
    ) -> tuple[Array, tuple[int, int]]:
        """The array at load size, and the size (width, height) it had."""
        config, recipe = self.config, row.get(f"{role}_derive") or ""
        kind: Kind = "rgb" if recipe else spec.kind
        place = (row[f"{role}_uri"], kind)
        if place not in decoded:
            decoded[place] = decode.decode_image(
                data,
                kind,
                max_pixels=config.max_pixels,
                channels=spec.channel_count,
                min_side=config.min_side,
            )
        whole = geometry.crop_half(decoded[place], row.get(f"{role}_crop") or "")
        size = (whole.shape[1], whole.shape[0])
        if kind == "labels":
            whole = check_labels(whole, config)
        array = geometry.resize(whole, config.size, kind)
        if recipe:
            array = derive(array, recipe, key=row["key"], kind=spec.kind, factor=config.downscale)
        elif spec.kind in ("lab_l", "lab_ab"):
            array = colour.lab_channels(array, spec.kind)
        return array, size

    def _store(self, array: Array, spec: RoleSpec, uri: str, size: tuple[int, int]) -> Stored:
        data = encode.encode_image(array, spec.encoding, quality=self.config.quality)
        return Stored(data, encode.checksum(data), uri, size, card.measures(array, spec.kind))


def _object(row: Mapping[str, Any], role: Role) -> Object:
    size, etag = row.get(f"{role}_size"), row.get(f"{role}_etag")
    return Object(row[f"{role}_uri"], -1 if size is None else int(size), etag or "")


# -- files --------------------------------------------------------------------


def schema(specs: Mapping[Role, RoleSpec]) -> pa.Schema:
    """Columns of a shard (docs/data.md explains them)."""
    fields = [pa.field("key", pa.string(), nullable=False), pa.field("group", pa.string())]
    for role, spec in specs.items():
        fields += [
            pa.field(role, pa.binary()),
            pa.field(f"{role}_crc", pa.uint32()),
            pa.field(f"{role}_uri", pa.string()),
            pa.field(f"{role}_width", pa.int32()),
            pa.field(f"{role}_height", pa.int32()),
        ]
        if spec.kind in kinds.IDS:
            fields.append(pa.field(f"{role}_ids", pa.list_(pa.int32())))
        else:
            fields.append(pa.field(f"{role}_mean", pa.list_(pa.float32())))
            fields.append(pa.field(f"{role}_std", pa.list_(pa.float32())))
            fields.append(pa.field(f"{role}_hash", pa.uint64()))
    return pa.schema(fields)


def table(pairs: Sequence[Pair], shape: pa.Schema, specs: Mapping[Role, RoleSpec]) -> pa.Table:
    """Pairs as rows of a shard."""
    columns: dict[str, list[Any]] = {"key": [p.key for p in pairs], "group": [p.group for p in pairs]}
    for role in specs:
        found = [p.stored.get(role) for p in pairs]
        columns[role] = [s and s.data for s in found]
        columns[f"{role}_crc"] = [s and s.crc for s in found]
        columns[f"{role}_uri"] = [s and s.uri for s in found]
        columns[f"{role}_width"] = [s and s.original[0] for s in found]
        columns[f"{role}_height"] = [s and s.original[1] for s in found]
        for name in ("ids", "mean", "std", "hash"):
            if f"{role}_{name}" in shape.names:
                columns[f"{role}_{name}"] = [s and s.measures[name] for s in found]
    return pa.table(columns, schema=shape)


class ShardWriter:
    """Writes one shard to a file, a row group at a time."""

    def __init__(self, name: str, file: Any, specs: Mapping[Role, RoleSpec], rows: int) -> None:
        self.name, self.file, self.rows = name, file, rows
        self.specs, self.shape = specs, schema(specs)
        self.groups: list[int] = []
        self.waiting: list[Pair] = []
        plain = [name for name in self.shape.names if name not in specs]
        # LZ4 takes raw id maps to a few per cent; photos hardly at all, and unpacking them would be a third
        # of the time it takes to make a batch.
        packed = {r for r, spec in specs.items() if spec.encoding == "raw" and spec.kind in kinds.IDS}
        self.writer = pq.ParquetWriter(
            self.file,
            self.shape,
            compression={name: "lz4" if name in packed else "none" for name in self.shape.names},
            use_dictionary=False,
            # An image's own checksum says that it is sound; that of a page, that the store's client was.
            write_page_checksum=True,
            # Statistics of an image column would be images.
            write_statistics=[n for n in plain if not n.endswith(("_ids", "_mean", "_std"))],
        )

    def add(self, pair: Pair) -> None:
        """Append a pair."""
        self.waiting.append(pair)
        if len(self.waiting) == self.rows:
            self._flush()

    def _flush(self) -> None:
        if self.waiting:
            self.writer.write_table(table(self.waiting, self.shape, self.specs))
            self.groups.append(len(self.waiting))
            self.waiting = []

    def finish(self) -> dict[str, Any]:
        """Write what is left; what the marker says of the shard."""
        self._flush()
        self.writer.close()
        rows, size = sum(self.groups), self.file.tell()
        return {"name": self.name, "rows": rows, "row_groups": self.groups, "bytes": size}

    def abandon(self) -> None:
        """Let go of the file, however it is; after `finish` there is nothing to do."""
        with suppress(Exception):  # the trouble that led here is what the user hears of
            self.writer.close()


def shard_part(
    part: str, *, output: str, config: ShardConfig, specs: Mapping[Role, RoleSpec], io_threads: int
) -> dict[str, Any]:
    """Make one bucket's files; returns its marker, which an earlier run may have left already.

    Raises:
        UserError, StageError: the store refuses, or stays away.
    """
    bucket = bucket_of(part)
    marker = storage.join(output, "_parts", f"{bucket:05d}.json")
    done = _marker(marker)
    if done is not None:
        return done
    rows = storage.read_parquet(part).to_pylist()
    make = partial(_make, rows, bucket, output=output, config=config, specs=specs, io_threads=io_threads)
    # Made again if the store is away for longer than its client is patient.
    summary = storage.written(make, output)
    storage.write_json(marker, summary)
    return summary


def _make(
    rows: Sequence[Mapping[str, Any]],
    bucket: int,
    *,
    output: str,
    config: ShardConfig,
    specs: Mapping[Role, RoleSpec],
    io_threads: int,
) -> dict[str, Any]:
    """Write a bucket's shards and quarantine; returns its marker."""
    stored = stored_specs(specs)
    reader = Reader()
    reader.stream_archives(_object(row, role) for row in rows for role in specs if row.get(f"{role}_uri"))
    statistics: dict[Split, Statistics] = {}
    rejects: list[Reject] = []
    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(io_threads, thread_name_prefix="shard"))
        writers: dict[Split, ShardWriter] = {}
        for made in in_order(threads, Maker(config, specs, reader), rows, ahead=2 * io_threads):
            if isinstance(made, Reject):
                rejects.append(made)
                continue
            if made.split not in writers:
                name = f"{made.split}-{bucket:05d}.parquet"
                file = stack.enter_context(storage.create(storage.join(output, name)))
                writer = ShardWriter(name, file, stored, row_group_rows(config, stored))
                writers[made.split] = writer
                stack.callback(writer.abandon)
                statistics[made.split] = Statistics()
            for role, image in made.stored.items():
                statistics[made.split].add(role, image.measures, image.original)
            writers[made.split].add(made)
        files = {split: writer.finish() for split, writer in sorted(writers.items())}
    _write_quarantine(output, bucket, rejects)
    return {
        "bucket": bucket,
        "rows": len(rows),
        "files": files,
        "rejects": dict(Counter(reject.reason for reject in rejects)),
        "statistics": {split: found.to_json() for split, found in sorted(statistics.items())},
    }


def bucket_of(part: str) -> int:
    """The bucket's number in a part's name."""
    found = re.search(r"part-(\d+)\.parquet$", part)
    assert found, part
    return int(found[1])


def _marker(uri: str) -> dict[str, Any] | None:
    try:
        return cast(dict[str, Any], storage.read_json(uri))
    except FileNotFoundError:
        return None


def _write_quarantine(output: str, bucket: int, rejects: Sequence[Reject]) -> None:
    if rejects:
        columns = {name: [getattr(reject, name) for reject in rejects] for name in QUARANTINE.names}
        uri = storage.join(output, f"quarantine-{bucket:05d}.parquet")
        storage.write_parquet(uri, pa.table(columns, schema=QUARANTINE), compression="zstd")


# -- wiring -------------------------------------------------------------------


def run(config: ShardConfig, resources: Resources, *, output: str, track: Run, pairs: str) -> Outcome:
    """Make shards of all parts in `pairs`.

    Raises:
        UserError: no pairs, `classes` missing, or a store that refuses access.
        StageError: more than `max_reject_fraction` of the pairs were rejected, or a store stayed away.
    """
    parts = list(storage.parquet_parts(pairs, "part-"))
    if not parts:
        raise UserError(f"{pairs}: there are no pairs")
    specs = role_specs(config, roles_of(parts[0]))
    done = Summary()
    with Progress("shard", total=None, unit="pairs") as progress:
        for summary in _summaries(parts, output, config, specs, resources.io_threads):
            done.add(summary)
            progress.advance(summary["rows"], f"{len(done.buckets):,}/{len(parts):,} parts")
    done.check(config.max_reject_fraction, output)
    spec = DatasetSpec(size=config.size, roles=stored_specs(specs), splits=done.splits())
    leaks = card.leakage(output, spec)
    written = card.write(output, spec, done.statistics, done.rejects, leaks)
    dataset.save(output, spec)
    for name, data in written.items():
        track.artifact(f"dataset/{name}", data)
    return Outcome(counts=done.counts() | {"leaks": leaks.found}, metrics={"bytes": float(done.bytes)})


def roles_of(part: str) -> list[Role]:
    """The roles that a pair part has columns for."""
    fs, path = storage.filesystem(part)
    with fs.open(path, "rb") as file:
        names = pq.read_schema(file).names
    return [role for role in get_args(Role) if f"{role}_uri" in names]


@dataclass(slots=True)
class Summary:
    """What all buckets together came to: files and sums, no keys."""

    rows: int = 0
    bytes: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    buckets: dict[int, dict[Split, ShardFile]] = field(default_factory=dict)
    statistics: dict[Split, Statistics] = field(default_factory=dict)

    def add(self, marker: Mapping[str, Any]) -> None:
        """Take up one bucket's marker."""
        self.rows += marker["rows"]
        self.rejects.update(marker["rejects"])
        self.buckets[marker["bucket"]] = {
            split: ShardFile(name=f["name"], rows=f["rows"], row_groups=tuple(f["row_groups"]))
            for split, f in marker["files"].items()
        }
        self.bytes += sum(f["bytes"] for f in marker["files"].values())
        for split, found in marker["statistics"].items():
            self.statistics.setdefault(split, Statistics()).merge(found)

    def splits(self) -> dict[Split, tuple[ShardFile, ...]]:
        """The files of each split, in the buckets' order."""
        ordered = [files for _, files in sorted(self.buckets.items())]
        found = {
            split: tuple(files[split] for files in ordered if split in files) for split in get_args(Split)
        }
        return {split: files for split, files in found.items() if files}

    def counts(self) -> dict[str, int]:
        """Counts for the outcome."""
        per_split = {split: sum(f.rows for f in files) for split, files in self.splits().items()}
        rejected = {f"rejected_{reason}": n for reason, n in sorted(self.rejects.items())}
        total = {"pairs": self.rows, "rejected": sum(self.rejects.values())}
        return total | {"shards": sum(len(b) for b in self.buckets.values())} | per_split | rejected

    def check(self, limit: float, output: str) -> None:
        """Raise StageError if the share of rejected pairs is over the limit, or nothing is left."""
        bad = sum(self.rejects.values())
        if bad <= limit * self.rows and bad < self.rows:
            return
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in self.rejects.most_common(8))
        raise StageError(
            f"shard: {bad:,} of {self.rows:,} pairs were rejected ({bad / max(1, self.rows):.1%}, "
            f"shard.max_reject_fraction allows {limit:.1%}): {reasons}. Which and why is in "
            f"{output}/quarantine-*.parquet"
        )


def _summaries(
    parts: Sequence[str], output: str, config: ShardConfig, specs: Mapping[Role, RoleSpec], io_threads: int
) -> Iterator[dict[str, Any]]:
    """Markers of all buckets as they are done."""
    task = partial(_task, output=output, config=config, specs=dict(specs), io_threads=io_threads)
    blocks = min(len(parts), TASK_BLOCKS)
    made = ray.data.from_items([{"part": p} for p in parts], override_num_blocks=blocks).map(
        task,
        num_cpus=0.5,  # a task waits for the store about half its time
    )
    for row in made.iter_rows():
        if row["error"]:
            raise {"UserError": UserError, "StageError": StageError}[row["kind"]](row["error"])
        yield json.loads(row["summary"])


def _task(row: Mapping[str, Any], **settings: Any) -> dict[str, str]:
    """`shard_part` for Ray: errors on purpose travel as data, and arrive as the one line they are."""
    keep_freed_memory()
    try:
        summary = shard_part(row["part"], **settings)
    except PixloomError as error:
        return {"summary": "", "error": str(error), "kind": type(error).__name__}
    return {"summary": json.dumps(summary), "error": "", "kind": ""}
