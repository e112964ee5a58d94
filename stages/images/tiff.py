"""TIFF as satellites and laboratories write it: tiled, planar, many bands, deep, floating-point, BigTIFF.

in:  the bytes of a TIFF file that nobody has checked
out: its values and what they mean; or None for what Pillow reads as well: up to 8 bits of colours

Reduced pages (overviews) and masks are left out. Several whole pages are the channels of kind `channels`.
Sizes, places and compressions are checked before a byte is decoded, so memory and time are bounded.
"""

from __future__ import annotations

import io
import logging
import math
from contextlib import suppress

import numpy as np
from tifffile import COMPRESSION, EXTRASAMPLE, PHOTOMETRIC, TiffFile, TiffPage

from stages.base import Kind
from stages.images.geometry import upright
from stages.images.kinds import IDS, Array, ImageRejected
from stages.images.raw import Alpha, RawImage

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # Pillow does not read the last, a BigTIFF

MAX_PAGES = 1024  # 512 channels and their overviews
ORIENTATION, NODATA = 274, 42113

# Those whose output is bounded: no more is decompressed than a tile or strip holds.
_COMPRESSIONS = frozenset(
    {
        COMPRESSION.NONE,
        COMPRESSION.LZW,
        COMPRESSION.DEFLATE,
        COMPRESSION.ADOBE_DEFLATE,
        COMPRESSION.PACKBITS,
        COMPRESSION.LZMA,
        COMPRESSION.ZSTD,
    }
)
_LIGHT = (PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.RGB)

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it logs what is rejected here with its reason


def read(data: bytes, kind: Kind, limit: int) -> RawImage | None:
    """The pixels of a TIFF; None if Pillow is to read it. Raises ImageRejected, or what tifffile raises.

    limit   the most pixels
    """
    with TiffFile(io.BytesIO(data)) as file:
        found = pages(file)
        if kind != "channels" and len(found) > 1:
            raise ImageRejected("animated", f"{len(found)} pages; only kind channels takes more than one")
        first = found[0]
        for page in found:
            if page.shape != first.shape or page.dtype != first.dtype:
                raise ImageRejected("wrong_kind", "its pages differ in size or depth")
        _check_size(first, len(found), limit)
        if len(found) == 1 and _for_pillow(first, kind) and not data.startswith(MAGIC[3]):
            return None
        check_layout(first)
        for page in found:
            check_places(page, len(data))
        return raw(first, np.concatenate([_array(page) for page in found], axis=2), kind)


def pages(file: TiffFile) -> list[TiffPage]:
    """The whole pages. Raises ImageRejected if the chain of pages is endless."""
    found: list[TiffPage] = []
    places: set[int] = set()
    for index in range(MAX_PAGES + 1):
        try:
            page = file.pages[index]
        except IndexError:
            break
        if index == MAX_PAGES or page.offset in places:
            raise ImageRejected("unreadable", f"its pages form a loop, or are more than {MAX_PAGES}")
        places.add(page.offset)
        assert isinstance(page, TiffPage)
        if not found or not (page.is_reduced or page.is_mask):
            found.append(page)
    return found


def _for_pillow(page: TiffPage, kind: Kind) -> bool:
    plain = page.bitspersample in (1, 2, 4, 8) and page.sampleformat == 1 and page.imagedepth == 1
    if not plain or page.samplesperpixel > 4:
        return False
    if page.compression not in _COMPRESSIONS:
        return True
    if kind in IDS:
        return False
    if kind == "channels":
        return page.photometric in (PHOTOMETRIC.PALETTE, PHOTOMETRIC.YCBCR)
    bands = page.photometric in _LIGHT and page.samplesperpixel > (3 if page.photometric == 2 else 1)
    return NODATA not in page.tags and (not bands or _alpha(page) == "straight")


def _layout(page: TiffPage) -> str:
    def name(value: object) -> object:
        return getattr(value, "name", value)

    return (
        f"{page.samplesperpixel} x {page.bitspersample} bits, photometric {name(page.photometric)}, "
        f"compression {name(page.compression)}"
    )


def _check_size(page: TiffPage, count: int, limit: int) -> None:
    """Raise ImageRejected for so many pages that are too large, or have too large a tile."""
    width, height, count = page.imagewidth, page.imagelength, count * page.samplesperpixel
    if width * height > limit or width * height * count > 4 * limit:
        raise ImageRejected("too_large", f"{width}x{height} with {count} bands, the limit is {limit} pixels")
    tile = page.tilewidth * page.tilelength if page.is_tiled else width * min(page.rowsperstrip, height)
    if tile * page.samplesperpixel > 4 * limit:
        raise ImageRejected("too_large", f"a tile of {tile} pixels, the limit is {limit}")


def check_layout(page: TiffPage) -> None:
    """Raise ImageRejected for a page of a layout that is not read."""
    known = page.dtype is not None and page.dtype.kind in "buif" and page.dtype.itemsize <= 8
    if not known or page.imagedepth != 1 or page.compression not in _COMPRESSIONS:
        raise ImageRejected("unreadable", f"TIFF of {_layout(page)} is not read")


def check_places(page: TiffPage, size: int) -> None:
    """Raise ImageRejected if a strip or tile is missing or ends behind the file."""
    places = list(zip(page.dataoffsets, page.databytecounts, strict=False))
    segments = math.prod(page.chunked)
    if len(places) != segments or not places:
        raise ImageRejected("truncated", f"{len(places)} strips or tiles of {segments}")
    end = max(offset + count for offset, count in places)
    if end > size:
        raise ImageRejected("truncated", f"its pixels end at byte {end}, the file has {size}")


def _array(page: TiffPage) -> Array:
    """A page as (H, W, C), upright."""
    array: Array = page.asarray(maxworkers=1, squeeze=False)  # (planes, depth, H, W, samples)
    array = np.moveaxis(array[:, 0], 0, 2).reshape(*array.shape[2:4], -1)
    return upright(array, page.tags.valueof(ORIENTATION, 1))


def _alpha(page: TiffPage) -> Alpha:
    """Whether the last sample is opacity."""
    names: dict[int, Alpha] = {EXTRASAMPLE.ASSOCALPHA: "premultiplied", EXTRASAMPLE.UNASSALPHA: "straight"}
    return names.get(page.extrasamples[-1], "none") if page.extrasamples else "none"


def raw(page: TiffPage, values: Array, kind: Kind) -> RawImage:
    """The values of a page with their meaning; light is large."""
    if kind in IDS:
        return RawImage(values)
    missing = ~np.isfinite(values) if values.dtype.kind == "f" else np.zeros(values.shape, np.bool_)
    with suppress(ValueError):
        empty = values == float(page.tags.valueof(NODATA, "nan"))
        colours = page.photometric == PHOTOMETRIC.RGB and kind != "channels"
        # as GDAL has it: a pixel has a colour if one of its channels has a value
        missing |= empty[:, :, :3].all(axis=2, keepdims=True) if colours else empty
    white = None
    if values.dtype.kind in "bu" and values.dtype.itemsize <= 2:
        white = 2**page.bitspersample - 1
        values = values.astype(np.uint8) if values.dtype.kind == "b" else values
        if page.photometric == PHOTOMETRIC.MINISWHITE:
            values = values.dtype.type(white) - values
    alpha = _alpha(page)
    if kind == "channels":
        alpha = "none"
    elif page.photometric not in _LIGHT:
        raise ImageRejected("unreadable", f"TIFF of {_layout(page)} is not read")
    elif page.photometric == PHOTOMETRIC.RGB:  # bands after red, green and blue have no colour
        kept = [0, 1, 2] if alpha == "none" else [0, 1, 2, values.shape[2] - 1]
        values, missing = values[:, :, kept], missing[:, :, kept]
    return RawImage(values, white, alpha, missing if missing.any() else None, page.iccprofile)
