"""What a shards folder holds, and how to read images back out of it with every checksum verified.

    dataset.json                  DatasetSpec: size, roles, the files of each split
    <split>-<bucket>.parquet      rows {key, group, and per role R: R, R_crc, R_uri, R_width, R_height, ...}

`docs/data.md` has the whole schema. A row's images are decoded late, from a view on the Parquet buffer.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from stages import storage
from stages.base import Config, Encoding, Kind, Role, Split
from stages.errors import StageError, UserError
from stages.images import decode, encode, kinds, pictures
from stages.images.kinds import Array, ImageRejected
from stages.shards.row_groups import num_row_groups, read_unit

NAME = "dataset.json"
EXAMPLE_SIDE = 128


class RoleSpec(Config):
    """How the images of a role are stored."""

    kind: Kind
    encoding: Encoding
    classes: int | None = None
    """Number of class ids, for kind `labels`."""
    channel_count: int | None = None
    """Number of channels, for kind `channels`."""

    @property
    def channels(self) -> int:
        """Channels of the stored array: rgb 3, lab_ab 2, channels as configured, else 1."""
        return kinds.CHANNELS.get(self.kind) or self.channel_count or 1


class ShardFile(Config):
    """One Parquet file of a split, its rows, and the rows of each of its row groups."""

    name: str
    rows: int
    row_groups: tuple[int, ...]


class DatasetSpec(Config):
    """A shards folder. All its images have one size (width, height)."""

    version: Literal[1] = 1
    size: tuple[int, int]
    roles: dict[Role, RoleSpec]
    splits: dict[Split, tuple[ShardFile, ...]]

    def rows(self, split: Split) -> int:
        """Number of pairs of a split."""
        return sum(file.rows for file in self.splits.get(split, ()))

    def counts(self) -> dict[str, int]:
        """Number of pairs of every split, as MLflow shows it."""
        return {f"num_{split}": self.rows(split) for split in self.splits}

    def digest(self) -> str:
        """What tells two shards folders apart: files, rows and how they are stored."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Sample:
    """One pair: per role the image (H, W, C), where it came from and its size (width, height) there."""

    key: str
    split: Split
    group: str
    images: Mapping[Role, Array]
    uris: Mapping[Role, str]
    original: Mapping[Role, tuple[int, int]]

    def picture(self, spec: DatasetSpec, role: Role) -> Array:
        """The image of a role as a picture (H, W, 3) uint8; colours of Lab need the pair's lightness."""
        known = spec.roles[role]
        lightness = next((i for r, i in self.images.items() if spec.roles[r].kind == "lab_l"), None)
        return pictures.picture(self.images[role], known.kind, classes=known.classes, lightness=lightness)


def load(folder: str) -> DatasetSpec:
    """The description of a shards folder. Raises UserError if the folder is none."""
    uri = storage.join(folder, NAME)
    try:
        return DatasetSpec.model_validate_json(storage.read_bytes(uri))
    except FileNotFoundError:
        raise UserError(f"{folder}: no {NAME}, so this is not a finished shards folder") from None
    except ValidationError as error:
        raise UserError(f"{uri}: {error.errors()[0]['msg']}") from error


def save(folder: str, spec: DatasetSpec) -> None:
    """Write the description; the last thing a shard run does."""
    storage.write_bytes(storage.join(folder, NAME), spec.model_dump_json(indent=1).encode() + b"\n")


def decode_role(data: memoryview | bytes, crc: int, role: RoleSpec, size: tuple[int, int]) -> Array:
    """A stored image (H, W, C), its checksum verified. Raises ImageRejected `unreadable` if it differs."""
    if encode.checksum(data) != crc:
        raise ImageRejected("unreadable", "checksum differs from the one taken when the shard was made")
    return decode.decode_stored(
        data, kind=role.kind, encoding=role.encoding, channels=role.channels, size=size
    )


def corrupt(folder: str, name: str, key: str, role: str, why: object) -> StageError:
    """The error for a stored image that is not what was written: shards are made anew, not patched."""
    return StageError(
        f"{storage.join(folder, name)}: image '{role}' of pair '{key}' is damaged ({why}); "
        f"delete that file and its marker in _parts/ (or the whole folder) and run the shard stage again"
    )


def columns(spec: DatasetSpec, *, sources: bool = True) -> list[str]:
    """Columns of a shard that hold images; with `sources`, also where they came from."""
    names = ["key", "group"] if sources else ["key"]
    for role in spec.roles:
        names += [role, f"{role}_crc"]
        names += [f"{role}_uri", f"{role}_width", f"{role}_height"] if sources else []
    return names


def read_file(
    folder: str, spec: DatasetSpec, split: Split, name: str, keys: Collection[str] | None = None
) -> Iterator[Sample]:
    """The pairs of one shard file, a row group at a time. Raises StageError on a damaged image."""
    for group in range(num_row_groups(storage.join(folder, name))):
        unit = {"file": name, "group": group}
        if keys is not None:  # the keys are a small column: look before reading images
            found = read_unit(folder, unit, ["key"])["key"].to_pylist()
            if not any(key in keys for key in found):
                continue
        table = read_unit(folder, unit, columns(spec))
        for row in range(table.num_rows):
            if keys is None or table["key"][row].as_py() in keys:
                yield sample_of(folder, spec, split, name, table, row)


def read_split(
    folder: str,
    spec: DatasetSpec,
    split: Split,
    keys: Collection[str] | None = None,
    limit: int | None = None,
) -> Iterator[Sample]:
    """The pairs of a split in the order they are stored, decoded and verified; `keys` picks some of them.

    For samples and small splits; a task over a large one reads `spec.splits[split]` file by file.
    """
    left = limit if limit is not None else -1
    for file in spec.splits.get(split, ()):
        if left == 0:
            return
        for sample in read_file(folder, spec, split, file.name, keys):
            yield sample
            left -= 1
            if left == 0:
                return


def example(folder: str, spec: DatasetSpec) -> dict[str, bytes]:
    """What a served model takes, from the first pair there is: the source and its instance map, encoded.

    A corner of them: MLflow keeps it with the model and tries the model on it.
    """
    splits: tuple[Split, ...] = ("test", "val", "train")
    sample = next(s for split in splits for s in read_split(folder, spec, split, limit=1))
    found = {"image": _encoded(sample.images["source"], spec.roles["source"].kind)}
    if "instance" in sample.images:
        found["instance"] = _encoded(sample.images["instance"], "instances")
    return found


def _encoded(array: Array, kind: Kind) -> bytes:
    array = array[:EXAMPLE_SIDE, :EXAMPLE_SIDE]
    if kind != "channels":
        return encode.encode_png(array)
    sink = io.BytesIO()
    np.save(sink, array)
    return sink.getvalue()


def sample_of(folder: str, spec: DatasetSpec, split: Split, name: str, table: pa.Table, row: int) -> Sample:
    """The pair in a row of a shard's table with `columns(spec)`. Raises StageError for a damaged image."""
    key: str = table["key"][row].as_py()
    arrays: dict[Role, Array] = {}
    uris: dict[Role, str] = {}
    original: dict[Role, tuple[int, int]] = {}
    for role, known in spec.roles.items():
        scalar: Any = table[role][row]
        if not scalar.is_valid:
            continue  # an optional role that this pair lacks
        try:
            arrays[role] = decode_role(
                memoryview(scalar.as_buffer()), table[f"{role}_crc"][row].as_py(), known, spec.size
            )
        except ImageRejected as why:
            raise corrupt(folder, name, key, role, why) from why
        uris[role] = table[f"{role}_uri"][row].as_py()
        original[role] = (table[f"{role}_width"][row].as_py(), table[f"{role}_height"][row].as_py())
    return Sample(key, split, table["group"][row].as_py() or "", arrays, uris, original)
