"""Decode image files that nobody has checked.

in:  the bytes of a file, and how to read it
out: an array (H, W, C) of that kind, or ImageRejected with the reason

Pure: Pillow, tifffile, imagecodecs, numpy and isal only. They release the GIL while they decode, so threads
help.
"""

from __future__ import annotations

import io
import math
import re
import struct
from dataclasses import dataclass

import imagecodecs
import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from stages.base import MAX_PIXELS, Kind
from stages.images import colour, tiff
from stages.images.encode import checksum
from stages.images.geometry import upright
from stages.images.kinds import CHANNELS, IDS, Array, ImageRejected, dtype
from stages.images.raw import Alpha, RawImage, of_kind
from stages.models.architecture import Picture

# Pillow's plugins that decode in process and in bounded memory. EPS would start Ghostscript.
_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000")
_DEEP = {
    "PNG": imagecodecs.png_decode,
    "JPEG2000": imagecodecs.jpeg2k_decode,
    "AVIF": imagecodecs.avif_decode,
}
_NPY_MAGIC = b"\x93NUMPY"
_ID_MODES = ("L", "P", "1", "I;16", "I;16L", "I;16B", "I")
_DEEP_MODES = ("I;16", "I;16L", "I;16B", "I", "F")


@dataclass(frozen=True, slots=True)
class Decoded:
    """An image (H, W, C), and the number of its pixels that had no value (NaN, the file's nodata)."""

    array: Array
    missing: int = 0


def decode_image(data: bytes, how: Kind | Picture, *, max_pixels: int = MAX_PIXELS) -> Array:
    """The array of `decode_counted`."""
    return decode_counted(data, how, max_pixels=max_pixels).array


def decode_counted(
    data: bytes, how: Kind | Picture, *, max_pixels: int = MAX_PIXELS, min_side: int = 1
) -> Decoded:
    """The image in `data` as `how` says, upright, without transparency.

    The content decides the format, not the file's name. EXIF orientation is applied, colours are converted
    to sRGB by the file's profile, alpha is laid over white, palettes and CMYK become RGB (but a palette image
    read as ids gives its indices). The size is checked in the header, before any pixel is decoded; PNG
    checksums are verified. Kinds `lab_l` and `lab_ab` are read as RGB (see `colour.lab_channels`).

    Raises ImageRejected, and nothing else, whatever the bytes are.
    """
    if not data:
        raise ImageRejected("empty")
    how = how if isinstance(how, Picture) else Picture(kind=how)
    try:
        decoded = _decoded(data, how, min(max_pixels, MAX_PIXELS))
    except ImageRejected:
        raise
    except UnidentifiedImageError as error:
        raise ImageRejected("not_an_image", _head(data)) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError) as error:
        reason, _, _ = _text(error).rpartition(", could be decompression bomb")
        raise ImageRejected("too_large", reason.partition(": ")[2] or _text(error)) from error
    except Exception as error:
        # On bad bytes the readers raise OSError, SyntaxError, ValueError, struct.error, IndexError and
        # more. No list of them would be complete, and one object must not end a run over millions.
        text = str(error).lower()
        cut = "truncated" in text or isinstance(error, EOFError)
        raise ImageRejected("truncated" if cut else "unreadable", _text(error)) from error
    height, width = decoded.array.shape[:2]
    if min(height, width) < min_side:
        raise ImageRejected("too_small", f"{width}x{height}, at least {min_side} pixels a side are required")
    return decoded


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _head(data: bytes) -> str:
    if data[4:8] == b"ftyp" and data[8:11] in (b"hei", b"hev", b"mif"):
        return "HEIC is not read: convert it to PNG or JPEG"
    if data.startswith(tiff.MAGIC):
        return "this compression or layout of TIFF is not read: write it with DEFLATE, LZW or uncompressed"
    return f"no format that is read; begins with {data[:12]!r}"


def _decoded(data: bytes, how: Picture, limit: int) -> Decoded:
    if how.kind == "labels" and how.palette is not None:
        colours = _read(data, Picture(kind="rgb"), limit, profiles=False).array
        lossy = data.startswith(b"\xff\xd8") or data[4:12] == b"ftypavif"
        try:
            return Decoded(colour.class_ids(colours, how, exact=not lossy))
        except ImageRejected as error:
            if data[8:12] != b"WEBP" or b"VP8 " not in data[12:64]:
                raise
            raise ImageRejected(error.reason, f"{error.detail}; lossy WebP changes them: use PNG") from error
    decoded = _read(data, how, limit, profiles=how.range == "full")
    return Decoded(colour.class_ids(decoded.array, how)) if how.kind == "labels" else decoded


def _read(data: bytes, how: Picture, limit: int, *, profiles: bool) -> Decoded:
    """The image as `how` says, before the rules of labels."""
    raw: RawImage | None = None
    if data.startswith(_NPY_MAGIC):
        raw = _from_npy(data, how, limit)
    elif data.startswith(tiff.MAGIC):
        raw = tiff.read(data, how.kind, limit)
    if raw is None:
        raw = _from_pillow(data, how, limit, profiles=profiles)
    if raw.profile and profiles and how.kind not in IDS and dtype(how.kind) == np.uint8:
        seen = of_kind(raw, Picture(kind="grey" if raw.values.shape[2] < 3 else "rgb"))
        image = Image.fromarray(seen[:, :, 0] if seen.shape[2] == 1 else seen)
        raw = RawImage(_light(colour.to_srgb(image, raw.profile), how.kind), missing=raw.missing)
    return Decoded(of_kind(raw, how), raw.missing_pixels)


def _from_pillow(data: bytes, how: Picture, limit: int, *, profiles: bool) -> RawImage:
    kind = how.kind
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        width, height = image.size
        if width * height > limit:
            raise ImageRejected("too_large", f"{width}x{height} by its header, the limit is {limit} pixels")
        # a camera's MPO holds the photo first, then previews; the pages of a TIFF are counted in `tiff`
        frames = 1 if image.format in ("MPO", "TIFF") else int(getattr(image, "n_frames", 1))
        if frames > 1:
            raise ImageRejected("animated", f"{frames} frames")
        if kind in IDS and (lossy := _lossy(image, data)):
            raise ImageRejected("wrong_kind", f"{lossy} is lossy, it cannot hold ids")
        if kind in IDS and image.mode not in _ID_MODES:
            text = f"ids need one channel of integers, the image is {image.mode}"
            raise ImageRejected("wrong_kind", f"{text}; shard.palette reads colours")
        if image.format == "PNG":
            _verify_png(data)
        if (white := _white(data, image)) != 255:
            return _deep(_DEEP[str(image.format)](data), image, kind, white)
        if image.format == "PPM" and image.mode in ("L", "I", "RGB"):
            return _netpbm(data, image)
        ImageOps.exif_transpose(image, in_place=True)
        if image.format == "PNG" and data[24:26] in (b"\2\0", b"\4\0"):
            return _as_written(image, 2 ** data[24] - 1, kind)
        if kind in IDS:
            return RawImage(np.asarray(image)[:, :, None])
        if image.mode in _DEEP_MODES:
            values = np.asarray(image)[:, :, None]
            missing = ~np.isfinite(values)
            return RawImage(values, missing=missing if missing.any() else None)
        if kind == "channels":
            plain = image.mode in ("L", "RGB", "RGBA", "LA", "CMYK")
            values = np.asarray(image if plain else image.convert("RGB"))
            return RawImage(values if values.ndim == 3 else values[:, :, None])
        profile = image.info.get("icc_profile") if profiles else None
        return RawImage(_light(colour.to_srgb(image, profile) if profile else image, kind))


def _lossy(image: Image.Image, data: bytes) -> str:
    """The name of a lossy compression, else ""."""
    compression = str(image.info.get("compression", ""))
    if image.format == "TIFF" and compression in ("jpeg", "tiff_jpeg", "webp"):
        return f"TIFF with compression {compression}"
    if image.format == "JPEG2000":  # its coding style says whether the wavelet is the reversible one
        return "" if data[_segment(data, 0x52) + 13] == 1 else "this JPEG 2000"
    return str(image.format) if image.format in ("JPEG", "MPO", "AVIF") else ""


def _segment(data: bytes, kind: int) -> int:
    """The place of a segment in the main header of a JPEG 2000 (ISO 15444-1, annex A)."""
    at = data.index(b"\xff\x4f\xff\x51") + 2  # the codestream's start, and its first segment
    while data[at : at + 2] != bytes((0xFF, kind)):
        if data[at] != 0xFF:
            raise ImageRejected("unreadable", "JPEG 2000 without a coding style")
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return at


def _white(data: bytes, image: Image.Image) -> int | None:
    """The largest value of a PNG, JPEG 2000 or AVIF, 255 for less of a PNG; None if values have a sign."""
    if image.format == "PNG":
        return (1 << max(8, data[24])) - 1
    if image.format == "AVIF":
        return (255, 255, 1023, 4095)[data[data.index(b"av1C") + 6] >> 5 & 3]
    if image.format != "JPEG2000" or image.mode in ("P", "PA"):
        return 255
    *area, count, bits = struct.unpack_from(">6xIIII16xHB", data, _segment(data, 0x51))
    if (area[0] - area[2], area[1] - area[3], count) != (*image.size, len(image.getbands())):
        raise ImageRejected("unreadable", "its two headers differ in size")
    return None if bits & 0x80 else (2 << int(bits)) - 1


def _as_written(image: ImageFile.ImageFile, white: int, kind: Kind) -> RawImage:
    """A grey PNG of 2 or 4 bits, which Pillow scales up; its transparent value as opacity."""
    values = np.asarray(image)[:, :, None] // np.uint8(255 // white)
    profile, clear = image.info.get("icc_profile"), image.info.get("transparency")
    if clear is None or kind in IDS or kind == "channels":
        return RawImage(values, white, profile=profile)
    opacity = np.where(values == clear, 0, white).astype(values.dtype)
    return RawImage(np.concatenate([values, opacity], axis=2), white, "straight", profile=profile)


def _netpbm(data: bytes, image: ImageFile.ImageFile) -> RawImage:
    """The values of a PGM or PPM as written: Pillow scales them, and keeps 8 bits of those of colours."""
    codec, _, start, options = image.tile[0]
    white = options[1] if isinstance(options, tuple) else 65535 if options == "I;16B" else 255
    shape = image.height, image.width, len(image.getbands())
    count, kept = math.prod(shape), np.dtype("u1" if white < 256 else ">u2")
    if codec == "ppm_plain":
        values = np.fromstring(re.sub(rb"#[^\r\n]*", b"", data[start:]), np.int32, sep=" ")[:count]
    else:
        values = np.frombuffer(data, kept, min(count, (len(data) - start) // kept.itemsize), start)
    if len(values) < count:
        raise ImageRejected("truncated", f"{len(values)} values of {count}")
    return RawImage(values.reshape(shape), white)


def _deep(values: Array, image: Image.Image, kind: Kind, white: int | None = None) -> RawImage:
    """An image of other than 8 bits, of which Pillow keeps 8 at most: `values` are as written."""
    values = values if values.ndim == 3 else values[:, :, None]
    if (kind in IDS or kind == "channels") and image.mode not in ("LA", "RGBA", "CMYK"):
        values = values[:, :, : len(image.getbands())]  # a transparent value is no channel
    values = upright(values, image.getexif().get(tiff.ORIENTATION, 1))
    alpha: Alpha = "straight" if values.shape[2] in (2, 4) and image.mode != "CMYK" else "none"
    return RawImage(values, white, alpha, profile=image.info.get("icc_profile"))


def _light(image: Image.Image, kind: Kind) -> Array:
    """The image in 8 bits, laid over white: lightness (H, W, 1) for kinds of it, else colours (H, W, 3)."""
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba).convert("RGB")
    mode = "L" if kind in ("grey", "grey16") else "RGB"
    array = np.asarray(image if image.mode == mode else image.convert(mode))
    return array if array.ndim == 3 else array[:, :, None]


def _verify_png(data: bytes) -> None:
    """Raise ImageRejected if a chunk of a PNG is damaged: Pillow ignores the checksums of pixel data."""
    view, at = memoryview(data), 8
    while at + 12 <= len(data):
        size = int.from_bytes(view[at : at + 4], "big")
        end = at + 12 + size
        if end > len(data):
            break
        if checksum(view[at + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            raise ImageRejected("unreadable", "checksum of a PNG chunk does not match")
        if bytes(view[at + 4 : at + 8]) == b"IEND":
            return
        at = end
    raise ImageRejected("truncated", "PNG without its end")


def _from_npy(data: bytes, how: Picture, limit: int) -> RawImage:
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
    wanted = how.channel_count if how.kind == "channels" else CHANNELS[how.kind]
    if how.kind in ("lab_l", "lab_ab"):
        wanted = 3
    if wanted is not None and array.shape[2] != wanted and array.shape[0] == wanted:
        array = np.moveaxis(array, 0, 2)
    if how.kind != "channels" and how.kind not in IDS and how.range == "full":
        array = _exact(array, how.kind)
    missing = ~np.isfinite(array)
    return RawImage(array, missing=missing if missing.any() else None)


def _exact(array: Array, kind: Kind) -> Array:
    """A .npy array as amounts of `kind`, whose values it must hold as they are."""
    top = np.iinfo(dtype(kind)).max
    if array.dtype.kind not in "ui":
        raise ImageRejected("wrong_kind", f".npy of {array.dtype} as {kind}; shard.range scales other values")
    if array.size and (array.min() < 0 or array.max() > top):
        raise ImageRejected("value_range", f"values {array.min()}..{array.max()}, {kind} holds 0..{top}")
    return np.ascontiguousarray(array.astype(dtype(kind)))
