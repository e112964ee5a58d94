"""Pictures for a person to look at: any kind as RGB, sheets of samples, perceptual hashes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from stages.base import Kind
from stages.images.colour import colorize, lab_to_rgb
from stages.images.kinds import Array, settled


def picture(array: Array, kind: Kind, *, classes: int | None = None, lightness: Array | None = None) -> Array:
    """Any kind as a picture (H, W, 3) uint8 for a person to look at.

    `lightness` is the stored `lab_l` (H, W, 1) a `lab_ab` belongs to; without it L = 50 is taken.
    """
    match kind:
        case "rgb":
            return array
        case "labels":
            return colorize(array, classes)
        case "instances":
            return colorize(array)
        case "grey" | "lab_l":
            return np.repeat(array, 3, axis=2)
        case "grey16":
            return np.repeat((array // 257).astype(np.uint8), 3, axis=2)
        case "lab_ab":
            level = np.full((*array.shape[:2], 1), 50, np.float32)
            if lightness is not None:
                level = lightness.astype(np.float32) / np.float32(2.55)
            return lab_to_rgb(np.concatenate([level, array.astype(np.float32) - 128], axis=2))
        case "channels":
            first = array[:, :, [0, 1, 2]] if array.shape[2] >= 3 else np.repeat(array[:, :, :1], 3, axis=2)
            return settled((first + 1) * 127.5, np.dtype("u1"))


def sheet(rows: Sequence[Sequence[Array]], *, gap: int = 4) -> Array:
    """Pictures (H, W, 3), all of one size, as one sheet with white gaps: a row a sample."""
    height, width = rows[0][0].shape[:2]
    columns = max(len(row) for row in rows)
    out = np.full((len(rows) * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            y, x = gap + i * (height + gap), gap + j * (width + gap)
            out[y : y + height, x : x + width] = image
    return out


def perceptual_hash(array: Array) -> int:
    """64 bits that near-duplicates of an image (H, W, C) uint8 share: the signs of differences between
    neighbours of a 9x8 thumbnail (dHash). A flat image gives 0."""
    grey = array[:, :, 0] if array.shape[2] != 3 else np.asarray(Image.fromarray(array).convert("L"))
    small = np.asarray(Image.fromarray(grey).resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = (small[:, 1:] > small[:, :-1]).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
