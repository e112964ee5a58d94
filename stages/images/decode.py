"""Decode image files that nobody has checked, and the images of shards.

in:  the bytes of a file, and the kind to read it as
out: an array (H, W, C) of that kind, or ImageRejected with the reason

Pure: Pillow, numpy and isal only. Pillow releases the GIL while it decodes, so threads help.
"""

from __future__ import annotations

import io
import math
from typing import get_args

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from stages.base import Encoding, Kind
from stages.images import deflate
from stages.images.kinds import CHANNELS, IDS, Array, ImageRejected, Reason, dtype

MAX_PIXELS = 89_478_485
"""The most pixels of an image, whatever the config says: Pillow warns of decompression bombs above it."""

# Pillow's plugins that decode in process and in bounded memory. EPS would start Ghostscript.
_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000")
PHOTOMETRIC = 262  # the TIFF tag PhotometricInterpretation
_NPY_MAGIC = b"\x93NUMPY"
_ID_MODES = ("L", "P", "1", "I;16", "I;16L", "I;16B", "I")
_DEEP_MODES = ("I;16", "I;16L", "I;16B", "I")


def decode_image(
    data: bytes, kind: Kind, *, max_pixels: int = MAX_PIXELS, channels: int | None = None, min_side: int = 1
) -> Array:
    """The image in `data` as an array (H, W, C) of `kind`, upright, without transparency.

    The content decides the format, not the file's name. EXIF orientation is applied, alpha is laid over
    white, palettes and CMYK become RGB (but a palette image read as labels gives its indices). The size is
    checked in the header, before any pixel is decoded; PNG checksums are verified. `channels` is the number
    that kind `channels` must have. Kinds `lab_l` and `lab_ab` are read as RGB (see `colour.lab_channels`).

    Raises ImageRejected, and nothing else, whatever the bytes are.
    """
    if not data:
        raise ImageRejected("empty")
    limit = min(max_pixels, MAX_PIXELS)
    try:
        read = _from_npy if data.startswith(_NPY_MAGIC) else _from_image
        array = read(data, kind, limit, channels)
    except ImageRejected:
        raise
    except UnidentifiedImageError as error:
        raise ImageRejected("not_an_image", _head(data)) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError) as error:
        raise ImageRejected("too_large", _text(error)) from error
    except Exception as error:
        # On bad bytes Pillow's readers raise OSError, SyntaxError, ValueError, struct.error, IndexError and
        # more. No list of them would be complete, and one object must not end a run over millions.
        text = str(error).lower()
        cut = "truncated" in text or isinstance(error, EOFError)
        raise ImageRejected("truncated" if cut else "unreadable", _text(error)) from error
    height, width = array.shape[:2]
    if min(height, width) < min_side:
        raise ImageRejected("too_small", f"{width}x{height}, at least {min_side} pixels a side are required")
    return array


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _head(data: bytes) -> str:
    if data[4:8] == b"ftyp" and data[8:11] in (b"hei", b"hev", b"mif"):
        return "HEIC is not read: convert it to PNG or JPEG"
    return f"no format that is read; begins with {data[:12]!r}"


def _from_image(data: bytes, kind: Kind, limit: int, channels: int | None) -> Array:
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        width, height = image.size
        if width * height > limit:
            raise ImageRejected("too_large", f"{width}x{height} by its header, the limit is {limit} pixels")
        if image.format == "PNG":
            _verify_png(data)
        frames = int(getattr(image, "n_frames", 1))
        if kind == "channels" and image.format == "TIFF" and frames > 1:
            return _from_pages(image, frames, limit, channels)
        if frames > 1 and image.format != "MPO":  # a camera's MPO holds the photo first, then previews
            raise ImageRejected("animated", f"{frames} frames")
        if kind in IDS and image.format in ("JPEG", "MPO", "AVIF"):
            raise ImageRejected("wrong_kind", f"{image.format} is lossy, it cannot hold ids")
        spread = _spread(image)
        ImageOps.exif_transpose(image, in_place=True)
        array = _READERS[kind](image, channels)
        return array // spread if kind in IDS else array


def _spread(image: Image.Image) -> int:
    """The distance between neighbouring values of a grey image: Pillow spreads 2 and 4 bits over 0..255."""
    for tile in getattr(image, "tile", ()):
        mode = tile[3] if isinstance(tile[3], str) else tile[3][0] if tile[3] else ""
        if image.mode == "L" and mode.startswith(("L;2", "L;4")):
            return 85 if mode.startswith("L;2") else 17
    return 1


def _verify_png(data: bytes) -> None:
    """Raise ImageRejected if a chunk of a PNG is damaged: Pillow ignores the checksums of pixel data."""
    view, at = memoryview(data), 8
    while at + 12 <= len(data):
        size = int.from_bytes(view[at : at + 4], "big")
        end = at + 12 + size
        if end > len(data):
            break
        if deflate.crc32(view[at + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            raise ImageRejected("unreadable", "checksum of a PNG chunk does not match")
        if bytes(view[at + 4 : at + 8]) == b"IEND":
            return
        at = end
    raise ImageRejected("truncated", "PNG without its end")


def _flat(image: Image.Image) -> Image.Image:
    """The image laid over white, without transparency."""
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image


def _deep(image: Image.Image) -> Array:
    """A 16-bit (or wider integer) image as unsigned 16-bit values; light is large."""
    values = np.asarray(image)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise ImageRejected("value_range", f"values {values.min()}..{values.max()}, 16 bits hold 0..65535")
    array = values.astype("<u2")
    # WhiteIsZero, as radiographs have it: Pillow inverts images of up to 8 bits, not deeper ones
    inverted = image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == 0  # type: ignore[attr-defined]
    return np.uint16(65535) - array if inverted else array


def _read_rgb(image: Image.Image, _: int | None) -> Array:
    if image.mode in _DEEP_MODES:
        grey = (_deep(image) // 257).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ImageRejected("wrong_kind", "floating-point image, not colours")
    flat = _flat(image)
    return np.asarray(flat if flat.mode == "RGB" else flat.convert("RGB"))


def _read_grey(image: Image.Image, _: int | None) -> Array:
    if image.mode in _DEEP_MODES:
        return (_deep(image) // 257).astype(np.uint8)[:, :, None]
    if image.mode == "F":
        raise ImageRejected("wrong_kind", "floating-point image, not lightness in 8 bits")
    return np.asarray(_flat(image).convert("L"))[:, :, None]


def _read_grey16(image: Image.Image, _: int | None) -> Array:
    if image.mode in _DEEP_MODES:
        return _deep(image)[:, :, None]
    if image.mode == "F":
        raise ImageRejected("wrong_kind", "floating-point image, not lightness in 16 bits")
    return np.asarray(_flat(image).convert("L")).astype("<u2")[:, :, None] * np.uint16(257)


def _ids(image: Image.Image) -> Array:
    if image.mode not in _ID_MODES:
        raise ImageRejected("wrong_kind", f"ids need one channel of integers, the image is {image.mode}")
    return np.asarray(image)


def _read_labels(image: Image.Image, _: int | None) -> Array:
    ids = _ids(image)
    if ids.size and (ids.max() > 255 or ids.min() < 0):
        raise ImageRejected("label_range", f"ids {ids.min()}..{ids.max()}, labels are 0..255")
    return ids.astype(np.uint8)[:, :, None]


def _read_instances(image: Image.Image, _: int | None) -> Array:
    ids = _ids(image)
    if ids.size and (ids.max() > 65535 or ids.min() < 0):
        raise ImageRejected("instance_range", f"ids {ids.min()}..{ids.max()}, instances are 0..65535")
    return ids.astype("<u2")[:, :, None]


def _read_lab(image: Image.Image, _: int | None) -> Array:
    return _read_rgb(image, None)  # converted to Lab after resizing in RGB, as in the paper


def _read_channels(image: Image.Image, channels: int | None) -> Array:
    if image.mode in ("L", "RGB", "RGBA", "LA", "CMYK"):
        array = np.asarray(image)
    elif image.mode in _DEEP_MODES:
        array = _deep(image)
    elif image.mode == "F":
        array = np.asarray(image)
    else:
        array = np.asarray(image.convert("RGB"))
    return _as_channels(array[:, :, None] if array.ndim == 2 else array, channels)


_READERS = {
    "rgb": _read_rgb,
    "grey": _read_grey,
    "labels": _read_labels,
    "instances": _read_instances,
    "grey16": _read_grey16,
    "lab_l": _read_lab,
    "lab_ab": _read_lab,
    "channels": _read_channels,
}
assert set(_READERS) == set(get_args(Kind))


def _from_pages(image: Image.Image, frames: int, limit: int, channels: int | None) -> Array:
    """A multi-page TIFF as channels, one a page."""
    if channels is not None and frames != channels:
        raise ImageRejected("wrong_kind", f"{frames} pages, {channels} channels are configured")
    if frames * image.width * image.height > 4 * limit:
        raise ImageRejected("too_large", f"{frames} pages of {image.width}x{image.height}")
    pages = []
    for index in range(frames):
        image.seek(index)
        if image.mode not in ("L", "F", *_DEEP_MODES):
            raise ImageRejected("wrong_kind", f"page {index} is {image.mode}, a page must have one channel")
        pages.append(_deep(image) if image.mode in _DEEP_MODES else np.asarray(image))
        if pages[-1].shape != pages[0].shape or pages[-1].dtype != pages[0].dtype:
            raise ImageRejected("wrong_kind", f"page {index} differs from the first in size or depth")
    return _as_channels(np.stack(pages, axis=2), channels)


def _from_npy(data: bytes, kind: Kind, limit: int, channels: int | None) -> Array:
    """The array of a .npy file, (H, W), (H, W, C) or (C, H, W); one that needs pickle is rejected."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ImageRejected("wrong_kind", f".npy version {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, kept = read(file, max_header_size=10_000)
    if kept.hasobject or kept.kind not in "uif" or kept.itemsize > 8:
        raise ImageRejected("wrong_kind", f".npy of {kept}: integers or floats are required")
    if len(shape) not in (2, 3) or min(shape) < 1 or (len(shape) == 3 and min(shape) > 4096):
        raise ImageRejected("wrong_kind", f".npy of shape {shape}")
    count = math.prod(shape)
    if count > 4 * limit:
        raise ImageRejected("too_large", f".npy of shape {shape}")
    if len(data) - file.tell() < count * kept.itemsize:
        raise ImageRejected("truncated", f".npy of shape {shape} holds {len(data) - file.tell()} bytes")
    flat = np.frombuffer(data, kept, count, file.tell())
    array = flat.reshape(shape, order="F" if fortran else "C")
    if array.ndim == 2:
        array = array[:, :, None]
    wanted = channels if kind == "channels" else CHANNELS[kind]
    if wanted is not None and array.shape[2] != wanted and array.shape[0] == wanted:
        array = np.moveaxis(array, 0, 2)
    if kind == "channels":
        return _as_channels(array, channels)
    return _npy_of_kind(array, kind)


def _npy_of_kind(array: Array, kind: Kind) -> Array:
    """A .npy array as an image of `kind`, whose values it must hold exactly."""
    wanted = 3 if kind in ("lab_l", "lab_ab") else CHANNELS[kind]
    if array.dtype.kind not in "ui" or array.shape[2] != wanted:
        raise ImageRejected("wrong_kind", f".npy of {array.dtype} with {array.shape[2]} channels as {kind}")
    top = np.iinfo(dtype(kind)).max
    if array.size and (array.min() < 0 or array.max() > top):
        reasons: dict[str, Reason] = {"labels": "label_range", "instances": "instance_range"}
        raise ImageRejected(reasons.get(kind, "value_range"), f"values {array.min()}..{array.max()}")
    return np.ascontiguousarray(array.astype(dtype(kind)))


def _as_channels(array: Array, channels: int | None) -> Array:
    """(H, W, n) as float32 in [-1, 1]: unsigned integers over their range, floats as they are."""
    if channels is not None and array.shape[2] != channels:
        raise ImageRejected("wrong_kind", f"{array.shape[2]} channels, {channels} are configured")
    if array.dtype.kind == "f":
        values = array.astype("<f4")
        if not np.isfinite(values).all() or (values.size and np.abs(values).max() > 1):
            raise ImageRejected("value_range", "floats must be finite and in [-1, 1]")
        return values
    if array.dtype.kind != "u" or array.dtype.itemsize > 2:
        raise ImageRejected("wrong_kind", f"{array.dtype}: uint8, uint16 or floats in [-1, 1] are required")
    half = np.float32(np.iinfo(array.dtype).max / 2)
    return (array.astype("<f4") / half - np.float32(1)).astype("<f4")


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
    except Exception as error:  # as in `decode_image`
        raise ImageRejected("unreadable", _text(error)) from error
    array = array[:, :, None] if array.ndim == 2 else array
    if array.shape != (height, width, channels):
        raise ImageRejected(
            "size_mismatch", f"{array.shape} is stored, {(height, width, channels)} is expected"
        )
    return array if array.dtype == kept else array.astype(kept)
