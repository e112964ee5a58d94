"""Pictures for people: any kind as RGB, sheets of samples.

in:  arrays (H, W, C) of any kind
out: pictures (H, W, 3) uint8
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stages.base import Kind
from stages.images.colour import colorize, lab_to_rgb
from stages.images.kinds import Array, settled


def picture(array: Array, kind: Kind, *, classes: int | None = None, lightness: Array | None = None) -> Array:
    """An image of any kind as a picture (H, W, 3) uint8.

    lightness   the stored `lab_l` (H, W, 1) that a `lab_ab` belongs to; None: L = 50
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
            return np.repeat(settled(array / 257, np.dtype("u1")), 3, axis=2)
        case "lab_ab":
            level = np.full((*array.shape[:2], 1), 50, np.float32)
            if lightness is not None:
                level = lightness.astype(np.float32) / np.float32(2.55)
            return lab_to_rgb(np.concatenate([level, array.astype(np.float32) - 128], axis=2))
        case "channels":
            first = array[:, :, [0, 1, 2]] if array.shape[2] >= 3 else np.repeat(array[:, :, :1], 3, axis=2)
            return settled((first + 1) * 127.5, np.dtype("u1"))


def sheet(rows: Sequence[Sequence[Array]]) -> Array:
    """One picture of many (H, W, 3) of one size, with white gaps between them: one row a sample."""
    gap = 4
    height, width = rows[0][0].shape[:2]
    columns = max(len(row) for row in rows)
    out = np.full((len(rows) * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            y, x = gap + i * (height + gap), gap + j * (width + gap)
            out[y : y + height, x : x + width] = image
    return out
