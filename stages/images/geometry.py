"""Sizes: halves of side-by-side images, resizing, integer reduction.

in:  an array (H, W, C) of a kind
out: an array of the same kind and another size; ids are never mixed
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from stages.base import Kind
from stages.images.kinds import IDS, Array, Half, ImageRejected, settled


def crop_half(array: Array, half: Half | Literal[""]) -> Array:
    """One half of a side-by-side image; all of it for "". An odd line in the middle belongs to neither."""
    height, width = array.shape[:2]
    if (half in ("left", "right") and width < 2) or (half in ("top", "bottom") and height < 2):
        raise ImageRejected("too_small", f"{width}x{height} cannot hold two halves")
    match half:
        case "left":
            return array[:, : width // 2]
        case "right":
            return array[:, width - width // 2 :]
        case "top":
            return array[: height // 2]
        case "bottom":
            return array[height - height // 2 :]
    return array


def crop_to_shape(array: Array, size: tuple[int, int]) -> Array:
    """The middle of an image in the aspect ratio of `size` (width, height), as large as fits."""
    height, width = array.shape[:2]
    across = min(width, max(1, round(height * size[0] / size[1])))
    down = min(height, max(1, round(width * size[1] / size[0])))
    left, top = (width - across) // 2, (height - down) // 2
    return array[top : top + down, left : left + across]


def upright(array: Array, orientation: int) -> Array:
    """The image (H, W, C) as it is seen, by the orientation 1 to 8 of TIFF and EXIF."""
    if orientation in (5, 6, 7, 8):
        array = array.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return array[::-1] if orientation in (3, 4, 7, 8) else array


def resize(array: Array, size: tuple[int, int], kind: Kind) -> Array:
    """The image at `size` (width, height): amounts bicubic and antialiased, ids from the nearest pixel."""
    width, height = size
    if array.shape[:2] == (height, width):
        return array
    if kind in IDS:
        return np.ascontiguousarray(
            array[np.ix_(_nearest(array.shape[0], height), _nearest(array.shape[1], width))]
        )
    if array.dtype == np.uint8 and array.shape[2] in (1, 3):
        image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else np.ascontiguousarray(array))
        out = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
        return out.reshape(height, width, array.shape[2])
    planes = [
        np.asarray(
            Image.fromarray(np.ascontiguousarray(array[:, :, c], dtype=np.float32)).resize(
                size, Image.Resampling.BICUBIC
            )
        )
        for c in range(array.shape[2])
    ]
    return settled(np.stack(planes, axis=2), array.dtype)  # bicubic overshoots at edges


def _nearest(old: int, new: int) -> npt.NDArray[np.intp]:
    """Index of the old pixel whose centre is nearest to each new pixel's."""
    return np.minimum(((np.arange(new) + 0.5) * old / new).astype(np.intp), old - 1)


def shrink(array: Array, factor: int, kind: Kind) -> Array:
    """The image at 1/`factor` of its size, for phases at lower resolution: means of squares, nearest ids."""
    if factor == 1:
        return array
    height, width = array.shape[0] // factor * factor, array.shape[1] // factor * factor
    array = array[:height, :width]
    if kind in IDS:
        return array[factor // 2 :: factor, factor // 2 :: factor]
    if array.dtype == np.uint8 and array.shape[2] in (1, 3):
        if array.strides[2] > abs(array.strides[1]):  # planar, as raw images are stored
            planes = [_reduced(array[:, :, c], factor) for c in range(array.shape[2])]
            return np.moveaxis(np.stack(planes), 0, 2)
        small = _reduced(array[:, :, 0] if array.shape[2] == 1 else array, factor)
        return small.reshape(height // factor, width // factor, array.shape[2])
    blocks = array.reshape(height // factor, factor, width // factor, factor, array.shape[2])
    return settled(blocks.mean(axis=(1, 3), dtype=np.float32), array.dtype)


def _reduced(array: Array, factor: int) -> Array:
    """Means over squares, rounded, of a plane (H, W) or colours (H, W, 3) of uint8."""
    return np.asarray(Image.fromarray(np.ascontiguousarray(array)).reduce(factor))
