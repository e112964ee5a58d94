"""What is done to a stored pair before training sees it: verify, decode, crop, mirror, scale.

in:  read units {epoch, file, group, rows} of a shards folder (`stages.shards.order` says which)
out: pairs whose images are arrays (H, W, C) as a batch holds them: colours uint8, ids int32, others float32

No torch and no Ray here, so that a task of Ray that only prepares starts fast and stays small.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages.base import Role
from stages.config.augment import AugmentConfig
from stages.errors import UserError
from stages.images import geometry, kinds
from stages.images.augment import NONE, apply, draw
from stages.images.kinds import ImageRejected
from stages.shards import dataset
from stages.shards.dataset import DatasetSpec, RoleSpec

Unit = dict[str, Any]
"""What is read together, and for which epoch: epoch, file, group, rows, size (`row_groups.read_unit`)."""


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How the pairs of a shards folder are prepared.

    scale   1, 2, 4 ...: images come at 1/scale of the resolution; `augment.crop` is in stored pixels
    """

    folder: str
    spec: DatasetSpec
    seed: int = 0
    augment: AugmentConfig = NONE
    scale: int = 1

    def __post_init__(self) -> None:
        width, height = self.augment.crop or self.spec.size
        if width > self.spec.size[0] or height > self.spec.size[1]:
            raise UserError(f"augment.crop: {width}x{height} does not fit images of {self.spec.size}")

    @cached_property
    def roles(self) -> dict[Role, RoleSpec]:
        """The roles that are read: all but the label map, which only evaluation needs."""
        return {role: spec for role, spec in self.spec.roles.items() if role != "label"}

    def layout(self, role: Role) -> tuple[tuple[int, int, int], bool]:
        """Shape of an image of a role in memory, and whether that is (C, H, W) instead of (H, W, C).

        Raw images are stored planar and stay so, others decode to pixels: either way they are copied once.
        """
        spec, (width, height) = self.roles[role], self.augment.crop or self.spec.size
        height, width = height // self.scale, width // self.scale
        if spec.encoding == "raw":
            return (spec.channels, height, width), True
        return (height, width, spec.channels), False

    def columns(self) -> list[str]:
        """The columns that are read."""
        return ["key", *(name for role in self.roles for name in (role, f"{role}_crc"))]

    def pairs(self, unit: Unit, table: pa.Table) -> Iterator[StoredPair]:
        """The pairs in the table of a read unit."""
        for batch in table.to_batches():
            stored = {role: _binaries(batch[role], batch[f"{role}_crc"]) for role in self.roles}
            for key, *images in zip(batch["key"].to_pylist(), *stored.values(), strict=True):
                yield StoredPair(self, unit, key, dict(zip(stored, images, strict=True)))


@dataclass(frozen=True, slots=True)
class StoredPair:
    """One pair as it is stored: views of its read unit, prepared when it is copied."""

    preparation: Preparation
    unit: Unit
    key: str
    stored: Mapping[Role, tuple[memoryview, int] | None]
    """Per role the bytes and their checksum, or None where the pair has none."""

    def copy_to(self, out: Mapping[Role, npt.NDArray[Any]]) -> None:
        """Write the prepared images to arrays (H, W, C). Raises StageError on a damaged image."""
        how = self.preparation
        size, crop = how.spec.size, how.augment.crop
        jitter = draw(how.seed, self.unit["epoch"], self.key, size, crop, how.augment.mirror)
        for role, spec in how.roles.items():
            stored = self.stored[role]
            if stored is None:
                out[role][...] = 0
                continue
            try:
                array = dataset.decode_role(*stored, spec, size)
            except ImageRejected as why:
                raise dataset.corrupt(how.folder, self.unit["file"], self.key, role, why) from why
            array = geometry.shrink(apply(array, jitter, size, crop), how.scale, spec.kind)
            if dtype_of(spec) == np.float32 and spec.kind != "channels":
                array = kinds.normalise(array, spec.kind)
            copy_pixels(array, out[role])


def dtype_of(spec: RoleSpec) -> npt.DTypeLike:
    """The type of a role's images in a batch: ids as integers, 8-bit amounts as they are, others float32."""
    if spec.kind == "instances":
        return np.int32
    return np.float32 if spec.kind in ("grey16", "lab_ab", "channels") else np.uint8


def copy_pixels(array: kinds.Array, out: npt.NDArray[Any]) -> None:
    """Copy an image (H, W, C) into memory of its shape; a mirrored one a pixel at a time, not a byte."""
    pixel = array.itemsize * array.shape[2]
    if array.strides[1:] == (-pixel, array.itemsize) and array.dtype == out.dtype and out.strides[1] == pixel:
        whole = np.dtype((np.void, pixel))
        array, out = array.view(whole), out.view(whole)
    np.copyto(out, array)


def _binaries(column: pa.Array, crcs: pa.Array) -> Iterator[tuple[memoryview, int] | None]:
    """Bytes and checksum of each value of a binary column, as views on its buffer; None for nulls."""
    wide = pa.types.is_large_binary(column.type)
    _, places, data = column.buffers()
    offsets = np.frombuffer(places, np.int64 if wide else np.int32)[column.offset :].tolist()
    view = memoryview(b"" if data is None else data)
    for index, crc in enumerate(crcs.to_pylist()):
        yield None if crc is None else (view[offsets[index] : offsets[index + 1]], crc)
