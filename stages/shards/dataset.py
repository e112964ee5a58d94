"""A shards folder: its description, and its pairs read back with every checksum verified.

in:  dataset.parquet         the files of each split; in its metadata a `Header`: size and roles
     <split>-<n>.parquet     rows {key, group, and per role R: R, R_crc, R_uri, R_width, R_height, ...}
out: Sample: a pair's images (H, W, C) by role, and where they came from

`docs/data.md` has the whole schema. Images are decoded from a view on the Parquet buffer.
"""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import ValidationError

from stages import storage
from stages.base import Config, Encoding, Kind, Role, Split
from stages.errors import StageError, UserError, first_invalid, one_line
from stages.images import encode, kinds, pictures
from stages.images.kinds import Array, ImageRejected
from stages.models.architecture import InputSpec, Picture
from stages.shards.row_groups import AGAIN, num_row_groups, read_unit

NAME = "dataset.parquet"
OLD_NAME = "dataset.json"  # one JSON document, as folders had before: read, never written
METADATA = b"pixloom"
EXAMPLE_SIDE = 128
SCORED: tuple[Split, ...] = ("test", "val")  # to generate and evaluate by default: the first that has pairs


FILES = pa.schema(
    {
        "split": pa.dictionary(pa.int8(), pa.string()),
        "name": pa.string(),
        "rows": pa.int32(),
        "group_rows": pa.int32(),
    }
)
"""The rows of dataset.parquet: one shard a row, split after split."""

Ints = npt.NDArray[np.int32]


class RoleSpec(Picture):
    """How the images of a role were read and are stored."""

    encoding: Encoding

    @property
    def channels(self) -> int:
        """Channels of the stored array: rgb 3, lab_ab 2, channels as configured, else 1."""
        return kinds.CHANNELS.get(self.kind) or self.channel_count or 1


class Header(Config):
    """What all shards have in common, and the number of files of each split."""

    version: Literal[1, 2] = 2
    size: tuple[int, int]
    roles: dict[Role, RoleSpec]
    files: dict[Split, int]


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One Parquet file of a split: its rows, and those of each of its row groups but the last, the rest."""

    name: str
    rows: int
    group_rows: int

    @property
    def row_groups(self) -> tuple[int, ...]:
        """Rows of each row group."""
        starts = range(0, self.rows, self.group_rows)
        return tuple(min(self.group_rows, self.rows - start) for start in starts)


@dataclass(frozen=True, eq=False)
class ShardFiles:
    """The files of a split in their order, as columns: a worker holds numbers, however many there are."""

    names: pa.StringArray | pa.ChunkedArray
    file_rows: Ints
    group_rows: Ints

    @classmethod
    def of(cls, files: Iterable[ShardFile]) -> ShardFiles:
        """The columns of these files."""
        every = list(files)
        return cls(
            pa.array([file.name for file in every], pa.string()),
            np.array([file.rows for file in every], np.int32),
            np.array([file.group_rows for file in every], np.int32),
        )

    @property
    def rows(self) -> int:
        """Their pairs."""
        return int(self.file_rows.sum())

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[ShardFile]:
        columns = self.names.to_pylist(), self.file_rows.tolist(), self.group_rows.tolist()
        return map(ShardFile, *columns)

    @cached_property
    def _ends(self) -> npt.NDArray[np.int64]:
        """Where the row groups of each file end among those of the split."""
        return np.cumsum(-(-self.file_rows // self.group_rows))

    def sizes(self) -> npt.NDArray[np.integer[Any]]:
        """Rows of every row group of the split, in the smallest type: there are millions."""
        smallest = np.min_scalar_type(int(self.group_rows.max(initial=0)))
        counts = np.diff(self._ends, prepend=0)
        sizes: npt.NDArray[np.integer[Any]] = np.repeat(self.group_rows.astype(smallest), counts)
        sizes[self._ends - 1] = self.file_rows - (counts - 1) * self.group_rows
        return sizes

    def place(self, group: int) -> tuple[str, int]:
        """The file of a row group of the split, and the row group's number in it."""
        file = int(np.searchsorted(self._ends, group, "right"))
        return self.names[file].as_py(), group - (int(self._ends[file - 1]) if file else 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetSpec:
    """The description of a shards folder. All its images have one size (width, height)."""

    size: tuple[int, int]
    roles: dict[Role, RoleSpec]
    splits: Mapping[Split, ShardFiles]

    def header(self) -> bytes:
        """The description without names and row groups."""
        files = {split: len(files) for split, files in self.splits.items()}
        return Header(size=self.size, roles=self.roles, files=files).model_dump_json().encode()

    def inputs(self) -> InputSpec:
        """The shape of the networks' inputs."""
        source = self.roles["source"]
        labels = source.kind == "labels"
        return InputSpec(
            source="labels" if labels else "image",
            channels=source.channels,
            classes=source.classes if labels else None,
            instances="instance" in self.roles,
            target_channels=self.roles["target"].channels,
        )

    def rows(self, split: Split) -> int:
        """Number of pairs of a split."""
        return self.splits[split].rows if split in self.splits else 0

    def scored_split(self, configured: Split | None, key: str) -> Split:
        """The split to generate or evaluate: the configured one; None: test, or val if test has no pair.

        Raises UserError that names the config key if the split has no pair.
        """
        filled = [name for name in SCORED if self.rows(name)]
        split = configured or (filled or SCORED)[0]
        if not self.rows(split):
            there = ", ".join(f"{name} {self.rows(name):,}" for name in self.splits)
            raise UserError(
                f"{key}: the shards hold no pair of the split {split!r} (they hold: {there}); change it, or "
                "pair.split, or {split} in the patterns"
            )
        return split

    def counts(self) -> dict[str, int]:
        """Number of pairs of every split, as MLflow shows it."""
        return {f"num_{split}": self.rows(split) for split in self.splits}

    def digest(self) -> str:
        """A digest that differs if files, rows or the way images are stored differ."""
        total = hashlib.sha256(self.header())
        for files in self.splits.values():
            for numbers in (files.file_rows, files.group_rows):
                total.update(numbers.tobytes())
            total.update("\n".join(files.names.to_pylist()).encode())
        return total.hexdigest()


@dataclass(frozen=True, slots=True)
class Sample:
    """One pair: per role the image (H, W, C), its URI and its size (width, height) there."""

    key: str
    split: Split
    group: str
    images: Mapping[Role, Array]
    uris: Mapping[Role, str]
    original: Mapping[Role, tuple[int, int]]

    def picture(self, spec: DatasetSpec, role: Role) -> Array:
        """The image of a role as a picture (H, W, 3) uint8; `lab_ab` is shown with the pair's lightness."""
        stored = spec.roles[role]
        lightness = next((i for r, i in self.images.items() if spec.roles[r].kind == "lab_l"), None)
        return pictures.picture(self.images[role], stored.kind, classes=stored.classes, lightness=lightness)


def load(folder: str) -> DatasetSpec:
    """The description of a shards folder. Raises UserError if there is none, or it is damaged."""
    try:
        try:
            table = storage.read_parquet(storage.join(folder, NAME))
        except FileNotFoundError:
            content = storage.read_json(storage.join(folder, OLD_NAME))
            splits = _from_json(content.pop("splits"))
            content["files"] = {split: len(files) for split, files in splits.items()}
            header = Header.model_validate(content)
        else:
            header = Header.model_validate_json(table.schema.metadata[METADATA])
            splits = _from_table(table, header.files)
    except FileNotFoundError:
        raise UserError(f"{folder}: no {NAME}, so this is not a finished shards folder") from None
    except ValidationError as error:
        raise UserError(f"{folder}: its description is damaged: {first_invalid(error)}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: its description is damaged: {one_line(error, kind=True)}") from error
    return DatasetSpec(size=header.size, roles=header.roles, splits=splits)


def exists(folder: str) -> bool:
    """Whether a folder holds finished shards."""
    return any(storage.exists(storage.join(folder, name)) for name in (NAME, OLD_NAME))


def save(folder: str, spec: DatasetSpec) -> None:
    """Write the description. It makes the folder a shards folder, so it is written last."""
    table = _to_table(spec.splits).replace_schema_metadata({METADATA: spec.header()})
    numbers = ["split", "rows", "group_rows"]
    # Small row groups halve the memory of reading it.
    storage.write_parquet(
        storage.join(folder, NAME), table, row_group_rows=1 << 14, compression="zstd", use_dictionary=numbers
    )


def _to_table(splits: Mapping[Split, ShardFiles]) -> pa.Table:
    """All files as rows of `FILES`, split after split."""
    tables = [
        pa.table(
            [
                pa.array([split]).take(pa.array(np.zeros(len(files), np.int8))),
                files.names,
                files.file_rows,
                files.group_rows,
            ],
            names=FILES.names,
        ).cast(FILES)
        for split, files in splits.items()
    ]
    return pa.concat_tables([FILES.empty_table(), *tables])


def _from_table(table: pa.Table, counts: Mapping[Split, int]) -> dict[Split, ShardFiles]:
    """The files of each split, of which there are so many in the table."""
    starts = itertools.accumulate(counts.values(), initial=0)
    parts = {
        split: table.slice(start, count)
        for (split, count), start in zip(counts.items(), starts, strict=False)
    }
    return {
        split: ShardFiles(part["name"], part["rows"].to_numpy(), part["group_rows"].to_numpy())
        for split, part in parts.items()
    }


def _from_json(content: Mapping[Split, Iterable[Mapping[str, Any]]]) -> dict[Split, ShardFiles]:
    """The files of each split as the JSON description of older folders lists them."""
    return {
        split: ShardFiles.of(ShardFile(file["name"], file["rows"], file["row_groups"][0]) for file in files)
        for split, files in content.items()
    }


def decode_role(data: memoryview | bytes, crc: int, role: RoleSpec, size: tuple[int, int]) -> Array:
    """A stored image (H, W, C), its checksum verified. Raises ImageRejected `unreadable` if it differs."""
    if encode.checksum(data) != crc:
        raise ImageRejected("unreadable", "its checksum differs from the one that the shard stage stored")
    return encode.decode_stored(
        data, kind=role.kind, encoding=role.encoding, channels=role.channels, size=size
    )


def corrupt(folder: str, name: str, key: str, role: str, reason: object) -> StageError:
    """The error for a damaged image: a shard is made again as a whole."""
    return StageError(
        f"{storage.join(folder, name)}: image '{role}' of pair '{key}' is damaged ({reason}); {AGAIN}"
    )


def columns(spec: DatasetSpec) -> list[str]:
    """The columns of a shard that hold images, with their URIs and original sizes."""
    parts = ("", "_crc", "_uri", "_width", "_height")
    return ["key", "group", *(f"{role}{part}" for role in spec.roles for part in parts)]


def read_file(
    folder: str, spec: DatasetSpec, split: Split, name: str, keys: Collection[str] | None = None
) -> Iterator[Sample]:
    """Yields the pairs of one shard file, or those with `keys`, a row group at a time.

    Raises StageError on a damaged image.
    """
    for group in range(num_row_groups(storage.join(folder, name))):
        unit = {"file": name, "group": group}
        # The column of keys is small: images are read only from groups with a key that is asked for.
        if keys is not None and set(keys).isdisjoint(read_unit(folder, unit, ["key"])["key"].to_pylist()):
            continue
        table = read_unit(folder, unit, columns(spec))
        for row in range(table.num_rows):
            if keys is None or table["key"][row].as_py() in keys:
                yield sample_of(folder, spec, split, name, table, row)


def read_split(folder: str, spec: DatasetSpec, split: Split, limit: int | None = None) -> Iterator[Sample]:
    """Yields the pairs of a split, or the first `limit` of them, in the order they are stored.

    For small splits; a task that reads a large one reads `spec.splits[split]` file by file.
    """
    samples = (
        sample for file in spec.splits.get(split, ()) for sample in read_file(folder, spec, split, file.name)
    )
    return itertools.islice(samples, limit)


def example(folder: str, spec: DatasetSpec) -> dict[str, bytes]:
    """The input of a served model: the encoded source of the first pair, and its instance map if it has one.

    Cropped to `EXAMPLE_SIDE`: MLflow stores it as the model's input example and runs the model on it.
    """
    splits: tuple[Split, ...] = ("test", "val", "train")
    sample = next(s for split in splits for s in read_split(folder, spec, split, limit=1))
    images = {"image": _encoded_corner(sample.images["source"], spec.roles["source"].kind)}
    if "instance" in sample.images:
        images["instance"] = _encoded_corner(sample.images["instance"], "instances")
    return images


def _encoded_corner(array: Array, kind: Kind) -> bytes:
    array = array[:EXAMPLE_SIDE, :EXAMPLE_SIDE]
    if kind != "channels":
        return encode.encode_png(array)
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def sample_of(folder: str, spec: DatasetSpec, split: Split, name: str, table: pa.Table, row: int) -> Sample:
    """The pair in a row of a shard's table with `columns(spec)`. Raises StageError for a damaged image."""
    key: str = table["key"][row].as_py()
    arrays: dict[Role, Array] = {}
    uris: dict[Role, str] = {}
    original: dict[Role, tuple[int, int]] = {}
    for role, stored in spec.roles.items():
        scalar: Any = table[role][row]
        if not scalar.is_valid:
            continue  # an optional role that this pair lacks
        try:
            arrays[role] = decode_role(
                memoryview(scalar.as_buffer()), table[f"{role}_crc"][row].as_py(), stored, spec.size
            )
        except ImageRejected as error:
            raise corrupt(folder, name, key, role, error) from error
        uris[role] = table[f"{role}_uri"][row].as_py()
        original[role] = (table[f"{role}_width"][row].as_py(), table[f"{role}_height"][row].as_py())
    return Sample(key, split, table["group"][row].as_py() or "", arrays, uris, original)
