"""The output folder of batch inference: the path of a key's image, and the table that says what is finished.

in:  rows of `ROWS`, one per generated image or rejected source
out: files below the output folder

    infer.json                   what was generated from what: model, config, input, number of units
    model/model.json             the model's description
    images/<key>.<suffix>        the image of a key; further samples in samples/<n>/<key>.<suffix>
    table/part-<unit>.parquet    rows of one work unit, written after all its images
    finished/<n>.json            the counts of a thousand finished units (`storage.finished`)

A work unit whose table part exists is finished.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pyarrow as pa

from stages import storage
from stages.base import Format
from stages.errors import UserError
from stages.storage.finished import GROUP, Finished

SUFFIX: dict[Format, str] = {"png": ".png", "jpeg": ".jpg", "webp": ".webp", "tiff": ".tif"}

MANIFEST = "infer.json"
IMAGES, SAMPLES, TABLE, FINISHED = "images", "samples", "table", "finished"
FOLDERS = (FINISHED, TABLE, IMAGES, SAMPLES, "plan")

MAX_SEGMENT = 180
"""Longest name of a file or folder made from a key, in bytes; most file systems take 255."""

UNSAFE = '%\\:*?"<>|'
"""What Windows takes in no name, and the sign of a code."""

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

    A key's segments become folders, with the names they came with. Percent-coded is only what some store or
    system does not take or would hide: characters that print nothing, those of `UNSAFE`, dots and spaces at a
    segment's ends, and the dot of a folder called as an image. A segment longer than `MAX_SEGMENT` keeps its
    beginning and ends in a hash. Two keys never get one path, nor one the path of another's folder.
    """
    segments = [_segment(part) for part in key.split("/")]
    segments[:-1] = [re.sub(rf"\.(?={suffix[1:]}$)", "%2E", one) for one in segments[:-1]]
    top = IMAGES if sample == 0 else f"{SAMPLES}/{sample}"
    return f"{top}/{'/'.join(segments)}{suffix}"


def _segment(text: str) -> str:
    last = len(text) - 1
    encoded = "".join(
        _coded(char)
        if char in UNSAFE or not char.isprintable() or (char in ". " and place in (0, last))
        else char
        for place, char in enumerate(text)
    )
    if not encoded:
        return "%"  # an empty segment; no encoding of anything else is a bare percent sign
    if len(encoded.encode()) > MAX_SEGMENT:
        digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=12).hexdigest()
        head = encoded.encode()[: MAX_SEGMENT - 30].decode(errors="ignore")
        encoded = f"{head}%{digest}"  # "%" and 24 digits: no encoding reads so
    return encoded


def _coded(char: str) -> str:
    return "".join(f"%{byte:02X}" for byte in char.encode(errors="surrogatepass"))


# -- work units ---------------------------------------------------------------


def part_uri(output: str, unit: int) -> str:
    """The table part of a work unit."""
    return storage.join(output, TABLE, f"part-{unit:05d}.parquet")


def finished_units(output: str) -> set[int]:
    """The work units whose table part exists."""
    names = storage.list_names(storage.join(output, TABLE))
    return {int(part[1]) for name in names if (part := re.fullmatch(r"part-(\d+)\.parquet", name))}


class UnitCounts:
    """The images and errors (`error_<reason>`) of the finished work units of a run."""

    def __init__(self, output: str, units: int) -> None:
        self.finished = Finished(storage.join(output, FINISHED), range(units))
        marked = finished_units(output)
        self.total = sum(map(Counter, self.finished.read(marked)), Counter[str]())
        self.of_group: defaultdict[int, Counter[str]] = defaultdict(Counter)
        there = sorted(marked & self.finished.left)
        with ThreadPoolExecutor(32) as threads:
            for unit, counts in zip(there, threads.map(partial(part_counts, output), there), strict=True):
                self.add(unit, counts)

    def add(self, unit: int, counts: Counter[str]) -> None:
        """Add a finished unit; the last one of a thousand writes their sum."""
        self.total += counts
        self.of_group[unit // GROUP] += counts
        if self.finished.finish(unit):
            self.finished.write(unit, self.of_group.pop(unit // GROUP))


def part_counts(output: str, unit: int) -> Counter[str]:
    """The counts of a finished unit, from its table part."""
    errors = storage.read_parquet(part_uri(output, unit), columns=["error"])["error"]
    return error_counts(errors.drop_null().to_pylist()) + Counter(images=errors.null_count)


def error_counts(errors: Iterable[str]) -> Counter[str]:
    """The number of errors by reason, as `error_<reason>`."""
    return Counter(f"error_{error.partition(':')[0]}" for error in errors)


def failures(output: str, limit: int) -> list[tuple[str, str]]:
    """Keys and reasons of the first sources that gave no image."""
    rows: list[tuple[str, str]] = []
    for part in parts(output):
        if len(rows) < limit:
            table = storage.read_parquet(part, columns=["key", "error"]).drop_null()
            rows += zip(table["key"].to_pylist(), table["error"].to_pylist(), strict=True)
    return rows[:limit]


def parts(output: str) -> Iterator[str]:
    """URIs of the table's parts, in unit order."""
    for unit in sorted(finished_units(output)):
        yield part_uri(output, unit)


# -- a run's folder -----------------------------------------------------------


def begin(output: str, identity: Mapping[str, Any], extent: Mapping[str, Any]) -> None:
    """Write `infer.json`, or check that the folder holds work of this very run. Raises UserError if not."""
    uri = storage.join(output, MANIFEST)
    if not storage.exists(uri):
        storage.write_json(uri, {**identity, **extent})
        return
    manifest = storage.read_json(uri)
    for name, value in identity.items():
        if manifest.get(name) != value:
            raise UserError(
                f"{output}: holds images of another {name}; take another output folder, or overwrite"
            )


def clear(output: str) -> None:
    """Remove an earlier run's work; the table first, since without it nothing counts as finished."""
    if not any(storage.exists(storage.join(output, name)) for name in (MANIFEST, TABLE)):
        return  # not written by this stage
    for name in (*FOLDERS, MANIFEST):
        storage.remove(storage.join(output, name))
