"""PNG files, written fast: every row as its differences from the row above, deflated by ISA-L.

Pillow tries five filters a row and deflates with zlib, which takes seven times as long and saves an eighth of
the bytes (`python -m benchmarks.data png`). Any reader of PNGs reads both.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt
from isal import isal_zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"

_COLORS = {1: 0, 2: 4, 3: 2, 4: 6}  # channels -> grey, grey with alpha, RGB, RGBA
_INDEXED = 3
_NONE, _UP = 0, 2  # filters of a row
_LEVEL = 1  # of ISA-L's 0 to 3: those above find nothing more in photos


def encode(array: npt.NDArray[Any], palette: bytes = b"") -> bytes:
    """An array (H, W, C) of uint8 or uint16, C = 1 (grey), 2 (with alpha), 3 (RGB) or 4, as a PNG file.

    `palette`: RGB bytes of each value; the array is (H, W, 1) of uint8 then, indices into it.
    """
    height, width, channels = array.shape
    kind = _INDEXED if palette else _COLORS[channels]
    header = struct.pack(">IIBBBBB", width, height, 8 * array.itemsize, kind, 0, 0, 0)
    ordered = np.ascontiguousarray(array, array.dtype.newbyteorder(">"))
    rows = ordered.view(np.uint8).reshape(height, width * channels * array.itemsize)
    packed = isal_zlib.compress(_filtered(rows, _UP), _LEVEL)
    if channels == 1:  # ids: areas of one value repeat as they are
        packed = min(packed, isal_zlib.compress(_filtered(rows, _NONE), _LEVEL), key=len)
    colors = _chunk(b"PLTE", palette) if palette else b""
    return SIGNATURE + _chunk(b"IHDR", header) + colors + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")


def _filtered(rows: npt.NDArray[np.uint8], kind: int) -> npt.NDArray[np.uint8]:
    """(H, bytes of a row) -> (H, 1 + bytes): each row after the name of its filter."""
    out = np.empty((rows.shape[0], 1 + rows.shape[1]), np.uint8)
    out[:, 0] = kind
    if kind == _UP:
        out[0, 1:] = rows[0]  # above it are zeros
        np.subtract(rows[1:], rows[:-1], out=out[1:, 1:])  # modulo 256
    else:
        out[:, 1:] = rows
    return out


def _chunk(name: bytes, data: bytes) -> bytes:
    checksum = isal_zlib.crc32(data, isal_zlib.crc32(name))
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)
