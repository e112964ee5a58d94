"""Encode arrays as the bytes stored in shards and as PNG files, and decode what is stored.

in:  an array (H, W, C) of a kind's type
out: bytes, and their checksum; and the reverse

PNGs are written here rather than by Pillow: every row as its differences from the row above, deflated by
ISA-L. Pillow tries five filters a row and deflates with zlib: seven times the time for an eighth fewer bytes;
imagecodecs takes three to four times as long (`python -m benchmarks.data png`).
"""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from stages.base import Encoding, Kind
from stages.images.kinds import PHOTOS, Array, ImageRejected, dtype

try:
    from isal.isal_zlib import compress, crc32
except ImportError:  # zlib takes 20 times as long
    from zlib import compress, crc32

SIGNATURE = b"\x89PNG\r\n\x1a\n"

_COLORS = {1: 0, 2: 4, 3: 2, 4: 6}  # channels -> grey, grey with alpha, RGB, RGBA
_INDEXED = 3
_NONE, _UP = 0, 2  # filters of a row
_LEVEL = 1  # of ISA-L's 0 to 3: higher levels make photos no smaller


def stored_encoding(kind: Kind, encoding: Encoding) -> Encoding:
    """The encoding that a kind is stored in: lossy ones are for photos only, and PNG cannot hold floats."""
    if kind == "channels":
        return "raw"
    if encoding in ("jpeg", "webp") and kind not in PHOTOS:
        return "png"
    return encoding


def encode_image(array: Array, encoding: Encoding, *, quality: int = 95) -> bytes:
    """An array (H, W, C) as bytes. JPEG and WebP are lossy (`quality`), the others exact."""
    if encoding == "raw":
        return np.moveaxis(array, 2, 0).tobytes()
    if encoding == "png":
        return encode_png(array)
    file = io.BytesIO()
    image = to_pillow(array)
    if encoding == "jpeg":
        image.save(
            file, "JPEG", quality=quality, subsampling=0
        )  # full colour: label colours keep their edges
    else:
        image.save(file, "WEBP", quality=quality)
    return file.getvalue()


def decode_stored(
    data: bytes | memoryview, *, kind: Kind, encoding: Encoding, channels: int, size: tuple[int, int]
) -> Array:
    """A stored image as an array (H, W, C) of the kind's type; raw data is viewed, not copied.

    Raises ImageRejected if the bytes are not that image. The caller verifies their checksum before.
    """
    width, height = size
    kept = dtype(kind)
    if encoding == "raw":
        if len(data) != width * height * channels * kept.itemsize:
            raise ImageRejected("unreadable", f"{len(data)} raw bytes for {width}x{height}x{channels} {kept}")
        planar = np.frombuffer(data, kept).reshape(channels, height, width)
        return np.moveaxis(planar, 0, 2)
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            grey = encoding == "webp" and channels == 1  # WebP has no grey
            array = np.asarray(image.convert("L") if grey else image)
    except Exception as error:  # Pillow raises many kinds on bad bytes
        raise ImageRejected("unreadable", f"{type(error).__name__}: {error}") from error
    array = array[:, :, None] if array.ndim == 2 else array
    if array.shape != (height, width, channels):
        raise ImageRejected(
            "size_mismatch", f"{array.shape} is stored, {(height, width, channels)} is expected"
        )
    return array if array.dtype == kept else array.astype(kept)


def checksum(data: bytes | memoryview) -> int:
    """CRC-32 of stored bytes, verified at every use."""
    return crc32(data)


def to_pillow(array: Array) -> Image.Image:
    """An array (H, W, C) as a Pillow image: 1, 2 (as grey and alpha), 3 channels of uint8, or uint16 grey."""
    return Image.fromarray(np.ascontiguousarray(array[:, :, 0] if array.shape[2] == 1 else array))


# -- PNG ----------------------------------------------------------------------


def encode_png(array: npt.NDArray[Any], palette: bytes = b"") -> bytes:
    """An array (H, W, C) of uint8 or uint16, C = 1 (grey), 2 (with alpha), 3 (RGB) or 4, as a PNG file.

    palette   RGB bytes of each value; the array (H, W, 1) of uint8 then holds indices into it
    """
    height, width, channels = array.shape
    kind = _INDEXED if palette else _COLORS[channels]
    header = struct.pack(">IIBBBBB", width, height, 8 * array.itemsize, kind, 0, 0, 0)
    ordered = np.ascontiguousarray(array, array.dtype.newbyteorder(">"))
    rows = ordered.view(np.uint8).reshape(height, width * channels * array.itemsize)
    packed = compress(_filtered(rows, _UP), _LEVEL)
    if channels == 1:  # of ids: areas of one value repeat without a filter
        packed = min(packed, compress(_filtered(rows, _NONE), _LEVEL), key=len)
    colors = _chunk(b"PLTE", palette) if palette else b""
    return SIGNATURE + _chunk(b"IHDR", header) + colors + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")


def _filtered(rows: npt.NDArray[np.uint8], kind: int) -> npt.NDArray[np.uint8]:
    """Rows (H, bytes) as (H, 1 + bytes): each filtered, after the number of its filter."""
    if kind == _UP:  # above the first row are zeros; uint8 wraps, as the format has it
        rows = np.diff(rows, axis=0, prepend=np.zeros_like(rows[:1]))
    return np.hstack([np.full((len(rows), 1), kind, np.uint8), rows])


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc32(data, crc32(name)))
