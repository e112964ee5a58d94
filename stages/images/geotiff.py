"""Large TIFFs with a place on Earth: read and written row by row, with their transform and coordinate system.

in:  the path of a TIFF; bands of rows of a picture
out: `TiffRows`, which reads rows (H, W, C) of a kind; a TIFF of tiles, of as many bands as it takes

The tags that say where the picture is on Earth are copied as they are. Nothing here understands them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from tifffile import TiffFile, TiffPage, TiffWriter

from stages.images import tiff
from stages.images.kinds import Array, ImageRejected
from stages.images.raw import of_kind
from stages.models.architecture import Picture

PLACE_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)
"""Pixel scale, tie points, transformation; GeoKeys and their numbers and texts (GeoTIFF 1.1)."""

TILE = 256
MOST_PIXELS = 1 << 25  # of a tile or strip that is read
BIG = 4_000_000_000  # bytes of pixels from which a TIFF needs 64-bit places

Tags = Sequence[tuple[int, int, int, Any, bool]]
"""Code, type, count and value of tags, as tifffile writes them."""


def place_tags(data: bytes) -> Tags:
    """Where the picture in a file is on Earth; empty if the file is no TIFF, or is turned when it is read."""
    if not data.startswith(tiff.MAGIC):
        return ()
    with TiffFile(io.BytesIO(data)) as file:
        return _place_tags(file.pages.first)


def _place_tags(page: Any) -> Tags:
    if page.tags.valueof(tiff.ORIENTATION, 1) != 1:
        return ()
    tags = [page.tags[code] for code in PLACE_TAGS if code in page.tags]
    return [(tag.code, int(tag.dtype), tag.count, _value(page, tag), True) for tag in tags]


def _value(page: Any, tag: Any) -> Any:
    """Text as its bytes: names of coordinate systems need not be ASCII, and keys hold offsets in them."""
    if not isinstance(tag.value, str):
        return tag.value
    page.parent.filehandle.seek(tag.valueoffset)
    return page.parent.filehandle.read(tag.count)


def open_rows(path: Path, how: Picture) -> TiffRows | None:
    """The rows of a TIFF; None for a file that is damaged, or can only be read whole."""
    file = None
    try:
        file = TiffFile(path)
        return TiffRows(file, path.stat().st_size, how)
    except Exception:  # as `decode` has it: on bad bytes readers raise anything, and `decode` then says why
        if file is not None:
            file.close()
        return None


class TiffRows:
    """The picture of a TIFF, read row by row. For one thread at a time.

    Raises ImageRejected for what is damaged, or can only be read whole: several pages, a picture that is
    turned, another compression, a colour profile, values that are scaled by all others.
    """

    def __init__(self, file: TiffFile, size: int, how: Picture) -> None:
        # colours that stand for classes are read as they are; the model's rules make classes of them
        self.how = how if how.palette is None else Picture(kind="rgb")
        self.file = file
        pages = tiff.pages(file)
        self.page: TiffPage = pages[0]
        page = self.page
        turned = page.tags.valueof(tiff.ORIENTATION, 1) != 1
        if len(pages) > 1 or how.range == "percentile" or turned or page.iccprofile:
            raise ImageRejected("unreadable", "it can only be read whole")
        tiff.check_layout(page)
        tiff.check_places(page, size)
        self.tags = _place_tags(page)
        self.wide = page.tilewidth if page.is_tiled else page.imagewidth
        self.high = page.tilelength if page.is_tiled else min(page.rowsperstrip, page.imagelength)
        if self.wide * self.high > MOST_PIXELS:
            raise ImageRejected("too_large", f"a tile of {self.wide}x{self.high}")
        self._lines: dict[int, Array] = {}
        self.shape = (page.imagelength, page.imagewidth, self._rows(0, 1).shape[2])

    def read(self, start: int, stop: int) -> Array:
        """Rows `start` to `stop` (H, W, C). Raises ImageRejected, and nothing else."""
        try:
            return self._rows(start, stop)
        except ImageRejected:
            raise
        except Exception as error:
            raise ImageRejected("unreadable", f"{type(error).__name__}: {error}") from error

    def _rows(self, start: int, stop: int) -> Array:
        high = self.high
        first = start // high
        wanted = range(first, math.ceil(stop / high))
        known = self._lines
        self._lines = {i: known[i] if i in known else self._line(i) for i in wanted}
        values = np.concatenate([self._lines[i] for i in wanted])
        values = values[start - first * high : stop - first * high]
        return of_kind(tiff.raw(self.page, values, self.how.kind), self.how)

    def _line(self, index: int) -> Array:
        """The tiles or the strip with one number from the top, as rows (H, W, C)."""
        page, wide, high = self.page, self.wide, self.high
        across, down = math.ceil(page.imagewidth / wide), math.ceil(page.imagelength / high)
        planes = len(page.dataoffsets) // (across * down)
        height = min(high, page.imagelength - index * high)
        line = np.zeros((height, page.imagewidth, page.samplesperpixel), page.dtype)
        for plane in range(planes):
            for column in range(across):
                number = (plane * down + index) * across + column
                self.file.filehandle.seek(page.dataoffsets[number])
                data = self.file.filehandle.read(page.databytecounts[number])
                values, _, _ = page.decode(data, number)
                if values is not None:
                    part = values[0, :height, : page.imagewidth - column * wide]
                    samples = slice(plane, plane + 1) if planes > 1 else slice(None)
                    line[:, column * wide : column * wide + part.shape[1], samples] = part
        return line


def write(
    target: IO[bytes], bands: Iterable[Array], shape: tuple[int, ...], stored: np.dtype[Any], tags: Tags
) -> None:
    """Write bands of rows, from the top, as a TIFF of deflated tiles. shape: (H, W, C) of the picture."""
    with TiffWriter(target, bigtiff=math.prod(shape) * stored.itemsize > BIG) as file:
        file.write(
            _tiles(bands, shape),
            shape=shape if shape[2] > 1 else shape[:2],
            dtype=stored,
            tile=(TILE, TILE),
            photometric="rgb" if shape[2] == 3 else "minisblack",
            compression="adobe_deflate",
            predictor=True,
            metadata=None,
            extratags=tags,
        )


def encode(array: Array, tags: Tags) -> bytes:
    """An array (H, W, C) as a TIFF file."""
    file = io.BytesIO()
    write(file, [array], array.shape, array.dtype, tags)
    return file.getvalue()


def _tiles(bands: Iterable[Array], shape: tuple[int, ...]) -> Iterator[Array]:
    """The tiles of a picture, row by row; those at its right and lower border are smaller."""
    rows, done = np.zeros((0, *shape[1:])), 0
    for band in bands:
        rows = np.concatenate([rows, band]) if len(rows) else band
        while len(rows) >= TILE or done + len(rows) == shape[0] > done:
            line, rows = rows[:TILE], rows[TILE:]
            done += len(line)
            for x in range(0, shape[1], TILE):
                tile = line[:, x : x + TILE]
                yield np.ascontiguousarray(tile if shape[2] > 1 else tile[:, :, 0])
