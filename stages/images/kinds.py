"""The kinds of images: how values are stored, what they mean, and how networks see them.

in:  arrays (H, W, C) of a kind, as shards store them
out: arrays in [-1, 1], as networks see them; and back

| kind      | C | dtype   | values                                           | as networks see it        |
|-----------|---|---------|--------------------------------------------------|---------------------------|
| rgb       | 3 | uint8   | colours                                          | x / 127.5 - 1             |
| grey      | 1 | uint8   | lightness                                        | x / 127.5 - 1             |
| labels    | 1 | uint8   | class ids                                        | ids (one-hot in the step) |
| instances | 1 | uint16  | instance ids                                     | ids (edges in the step)   |
| grey16    | 1 | uint16  | lightness                                        | x / 32767.5 - 1           |
| lab_l     | 1 | uint8   | L of CIE Lab (D65) * 2.55                        | x / 127.5 - 1 = L/50 - 1  |
| lab_ab    | 2 | uint8   | a and b of CIE Lab + 128                         | (x - 128) / 110           |
| channels  | n | float32 | integers over their whole range, floats as given | in [-1, 1] already        |

Pure: Pillow, numpy and isal only. Pillow releases the GIL while it decodes and resizes, so threads help.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from stages.base import Kind

Array = npt.NDArray[Any]

Half = Literal["left", "right", "top", "bottom"]

Reason = Literal[
    "missing",
    "changed",
    "empty",
    "truncated",
    "not_an_image",
    "unreadable",
    "too_large",
    "too_small",
    "animated",
    "wrong_kind",
    "label_range",
    "instance_range",
    "value_range",
    "size_mismatch",
]
"""Why an image cannot be used: found when it is read, decoded or compared with the others of its pair."""

PHOTOS: frozenset[Kind] = frozenset({"rgb", "grey"})
"""Kinds that survive a lossy encoding."""

IDS: frozenset[Kind] = frozenset({"labels", "instances"})
"""Kinds whose values are names, not amounts: never interpolated, never lossy."""

CHANNELS: dict[Kind, int] = {
    "rgb": 3,
    "grey": 1,
    "labels": 1,
    "instances": 1,
    "grey16": 1,
    "lab_l": 1,
    "lab_ab": 2,
}
"""Channels of every kind but `channels`, whose number the config has."""


class ImageRejected(Exception):  # noqa: N818 - the reason to reject a row, not an error of a run
    """An image that cannot be used: `reason` for counting, `detail` for a person."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason: Reason = reason
        self.detail = detail[:300]

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def dtype(kind: Kind) -> np.dtype[Any]:
    """The array type of a kind."""
    if kind == "channels":
        return np.dtype("<f4")
    return np.dtype("<u2") if kind in ("instances", "grey16") else np.dtype("u1")


def normalise(array: Array, kind: Kind) -> npt.NDArray[np.float32]:
    """Amounts as networks see them, float32 in about [-1, 1] (see the table above). Not for ids."""
    assert kind not in IDS, "ids are not amounts"
    if kind == "channels":
        return array.astype(np.float32)
    if kind == "lab_ab":
        return (array.astype(np.float32) - 128) / np.float32(110)
    half = np.float32(32767.5 if kind == "grey16" else 127.5)
    return array.astype(np.float32) / half - 1


def restore(values: npt.NDArray[np.float32], kind: Kind) -> Array:
    """The inverse of `normalise`: a network's output (H, W, C) as values of `kind`, rounded and clipped."""
    assert kind not in IDS, "ids are not amounts"
    if kind == "lab_ab":
        values = values * 110 + 128
    elif kind != "channels":
        values = (values + 1) * (np.iinfo(dtype(kind)).max / 2)
    return settled(values, dtype(kind))


def settled(values: Array, stored: np.dtype[Any]) -> Array:
    """Computed amounts in the type they are stored in: integers rounded and clipped, floats in [-1, 1]."""
    low, high = (-1, 1) if stored.kind == "f" else (0, np.iinfo(stored).max)
    out: Array = np.clip(values if stored.kind == "f" else np.rint(values), low, high).astype(stored)
    return out
