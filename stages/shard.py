"""Fetch, verify, decode and normalise every pair once.

in:  part-<n>.parquet         {key, split, group, per role R: R_uri, R_size, R_etag, R_crop, R_derive}
out: <split>-<n>.parquet      {key, group, per role R: R, R_crc, R_uri, R_width, R_height, R_mean, ...}
     signs-<split>-<n>.parquet  of each pair, what the search for wrong ones needs (`shards.suspects`)
     quarantine-<n>.parquet   {key, role, uri, reason, detail}
     _parts/<n>.json          the partition's marker, written last: its files, rejects and statistics
     _parts/groups/<n>.json   the sum of a thousand markers, all that a rerun reads (`storage.finished`)
     dataset.parquet, card.json, card.md, samples.png, suspects.csv

One task does one partition <n> of the pairs: it reads objects with many threads and holds no more than a row
group of images. A partition that has a marker is not done again. All names and bytes follow from the input,
so two runs that write to one folder write the same files.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages import storage
from stages.base import Encoding, Kind, Outcome, Resources, Role, Split
from stages.config.shard import ShardConfig
from stages.errors import StageError, UserError
from stages.images import colour, decode, encode, geometry, kinds
from stages.images.decode import Decoded
from stages.images.derive import derive
from stages.images.kinds import Array, ImageRejected
from stages.models.architecture import Picture
from stages.models.fast.heap import keep_freed_memory
from stages.objects.fetch import Object, Reader
from stages.objects.tables import REJECTS
from stages.parallel.cluster import each
from stages.parallel.monitoring import count_rejected
from stages.parallel.threads import prefetch_map
from stages.progress import Progress
from stages.shards import card, dataset, suspects
from stages.shards.card import Statistics
from stages.shards.dataset import DatasetSpec, RoleSpec, ShardFile, ShardFiles
from stages.storage.finished import GROUP, Finished
from stages.storage.local import local_file

if TYPE_CHECKING:
    from stages.tracking.run import Run

VERSION = 5

ROW_GROUP_BYTES = 8 << 20  # a row group is what training reads at once: big enough for a fast GET
ROW_GROUP_ROWS = 64
DECODERS = 4  # images that a task decodes at the same time: bounds memory, however many threads read
ASPECT_TOLERANCE = 0.02
EXAMPLES = 3  # rejected pairs that a message quotes
ADVICE: Mapping[str, str] = {
    "label_range": "shard.palette lists the values or colours of the classes in order, [0, 255] for masks; "
    "shard.ignore_label reads one id as void_class",
    "wrong_kind": "shard.kinds says what a role holds; shard.palette reads label maps that are colours",
    "value_range": "shard.range: [low, high] scales other values",
    "size_mismatch": "shard.fit: crop or stretch takes pairs of different shapes",
    "too_large": "shard.max_pixels sets the limit",
    "too_small": "shard.min_side sets the limit",
}
"""The setting that helps, by reason."""
DEFAULT_KINDS: Mapping[Role, Kind] = {
    "source": "rgb",
    "target": "rgb",
    "label": "labels",
    "instance": "instances",
    "features": "channels",
}
# Encoded bytes per raw byte, about; only the size of row groups depends on it.
_ENCODED_SHARE: Mapping[Encoding, float] = {"raw": 1.0, "png": 0.5, "jpeg": 0.15, "webp": 0.1}

logger = logging.getLogger(__name__)

T = TypeVar("T")


# -- rules: an image, a pair --------------------------------------------------


def role_specs(config: ShardConfig, roles: Iterable[Role]) -> dict[Role, RoleSpec]:
    """How each role's images are read. Raises UserError if the config lacks a number that a role needs."""
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
            ignore_label=config.ignore_label if kind == "labels" else None,
            void_class=config.void_class if kind == "labels" else None,
            palette=_of_role(config.palette, role, None) if kind == "labels" else None,
            range=_of_role(config.range, role, "full") if kind not in kinds.IDS else "full",
            channel_count=count if kind == "channels" else None,
        )
    return specs


def _of_role(setting: T | Mapping[Role, T], role: Role, default: T) -> T:
    """A setting that may be given for each role."""
    return setting.get(role, default) if isinstance(setting, Mapping) else setting


def stored_specs(specs: Mapping[Role, RoleSpec]) -> dict[Role, RoleSpec]:
    """How each role is stored: features become channels of the source, after its own or its classes."""
    stored: dict[Role, RoleSpec] = {role: spec for role, spec in specs.items() if role != "features"}
    if "features" in specs:
        count = (specs["source"].classes or specs["source"].channels) + specs["features"].channels
        encoding = encode.stored_encoding("channels", specs["source"].encoding)
        stored["source"] = RoleSpec(kind="channels", encoding=encoding, channel_count=count)
    return stored


def with_features(source: Array, spec: RoleSpec, features: Array) -> Array:
    """A source (H, W, C) float32 as networks take it, one-hot if it holds ids, followed by its features."""
    if spec.classes is not None:
        channels = (source == np.arange(spec.classes, dtype=np.uint8)).astype(np.float32)
    else:
        channels = kinds.normalise(source, spec.kind)
    return np.concatenate([channels, features], axis=2)


def row_group_rows(config: ShardConfig, specs: Mapping[Role, RoleSpec]) -> int:
    """Rows of a row group: as configured, else as many as have about `ROW_GROUP_BYTES`."""
    if config.row_group_rows is not None:
        return config.row_group_rows
    width, height = config.size
    row = sum(
        width * height * spec.channels * kinds.dtype(spec.kind).itemsize * _ENCODED_SHARE[spec.encoding]
        for spec in specs.values()
    )
    return max(1, min(ROW_GROUP_ROWS, int(ROW_GROUP_BYTES / row)))


def check_shapes(sizes: Mapping[Role, tuple[int, int]]) -> None:
    """Raise ImageRejected if a pair's images differ in aspect ratio, by over 2 % and a pixel of rounding.

    Their resolutions may differ, as those of a photo and a smaller label map do.
    """
    widest = max(sizes.values())
    for role, (width, height) in sizes.items():
        expected = width * widest[1] / widest[0]
        if abs(height - expected) > max(1.0, ASPECT_TOLERANCE * expected):
            raise ImageRejected(
                "size_mismatch", f"{role} is {width}x{height}, another role {widest[0]}x{widest[1]}"
            )


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """An image as a shard stores it, with its original size (width, height)."""

    data: bytes
    crc: int
    uri: str
    original: tuple[int, int]
    measures: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RejectedPair:
    """A pair that cannot be used: the role and URI of the image that is the reason."""

    key: str
    role: str
    uri: str
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.key!r} ({self.role}): {self.detail or self.reason}"


@dataclass(slots=True)
class EncodedPair:
    """A pair ready to be written."""

    key: str
    split: Split
    group: str | None
    images: dict[Role, EncodedImage] = field(default_factory=dict)
    sign: Mapping[str, Any] = field(default_factory=dict)
    """What the search for wrong pairs needs, from `suspects.sign`."""


class PairReader:
    """Turns rows of pairs into encoded pairs, from any threads; at most `DECODERS` of them decode."""

    def __init__(self, config: ShardConfig, specs: Mapping[Role, RoleSpec], reader: Reader) -> None:
        self.config, self.specs, self.reader = config, specs, reader
        self.stored_specs = stored_specs(specs)
        self._decoding = threading.Semaphore(DECODERS)

    def __call__(self, row: Mapping[str, Any]) -> EncodedPair | RejectedPair:
        """The row's pair, or the reason to reject it. Raises UserError or StageError if the store fails."""
        pair = EncodedPair(row["key"], row["split"], row.get("group"))
        sizes: dict[Role, tuple[int, int]] = {}
        fetched: dict[str, bytes] = {}
        decoded: dict[tuple[str, Picture], Decoded] = {}
        arrays: dict[Role, Array] = {}
        missing: dict[Role, int] = {}
        for role, spec in self.specs.items():
            uri = row.get(f"{role}_uri")
            if uri is None:
                continue  # an optional role that this pair lacks
            try:
                if uri not in fetched:
                    fetched[uri] = self.reader.read(_object(row, role))
                with self._decoding:
                    arrays[role], sizes[role], missing[role] = self._image(
                        row, role, spec, fetched[uri], decoded
                    )
                if self.config.fit == "same":
                    check_shapes(sizes)
            except ImageRejected as error:
                return RejectedPair(pair.key, role, uri, error.reason, error.detail)
        with self._decoding:
            pair.sign = suspects.sign(arrays, self.specs)
        if "features" in arrays:
            arrays["source"] = with_features(arrays["source"], self.specs["source"], arrays.pop("features"))
        for role, array in arrays.items():
            with self._decoding:
                pair.images[role] = self._encode(
                    array, self.stored_specs[role], row[f"{role}_uri"], sizes[role], missing[role]
                )
        return pair

    def _image(
        self,
        row: Mapping[str, Any],
        role: Role,
        spec: RoleSpec,
        data: bytes,
        decoded: dict[tuple[str, Picture], Decoded],
    ) -> tuple[Array, tuple[int, int], int]:
        """The array at the stored size, its original size (width, height), its pixels without a value."""
        config, recipe = self.config, row.get(f"{role}_derive") or ""
        given = self.specs["source" if role == "target" else "target"] if recipe else spec
        kind: Kind = "rgb" if recipe else spec.kind
        how = Picture.model_validate(given.model_dump(exclude={"encoding"}) | {"kind": kind})
        place = (row[f"{role}_uri"], how)
        if place not in decoded:
            decoded[place] = decode.decode_counted(
                data, place[1], max_pixels=config.max_pixels, min_side=config.min_side
            )
        whole = geometry.crop_half(decoded[place].array, row.get(f"{role}_crop") or "")
        size = (whole.shape[1], whole.shape[0])
        if config.fit == "crop":
            whole = geometry.crop_to_shape(whole, config.size)
        array = geometry.resize(whole, config.size, kind)
        if recipe:
            array = derive(array, recipe, key=row["key"], kind=spec.kind, factor=config.downscale)
        elif spec.kind in ("lab_l", "lab_ab"):
            array = colour.lab_channels(array, spec.kind)
        return array, size, decoded[place].missing

    def _encode(
        self, array: Array, spec: RoleSpec, uri: str, size: tuple[int, int], missing: int
    ) -> EncodedImage:
        data = encode.encode_image(array, spec.encoding, quality=self.config.quality)
        return EncodedImage(
            data, encode.checksum(data), uri, size, card.measures(array, spec.kind) | {"missing": missing}
        )


def _object(row: Mapping[str, Any], role: Role) -> Object:
    size, etag = row.get(f"{role}_size"), row.get(f"{role}_etag")
    return Object(row[f"{role}_uri"], -1 if size is None else int(size), etag or "")


# -- files --------------------------------------------------------------------


def schema(specs: Mapping[Role, RoleSpec]) -> pa.Schema:
    """The columns of a shard (docs/data.md explains them)."""
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
    return pa.schema(fields)


def row_of(pair: EncodedPair) -> dict[str, Any]:
    """A pair as a row of a shard; of its measures the schema takes those that have a column."""
    row: dict[str, Any] = {"key": pair.key, "group": pair.group}
    for role, image in pair.images.items():
        row |= {role: image.data, f"{role}_crc": image.crc, f"{role}_uri": image.uri}
        row[f"{role}_width"], row[f"{role}_height"] = image.original
        row |= {f"{role}_{name}": value for name, value in image.measures.items()}
    return row


class ShardWriter:
    """Writes one shard to a file, a row group at a time."""

    def __init__(self, name: str, file: Any, specs: Mapping[Role, RoleSpec], rows: int) -> None:
        self.name, self.file, self.rows = name, file, rows
        self.shape = schema(specs)
        self.groups: list[int] = []
        self.waiting: list[dict[str, Any]] = []
        plain = [name for name in self.shape.names if name not in specs]
        # LZ4 compresses raw id maps to a few per cent. Photos hardly shrink, and unpacking them would take a
        # third of the time of making a batch.
        packed = {r for r, spec in specs.items() if spec.encoding == "raw" and spec.kind in kinds.IDS}
        self.writer = pq.ParquetWriter(
            self.file,
            self.shape,
            compression={name: "lz4" if name in packed else "none" for name in self.shape.names},
            use_dictionary=False,
            # An image has its own checksum; those of pages cover keys too, against damage on the way here.
            write_page_checksum=True,
            # Statistics of an image column would be images.
            write_statistics=[n for n in plain if not n.endswith(("_ids", "_mean", "_std"))],
        )

    def add(self, pair: EncodedPair) -> None:
        """Append a pair."""
        self.waiting.append(row_of(pair))
        if len(self.waiting) == self.rows:
            self._flush()

    def _flush(self) -> None:
        if self.waiting:
            self.writer.write_table(pa.Table.from_pylist(self.waiting, schema=self.shape))
            self.groups.append(len(self.waiting))
            self.waiting = []

    def finish(self) -> dict[str, Any]:
        """Write the last row group; returns the file's entry in the marker."""
        self._flush()
        self.writer.close()
        rows, size = sum(self.groups), self.file.tell()
        return {"name": self.name, "rows": rows, "row_groups": self.groups, "bytes": size}

    def abandon(self) -> None:
        """Close the file without its last row group; does nothing after `finish`."""
        with suppress(Exception):  # the user sees the error that led here
            self.writer.close()


def shard_part(
    part: str, *, output: str, config: ShardConfig, specs: Mapping[Role, RoleSpec], io_threads: int
) -> dict[str, Any]:
    """Write the files of one partition of pairs; returns its marker, which may exist from an earlier run.

    A partition that lacked an object is done again: the object may be back.

    Raises:
        UserError: the store refuses access. StageError: it failed at every attempt.
    """
    keep_freed_memory()
    number = partition_of(part)
    uri = storage.join(output, "_parts", f"{number:05d}.json")
    with suppress(FileNotFoundError):
        marker: dict[str, Any] = storage.read_json(uri)
        if "missing" not in marker["rejects"]:
            return marker
        storage.remove(storage.join(output, f"quarantine-{number:05d}.parquet"))
    rows = storage.read_parquet(part).to_pylist()
    write = partial(_write, rows, number, output=output, config=config, specs=specs, io_threads=io_threads)
    # Written again if the store is away for longer than its client retries.
    marker = storage.written(write, output)
    storage.write_json(uri, marker)
    return marker


def _write(
    rows: Sequence[Mapping[str, Any]],
    number: int,
    *,
    output: str,
    config: ShardConfig,
    specs: Mapping[Role, RoleSpec],
    io_threads: int,
) -> dict[str, Any]:
    """Write a partition's shards and quarantine; returns its marker."""
    stored = stored_specs(specs)
    reader = Reader()
    reader.expect(_object(row, role) for row in rows for role in specs if row.get(f"{role}_uri"))
    statistics: dict[Split, Statistics] = {}
    signs: defaultdict[Split, list[Mapping[str, Any]]] = defaultdict(list)
    rejects: list[RejectedPair] = []
    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(io_threads, thread_name_prefix="shard"))
        writers: dict[Split, ShardWriter] = {}
        for pair in prefetch_map(threads, PairReader(config, specs, reader), rows, ahead=2 * io_threads):
            if isinstance(pair, RejectedPair):
                rejects.append(pair)
                continue
            if pair.split not in writers:
                name = shard_name(pair.split, number)
                file = stack.enter_context(storage.create(storage.join(output, name)))
                writers[pair.split] = ShardWriter(name, file, stored, row_group_rows(config, stored))
                stack.callback(writers[pair.split].abandon)
                statistics[pair.split] = Statistics()
            for role, image in pair.images.items():
                statistics[pair.split].add(role, image.measures, image.original)
            signs[pair.split].append({"key": pair.key, **pair.sign})
            writers[pair.split].add(pair)
        files = {split: writer.finish() for split, writer in sorted(writers.items())}
    for split, rows_of_split in signs.items():
        uri = storage.join(output, suspects.signs_name(shard_name(split, number)))
        signs_table = pa.Table.from_pylist(rows_of_split, schema=suspects.SIGNS)
        storage.write_parquet(uri, signs_table, compression="zstd")
    if rejects:
        uri = storage.join(output, f"quarantine-{number:05d}.parquet")
        table = pa.Table.from_pylist([asdict(reject) for reject in rejects], schema=REJECTS)
        storage.write_parquet(uri, table, compression="zstd")
    return {
        "bucket": number,
        "rows": len(rows),
        "files": files,
        "rejects": dict(Counter(reject.reason for reject in rejects)),
        "examples": {
            reason: [str(reject) for reject in rejects if reject.reason == reason][:EXAMPLES]
            for reason in sorted({reject.reason for reject in rejects})
        },
        "statistics": {split: sums.to_json() for split, sums in sorted(statistics.items())},
    }


def shard_name(split: Split, number: int) -> str:
    """The file of a split's pairs in a partition."""
    return f"{split}-{number:05d}.parquet"


def partition_of(part: str) -> int:
    """The partition's number in the name of a part."""
    match = re.search(r"part-(\d+)\.parquet$", part)
    assert match, part
    return int(match[1])


def roles_of(part: str) -> list[Role]:
    """The roles that a part of pairs has columns for."""
    with local_file(part) as path:
        names = pq.read_schema(path).names
    return [role for role in get_args(Role) if f"{role}_uri" in names]


# -- all partitions -----------------------------------------------------------


@dataclass(slots=True)
class Summary:
    """The sum of all partitions' markers: files, rejects and statistics, no keys."""

    rows: int = 0
    bytes: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    files: dict[int, dict[Split, ShardFile]] = field(default_factory=dict)
    statistics: dict[Split, Statistics] = field(default_factory=dict)

    def add(self, marker: Mapping[str, Any]) -> None:
        """Add one partition's marker."""
        files = marker["files"]
        ranges = {split: (file["rows"], file["row_groups"][0]) for split, file in files.items()}
        size = sum(file["bytes"] for file in files.values())
        self.merge({**marker, "files": {marker["bucket"]: ranges}, "bytes": size})

    def merge(self, other: Mapping[str, Any]) -> None:
        """Add the sum of other partitions, from `to_json`."""
        self.rows += other["rows"]
        self.bytes += other["bytes"]
        self.rejects.update(other["rejects"])
        for reason, texts in other["examples"].items():
            self.examples[reason] = sorted([*self.examples.get(reason, []), *texts])[:EXAMPLES]
        for number, files in other["files"].items():
            self.files[int(number)] = {
                split: ShardFile(shard_name(split, int(number)), *rows) for split, rows in files.items()
            }
        for split, sums in other["statistics"].items():
            self.statistics.setdefault(split, Statistics()).merge(sums)

    def to_json(self) -> dict[str, Any]:
        """The sum as plain values."""
        return {
            "rows": self.rows,
            "bytes": self.bytes,
            "rejects": dict(self.rejects),
            "examples": self.examples,
            "files": {
                number: {split: (file.rows, file.group_rows) for split, file in files.items()}
                for number, files in sorted(self.files.items())
            },
            "statistics": {split: sums.to_json() for split, sums in self.statistics.items()},
        }

    def splits(self) -> dict[Split, ShardFiles]:
        """The files of each split that has any, in the order of partitions."""
        ordered = [files for _, files in sorted(self.files.items())]
        of_split = {
            split: ShardFiles.of(files[split] for files in ordered if split in files)
            for split in get_args(Split)
        }
        return {split: files for split, files in of_split.items() if len(files)}

    def counts(self) -> dict[str, int]:
        """The counts of the stage's outcome."""
        per_split = {split: files.rows for split, files in self.splits().items()}
        rejected = {f"rejected_{reason}": n for reason, n in sorted(self.rejects.items())}
        total = {"pairs": self.rows, "rejected": sum(self.rejects.values())}
        return total | {"shards": sum(map(len, self.files.values()))} | per_split | rejected

    def check(self, limit: float, output: str) -> None:
        """Raise StageError if the share of rejected pairs is over the limit, or no pair is left."""
        bad = sum(self.rejects.values())
        if bad <= limit * self.rows and bad < self.rows:
            return
        common = [reason for reason, _ in self.rejects.most_common(8)]
        reasons = ", ".join(f"{reason} {self.rejects[reason]:,}" for reason in common)
        # one example of each reason before a second one of any
        examples = sorted(
            ((place, text) for reason in common for place, text in enumerate(self.examples[reason])),
            key=lambda example: example[0],
        )
        quoted = "".join(f"; {text}" for _, text in examples[:EXAMPLES])
        advice = "".join(f"; {ADVICE[reason]}" for reason in common if reason in ADVICE)
        raise StageError(
            f"shard: {bad:,} of {self.rows:,} pairs were rejected ({bad / max(1, self.rows):.1%}, "
            f"shard.max_reject_fraction allows {limit:.1%}): {reasons}{quoted}{advice}; "
            f"{output}/quarantine-*.parquet lists each pair with its reason"
        )


# -- wiring -------------------------------------------------------------------


def run(config: ShardConfig, resources: Resources, *, output: str, track: Run, pairs: str) -> Outcome:
    """Make shards of all parts in `pairs`.

    Raises:
        UserError: no pairs, `classes` missing, or a store that refuses access.
        StageError: more than `max_reject_fraction` of the pairs were rejected, or a store failed.
    """
    parts = {partition_of(part): part for part in parts_of(pairs)}
    if not parts:
        raise UserError(f"{pairs}: there are no pairs")
    specs = role_specs(config, roles_of(next(iter(parts.values()))))
    task = partial(shard_part, output=output, config=config, specs=specs, io_threads=resources.io_threads)
    finished = Finished(storage.join(output, "_parts", "groups"), parts)
    summary = Summary()
    for sums in finished.read():
        summary.merge(sums)
    left = [parts[number] for number in sorted(finished.left)]
    groups: defaultdict[int, Summary] = defaultdict(Summary)
    done = len(parts) - len(left)
    with Progress("shard", total=None, unit="pairs", done=summary.rows) as progress:
        # A task waits for the store half of its time.
        for marker in each(task, left, stage="shard", num_cpus=0.5):
            number = marker["bucket"]
            group = groups[number // GROUP]
            group.add(marker)
            if finished.finish(number):
                sums = groups.pop(number // GROUP).to_json()
                if "missing" not in sums["rejects"]:
                    finished.write(number, sums)
                summary.merge(sums)
            count_rejected("shard", marker["rejects"])
            done += 1
            progress.advance(marker["rows"], f"{done:,}/{len(parts):,} parts")
    summary.check(config.max_reject_fraction, output)
    spec = DatasetSpec(size=config.size, roles=stored_specs(specs), splits=summary.splits())
    found = suspects.find(output, spec)
    remarks = card.remarks(spec, summary.statistics, keep_shape=config.fit == "same") + found.remarks()
    files = card.write(output, spec, summary.statistics, summary.rejects, found.leaks(), remarks)
    files[suspects.NAME] = found.table()
    storage.write_bytes(storage.join(output, suspects.NAME), files[suspects.NAME])
    dataset.save(output, spec)
    for text in remarks:
        logger.warning("shard: %s", text)
    for name, data in files.items():
        track.artifact(f"dataset/{name}", data)
    counts = summary.counts() | {"leaks": found.leaked["train"]}
    counts |= {f"suspects_{kind}": count for kind, count in sorted(found.counts.items())}
    return Outcome(counts=counts, metrics={"bytes": float(summary.bytes)})


def parts_of(pairs: str) -> list[str]:
    """The parts of pairs: as the pair stage listed them, for the store would take 200 requests; or listed."""
    try:
        names = storage.read_json(storage.join(pairs, "_listing.json"))["parts"]
    except FileNotFoundError:
        return list(storage.parquet_parts(pairs, "part-"))
    return [storage.join(pairs, name) for name in names]
