"""Images as arrays: decode what a stranger stored, keep it verified, bring it to size.

in:  bytes of an image file, and the kind its values are to be read as
out: arrays (H, W, C); or `ImageRejected` with a reason from a small fixed set

| kind      | C | dtype   | values                                           | as the networks see it    |
|-----------|---|---------|--------------------------------------------------|---------------------------|
| rgb       | 3 | uint8   | colours                                          | x / 127.5 - 1             |
| grey      | 1 | uint8   | lightness                                        | x / 127.5 - 1             |
| labels    | 1 | uint8   | class ids                                        | ids (one-hot in the step) |
| instances | 1 | uint16  | instance ids                                     | ids (edges in the step)   |
| grey16    | 1 | uint16  | lightness                                        | x / 32767.5 - 1           |
| lab_l     | 1 | uint8   | L of CIE Lab (D65) * 2.55                        | x / 127.5 - 1 = L/50 - 1  |
| lab_ab    | 2 | uint8   | a and b of CIE Lab + 128                         | (x - 128) / 110           |
| channels  | n | float32 | integers over their whole range, floats as given | in [-1, 1] already        |

Pure: Pillow, numpy and isal only. Pillow lets go of the GIL while it decodes and resizes, so threads help.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from isal import isal_zlib
from PIL import Image, ImageOps, UnidentifiedImageError

from stages import png
from stages.base import Kind

Array = npt.NDArray[Any]

Encoding = Literal["raw", "png", "jpeg", "webp"]
"""How an image is kept in a shard. `raw` is the array itself, planar (C, H, W), little-endian."""

Half = Literal["", "left", "right", "top", "bottom"]

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
"""Why an image cannot be used: what reading, decoding and comparing the images of a pair can say."""

MAX_PIXELS = 89_478_485
"""Largest image accepted whatever the config says: Pillow itself warns of a bomb beyond it."""

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
"""Channels of every kind but `channels`, whose number is the config's."""

# Pillow's plugins that decode in process and in bounded memory. EPS would start Ghostscript.
_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
_NPY_MAGIC = b"\x93NUMPY"
_ID_MODES = ("L", "P", "1", "I;16", "I;16L", "I;16B", "I")
_DEEP_MODES = ("I;16", "I;16L", "I;16B", "I")


class ImageRejected(Exception):  # noqa: N818 - a verdict on a row, not an error of ours
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


# -- decoding -----------------------------------------------------------------


def decode(
    data: bytes, kind: Kind, *, max_pixels: int = MAX_PIXELS, channels: int | None = None, min_side: int = 1
) -> Array:
    """The image in `data` as an array (H, W, C) of `kind`, upright, without transparency.

    By content, whatever the file's name says. EXIF orientation is applied, alpha is laid over white, palettes
    and CMYK become RGB (but a palette image read as labels gives its indices). The size is judged from the
    header, before any pixel is unpacked; PNG checksums are verified. `channels` is what kind `channels` must
    have. Kinds `lab_l` and `lab_ab` are made of an RGB image (`rgb_to_lab`).

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
        raise ImageRejected("too_large", _said(error)) from error
    except Exception as error:
        # Pillow's readers raise OSError, SyntaxError, ValueError, struct.error, IndexError and more on bad
        # bytes: no list of them would be complete, and no object may end a run over millions.
        text = str(error).lower()
        cut = "truncated" in text or isinstance(error, EOFError)
        raise ImageRejected("truncated" if cut else "unreadable", _said(error)) from error
    height, width = array.shape[:2]
    if min(height, width) < min_side:
        raise ImageRejected("too_small", f"{width}x{height}, at least {min_side} pixels a side are asked for")
    return array


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _head(data: bytes) -> str:
    return f"begins with {data[:12]!r}"


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
        if kind in IDS and image.format in ("JPEG", "MPO"):
            raise ImageRejected("wrong_kind", "JPEG is lossy, it cannot hold ids")
        ImageOps.exif_transpose(image, in_place=True)
        return _READERS[kind](image, channels)


def _verify_png(data: bytes) -> None:
    """Chunk checksums of a PNG: Pillow passes over those of the pixel data."""
    view, at = memoryview(data), 8
    while at + 12 <= len(data):
        size = int.from_bytes(view[at : at + 4], "big")
        end = at + 12 + size
        if end > len(data):
            break
        if isal_zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            raise ImageRejected("unreadable", "checksum of a PNG chunk does not match")
        if bytes(view[at + 4 : at + 8]) == b"IEND":
            return
        at = end
    raise ImageRejected("truncated", "PNG without its end")


def _flat(image: Image.Image) -> Image.Image:
    """Without transparency: over white."""
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image


def _deep(image: Image.Image) -> Array:
    """A 16-bit (or wider integer) image as unsigned 16-bit values."""
    values = np.asarray(image)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise ImageRejected("value_range", f"values {values.min()}..{values.max()}, 16 bits hold 0..65535")
    return values.astype("<u2")


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
    return _read_rgb(image, None)  # Lab is taken after resizing, which is done in RGB as in the paper


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
    """A multi-page TIFF, one channel a page."""
    if channels is not None and frames != channels:
        raise ImageRejected("wrong_kind", f"{frames} pages, {channels} channels are configured")
    if frames * image.width * image.height > 4 * limit:
        raise ImageRejected("too_large", f"{frames} pages of {image.width}x{image.height}")
    pages = []
    for index in range(frames):
        image.seek(index)
        if image.mode not in ("L", "F", *_DEEP_MODES):
            raise ImageRejected(
                "wrong_kind", f"page {index} is {image.mode}, one channel a page is asked for"
            )
        pages.append(_deep(image) if image.mode in _DEEP_MODES else np.asarray(image))
        if pages[-1].shape != pages[0].shape or pages[-1].dtype != pages[0].dtype:
            raise ImageRejected("wrong_kind", f"page {index} differs from the first in size or depth")
    return _as_channels(np.stack(pages, axis=2), channels)


def _from_npy(data: bytes, kind: Kind, limit: int, channels: int | None) -> Array:
    """A .npy file, (H, W), (H, W, C) or (C, H, W), never one that needs pickle."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ImageRejected("wrong_kind", f".npy version {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, kept = read(file, max_header_size=10_000)
    if kept.hasobject or kept.kind not in "uif" or kept.itemsize > 8:
        raise ImageRejected("wrong_kind", f".npy of {kept}: integers or floats are asked for")
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
    """An array given where an image file is usual: it must hold the kind's values exactly."""
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
        raise ImageRejected("wrong_kind", f"{array.dtype}: uint8, uint16 or floats in [-1, 1] are asked for")
    half = np.float32(np.iinfo(array.dtype).max / 2)
    return (array.astype("<f4") / half - np.float32(1)).astype("<f4")


# -- geometry -----------------------------------------------------------------


def crop_half(array: Array, half: Half) -> Array:
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


def resize(array: Array, size: tuple[int, int], kind: Kind) -> Array:
    """To `size` (width, height): amounts bicubic and antialiased, ids by the nearest pixel."""
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
    return _settled(np.stack(planes, axis=2), array.dtype)  # bicubic overshoots at edges


def _settled(values: Array, kept: np.dtype[Any]) -> Array:
    """Computed amounts as the type they are kept in: integers rounded and clipped, floats in [-1, 1]."""
    low, high = (-1, 1) if kept.kind == "f" else (0, np.iinfo(kept).max)
    out: Array = np.clip(values if kept.kind == "f" else np.rint(values), low, high).astype(kept)
    return out


def _nearest(old: int, new: int) -> npt.NDArray[np.intp]:
    """Index of the old pixel whose centre is nearest to each new pixel's."""
    return np.minimum(((np.arange(new) + 0.5) * old / new).astype(np.intp), old - 1)


def shrink(array: Array, factor: int, kind: Kind) -> Array:
    """1/`factor` of the size, for phases at lower resolution: amounts averaged over squares, ids nearest."""
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
    return _settled(blocks.mean(axis=(1, 3), dtype=np.float32), array.dtype)


def _reduced(array: Array, factor: int) -> Array:
    """Means over squares, rounded, of a plane (H, W) or colours (H, W, 3) of uint8."""
    return np.asarray(Image.fromarray(np.ascontiguousarray(array)).reduce(factor))


# -- storage ------------------------------------------------------------------


def stored_encoding(kind: Kind, encoding: Encoding) -> Encoding:
    """The encoding a kind is really kept in: what is lossy is for photos only, and PNG cannot hold floats."""
    if kind == "channels":
        return "raw"
    if encoding in ("jpeg", "webp") and kind not in PHOTOS:
        return "png"
    return encoding


def encode(array: Array, encoding: Encoding, *, quality: int = 95) -> bytes:
    """An array (H, W, C) as bytes. JPEG and WebP are lossy (`quality`), the others exact."""
    if encoding == "raw":
        return np.moveaxis(array, 2, 0).tobytes()
    if encoding == "png":
        return png.encode(array)
    file = io.BytesIO()
    image = to_pillow(array)
    if encoding == "jpeg":
        image.save(
            file, "JPEG", quality=quality, subsampling=0
        )  # full colour: label colours keep their edges
    else:
        image.save(file, "WEBP", quality=quality)
    return file.getvalue()


def encode_ids(ids: npt.NDArray[np.uint8], colors: npt.ArrayLike) -> bytes:
    """Class ids (H, W) as a PNG: its pixels are the ids, its palette their colours (classes, 3)."""
    return png.encode(ids[:, :, None], np.asarray(colors, np.uint8).tobytes())


def decode_stored(
    data: bytes | memoryview, *, kind: Kind, encoding: Encoding, channels: int, size: tuple[int, int]
) -> Array:
    """What `encode` kept, as an array (H, W, C) of the kind's type; raw data is viewed, not copied.

    Raises ImageRejected when the bytes are not that image (the caller has verified their checksum before).
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
            grey = encoding == "webp" and channels == 1  # WebP knows no grey
            array = np.asarray(image.convert("L") if grey else image)
    except Exception as error:  # as in `decode`
        raise ImageRejected("unreadable", _said(error)) from error
    array = array[:, :, None] if array.ndim == 2 else array
    if array.shape != (height, width, channels):
        raise ImageRejected(
            "size_mismatch", f"{array.shape} is stored, {(height, width, channels)} was meant"
        )
    return array if array.dtype == kept else array.astype(kept)


def checksum(data: bytes | memoryview) -> int:
    """CRC-32 of stored bytes, taken when an image is made, verified at every use; zlib takes 20 x as long."""
    return isal_zlib.crc32(data)


# -- values -------------------------------------------------------------------


def normalise(array: Array, kind: Kind) -> npt.NDArray[np.float32]:
    """Amounts as the networks see them, float32 in about [-1, 1] (see the table above). Not for ids."""
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
    return _settled(values, dtype(kind))


# sRGB (D65) to XYZ, IEC 61966-2-1; rows are divided by the white point so that white gives (1, 1, 1)
_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_WHITE = np.array([0.95047, 1.0, 1.08883])


def rgb_to_lab(rgb: Array) -> npt.NDArray[np.float32]:
    """uint8 sRGB (..., 3) to CIE Lab under D65: L in [0, 100], a and b within about [-110, 110]."""
    ramp = np.arange(256) / 255
    linear = np.where(ramp <= 0.04045, ramp / 12.92, ((ramp + 0.055) / 1.055) ** 2.4).astype(np.float32)
    xyz = linear[rgb] @ (_XYZ / _WHITE[:, None]).T.astype(np.float32)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1).astype(np.float32)


def lab_to_rgb(lab: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """CIE Lab (..., 3) to uint8 sRGB; colours outside sRGB are clipped."""
    y = (lab[..., 0].astype(np.float64) + 16) / 116
    f = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], axis=-1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * _WHITE
    linear = np.clip(xyz @ np.linalg.inv(_XYZ).T, 0, 1)
    srgb = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return _settled(srgb * 255, np.dtype("u1"))


def lab_channels(rgb: Array, kind: Kind) -> Array:
    """The stored form of kind `lab_l` (H, W, 1) or `lab_ab` (H, W, 2) of an RGB image."""
    lab = rgb_to_lab(rgb)
    if kind == "lab_l":
        return _settled(lab[..., :1] * 2.55, np.dtype("u1"))
    return _settled(lab[..., 1:] + 128, np.dtype("u1"))


# -- pictures -----------------------------------------------------------------

# The first ids in the colours most people know from Cityscapes' label ids.
_CITYSCAPES = (
    (0, 0, 0), (0, 0, 0), (0, 0, 0), (0, 0, 0), (0, 0, 0), (111, 74, 0), (81, 0, 81), (128, 64, 128),
    (244, 35, 232), (250, 170, 160), (230, 150, 140), (70, 70, 70), (102, 102, 156), (190, 153, 153),
    (180, 165, 180), (150, 100, 100), (150, 120, 90), (153, 153, 153), (153, 153, 153), (250, 170, 30),
    (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142),
    (0, 0, 70), (0, 60, 100), (0, 0, 90), (0, 0, 110), (0, 80, 100), (0, 0, 230), (119, 11, 32), (0, 0, 142),
)  # fmt: skip


def nearest_class(image: Array, colors: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """Class ids (H, W) of a label picture (H, W, 3): of `colors` (classes, 3) the nearest in RGB."""
    flat = image.reshape(-1, 3).astype(np.int32)
    best = np.zeros(len(flat), np.uint8)
    least = np.full(len(flat), np.iinfo(np.int32).max, np.int32)
    # By class: memory of one distance, not of all.
    for index, colour in enumerate(np.asarray(colors, np.int32)):
        distance = ((flat - colour) ** 2).sum(1)
        closer = distance < least
        best[closer], least[closer] = index, distance[closer]
    return best.reshape(image.shape[:2])


def palette(classes: int) -> npt.NDArray[np.uint8]:
    """Colours (classes, 3) for label pictures: Cityscapes' own for its 34 or 35 ids, else distinct ones."""
    if classes in (34, 35):
        return np.array(_CITYSCAPES[:classes], np.uint8)
    return distinct_colours(np.arange(classes))


def distinct_colours(ids: Array) -> npt.NDArray[np.uint8]:
    """A colour (..., 3) for any id: 0 is black, neighbours differ in hue by the golden angle."""
    ids = ids.astype(np.int64)
    hue = (ids * 0.6180339887498949) % 1.0 * 6
    value = 0.95 - 0.3 * ((ids // 13) % 3) / 2
    saturation = 0.85 - 0.35 * ((ids // 5) % 3) / 2
    wheel = np.stack(
        [
            np.clip(np.abs(hue - 3) - 1, 0, 1),
            np.clip(2 - np.abs(hue - 2), 0, 1),
            np.clip(2 - np.abs(hue - 4), 0, 1),
        ],
        axis=-1,
    )
    colours = value[..., None] * (1 - saturation[..., None] * (1 - wheel))
    return np.where(ids[..., None] == 0, 0, np.rint(colours * 255)).astype(np.uint8)


def colorize(ids: Array, classes: int | None = None) -> npt.NDArray[np.uint8]:
    """Label or instance ids (H, W[, 1]) as a picture (H, W, 3)."""
    flat = ids[:, :, 0] if ids.ndim == 3 else ids
    if classes is None:
        return distinct_colours(flat)
    return palette(max(classes, int(flat.max(initial=0)) + 1))[flat]


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
            return _settled((first + 1) * 127.5, np.dtype("u1"))


def to_pillow(array: Array) -> Image.Image:
    """An array (H, W, C) as a Pillow image: 1, 2 (as grey and alpha), 3 channels of uint8, or uint16 grey."""
    if array.shape[2] == 1:
        return Image.fromarray(np.ascontiguousarray(array[:, :, 0]))
    return Image.fromarray(np.ascontiguousarray(array))


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
