"""The pixels of a file and what they mean, made into a kind.

in:  RawImage: the values as the file has them, what is black and white, transparency, what is missing
out: an array (H, W, C) of a kind (see `kinds`)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from stages.images.kinds import IDS, Array, ImageRejected, dtype, settled
from stages.models.architecture import Picture

Alpha = Literal["none", "straight", "premultiplied"]

PERCENTILES = (0.5, 99.5)
"""What `range: percentile` takes as black and white."""

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601, as Pillow's


@dataclass(frozen=True, slots=True)
class RawImage:
    """An image (H, W, C) as a file has it.

    white     the value of white (black is 0); None: the largest of the type
    alpha     whether the last channel is opacity, and whether the colours are multiplied by it
    missing   (H, W, C), true where there is no value: NaN, infinity, the file's nodata
    profile   the colour profile
    """

    values: Array
    white: int | None = None
    alpha: Alpha = "none"
    missing: npt.NDArray[np.bool_] | None = None
    profile: bytes | None = None

    @property
    def missing_pixels(self) -> int:
        """Pixels that lack a value."""
        return 0 if self.missing is None else int(self.missing.any(axis=2).sum())


def of_kind(raw: RawImage, how: Picture) -> Array:
    """The image that `how` describes. Raises ImageRejected if the file cannot be read as that."""
    if how.kind in IDS:
        return _ids(raw.values, how)
    if how.kind == "channels":
        return _channels(raw, how)
    return _light(raw, how)


def _ids(values: Array, how: Picture) -> Array:
    if values.shape[2] != 1 or values.dtype.kind not in "uib":
        found = f"{values.shape[2]} of {values.dtype}"
        raise ImageRejected("wrong_kind", f"ids need one channel of integers, the image has {found}")
    top = np.iinfo(dtype(how.kind)).max
    if values.size and (values.min() < 0 or values.max() > top):
        reason: Literal["label_range", "instance_range"]
        reason = "label_range" if how.kind == "labels" else "instance_range"
        raise ImageRejected(reason, f"ids {values.min()}..{values.max()}, {how.kind} are 0..{top}")
    return np.ascontiguousarray(values.astype(dtype(how.kind)))


def _channels(raw: RawImage, how: Picture) -> Array:
    count = raw.values.shape[2]
    if how.channel_count is not None and count != how.channel_count:
        raise ImageRejected("wrong_kind", f"{count} channels, {how.channel_count} are configured")
    if raw.values.dtype.kind == "f" and how.range == "full":
        values = raw.values.astype("<f4")
        if raw.missing is not None:
            raise ImageRejected("value_range", f"{raw.missing_pixels} pixels have no value; set shard.range")
        if values.size and np.abs(values).max() > 1:
            raise ImageRejected("value_range", "floats must be in [-1, 1]; shard.range scales others")
        return values
    return (_unit(raw.values, raw, how) * 2 - 1).astype("<f4")


def _light(raw: RawImage, how: Picture) -> Array:
    """Colours or lightness, laid over white."""
    values, opacity, stored = raw.values, None, dtype(how.kind)
    ready = values.dtype == stored and raw.white in (None, np.iinfo(stored).max) and how.range == "full"
    if ready and raw.missing is None and values.shape[2] == (1 if how.kind in ("grey", "grey16") else 3):
        return values
    if raw.alpha != "none":
        values, opacity = values[:, :, :-1], values[:, :, -1:]
        opacity = (opacity / np.float32(_full(opacity, raw)[1])).astype(np.float32)
    if values.shape[2] not in (1, 3):
        raise ImageRejected("wrong_kind", f"{values.shape[2]} bands are no colours; use kind channels")
    if values.dtype.kind == "f" and how.range == "full":
        raise ImageRejected("wrong_kind", "floating-point values; shard.range says which are black and white")
    unit = _unit(values, raw, how)
    if opacity is not None:
        unit = unit * opacity if raw.alpha == "straight" else unit
        unit = np.minimum(unit + (1 - opacity), 1)
    grey = how.kind in ("grey", "grey16")
    if grey and unit.shape[2] == 3:
        unit = unit @ _LUMA[:, None]
    if not grey and unit.shape[2] == 1:
        unit = np.repeat(unit, 3, axis=2)
    return settled(unit * np.iinfo(stored).max, stored)


def _unit(values: Array, raw: RawImage, how: Picture) -> Array:
    """Values in [0, 1]: the ends of the range are 0 and 1, and what is missing is 0."""
    missing = None if raw.missing is None else raw.missing[:, :, : values.shape[2]]
    wide = values.astype(np.float64 if values.dtype.itemsize >= 4 else np.float32)
    low, high = (np.asarray(end, wide.dtype) for end in _limits(values, missing, raw, how))
    unit: Array = np.clip((wide - low) / (high - low), 0, 1)
    if missing is not None:
        unit[missing] = 0
    return unit


def _limits(
    values: Array, missing: npt.NDArray[np.bool_] | None, raw: RawImage, how: Picture
) -> tuple[npt.ArrayLike, npt.ArrayLike]:
    """Black and white, (1,) or one a channel. Percentiles are the image's own, of each channel for data."""
    if how.range == "full":
        return _full(values, raw)
    if how.range == "percentile":
        axis = (0, 1) if how.kind == "channels" else None
        known = values if missing is None else np.where(missing, np.nan, values.astype(np.float64))
        known = known if np.isfinite(known).any() else np.zeros(1)
        low, high = np.nanpercentile(known, PERCENTILES, axis=axis)
        return low, np.where(high > low, high, low + 1)
    return how.range


def _full(values: Array, raw: RawImage) -> tuple[float, float]:
    if values.dtype.kind == "f":
        return 0, 1
    if raw.white is not None:
        return 0, raw.white
    if values.dtype.itemsize <= 2:
        return float(np.iinfo(values.dtype).min), float(np.iinfo(values.dtype).max)
    if values.size and (values.min() < 0 or values.max() > 65535):
        text = f"values {values.min()}..{values.max()}, 16 bits hold 0..65535; set shard.range"
        raise ImageRejected("value_range", text)
    return 0, 65535
