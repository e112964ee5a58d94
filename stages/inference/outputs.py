"""What batch inference leaves behind: where a key's image lies, and the table that says what is finished.

    infer.json                   what was generated from what: model, config, input, number of units
    model/model.json             the model's description
    images/<key>.<suffix>        the image of a key; further samples in samples/<n>/<key>.<suffix>
    table/part-<unit>.parquet    rows of one unit of work, written when all its images are

A unit whose table part exists is finished; nothing else says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from urllib.parse import quote

import pyarrow as pa

from stages import storage
from stages.base import Format

SUFFIX: dict[Format, str] = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}

MANIFEST = "infer.json"
IMAGES, SAMPLES, TABLE = "images", "samples", "table"

MAX_SEGMENT = 180
"""Longest name of a file or folder made from a key, in characters; most file systems take 255 bytes."""

ROWS = pa.schema(
    {
        "key": pa.string(),
        "sample": pa.int32(),
        "output": pa.string(),  # below the folder, "" where there is none
        "source": pa.string(),  # URI of the input
        "width": pa.int32(),
        "height": pa.int32(),
        "size": pa.int64(),  # bytes of the output
        "crc": pa.uint32(),  # zlib.crc32 of them
        "seconds": pa.float64(),  # the model's time for this image's share of its batch
        "seed": pa.int64(),  # of the noise, null where there is none
        "model": pa.string(),  # fingerprint
        "error": pa.string(),  # why there is no output, null where there is one
    }
)


def output_name(key: str, suffix: str, sample: int = 0) -> str:
    """The path of a key's image below the output folder.

    A key's segments become folders. In each, all but letters, digits, space and `-_.,+=@~` is percent-coded,
    and so are dots and spaces at its ends: no segment is hidden or `..`. One longer than `MAX_SEGMENT` keeps
    its beginning and ends in a hash. Two keys never get one path.
    """
    segments = [_segment(part) for part in key.split("/")]
    top = IMAGES if sample == 0 else f"{SAMPLES}/{sample}"
    return f"{top}/{'/'.join(segments)}{suffix}"


def _segment(text: str) -> str:
    encoded = quote(text.encode(errors="surrogatepass"), safe=" ,+=@~")
    if not encoded:
        return "%"  # an empty segment; no encoding of anything else is a bare percent sign
    for char, code in ((".", "%2E"), (" ", "%20")):
        if encoded.startswith(char):
            encoded = code + encoded[1:]
        if encoded.endswith(char):  # Windows drops them
            encoded = encoded[:-1] + code
    if len(encoded) > MAX_SEGMENT:
        digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=12).hexdigest()
        encoded = f"{encoded[: MAX_SEGMENT - 30]}%{digest}"  # "%" and 24 digits: no encoding reads so
    return encoded


def part_uri(output: str, unit: int) -> str:
    """The table part of a unit."""
    return storage.join(output, TABLE, f"part-{unit:05d}.parquet")


def finished_units(output: str) -> set[int]:
    """Units whose table part is there."""
    return {
        int(name[5:-8])
        for name in storage.list_names(storage.join(output, TABLE))
        if name.startswith("part-") and name.endswith(".parquet") and name[5:-8].isdigit()
    }


def parts(output: str) -> Iterator[str]:
    """URIs of the table's parts, in unit order."""
    for unit in sorted(finished_units(output)):
        yield part_uri(output, unit)
