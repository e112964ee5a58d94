"""The data set card: statistics of all images, near-duplicates between splits, sample pictures.

in:  an image (H, W, C) of the shard stage -> `measures`, which `Statistics` adds up by role
out: card.json, card.md, samples.png in the shards folder

Sums are integers (floats only for kind `channels`), so a card does not depend on the order of adding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

import numpy as np

from stages import storage
from stages.base import Kind, Role, Split
from stages.images import encode, kinds, pictures
from stages.images.kinds import Array
from stages.shards.dataset import DatasetSpec, read_split

SAMPLES = 4
SMALL = 0.25
"""The share of its range that a role's values use at most when the card remarks on it."""
STRETCHED = 1.5
"""How much one side of an image is stretched against the other when the card remarks on it."""


# -- one image ----------------------------------------------------------------


def measures(array: Array, kind: Kind) -> dict[str, Any]:
    """Statistics of an image (H, W, C).

    ids:     {ids: the ids in it, counts: pixels of each}
    amounts: {mean, std: per channel, in stored values; sum, square}
    both:    {pixels; low, high: the least and the largest value}
    """
    pixels = array.shape[0] * array.shape[1]
    both = {"pixels": pixels, "low": float(array.min()), "high": float(array.max())}
    if kind in kinds.IDS:
        counts = np.bincount(array.ravel())
        present = np.flatnonzero(counts)
        return both | {"ids": present.tolist(), "counts": counts[present].tolist()}
    if array.dtype == np.uint8:
        levels = np.arange(256, dtype=np.int64)
        if array.shape[2] in (1, 3):  # Pillow's histogram is several times faster than numpy's sums
            counts = np.array(encode.to_pillow(array).histogram(), np.int64).reshape(-1, 256)
        else:
            counts = np.stack([np.bincount(c.ravel(), minlength=256) for c in np.moveaxis(array, 2, 0)])
        total, square = counts @ levels, counts @ levels**2
    else:
        wide = array.astype(np.int64 if array.dtype.kind == "u" else np.float64)
        total, square = wide.sum(axis=(0, 1)), (wide**2).sum(axis=(0, 1))
    mean = total / pixels
    spread = np.sqrt(np.maximum(square / pixels - mean**2, 0))
    amounts = {"mean": mean, "std": spread, "sum": total, "square": square}
    return both | {name: value.tolist() for name, value in amounts.items()}


# -- many images --------------------------------------------------------------


@dataclass(slots=True)
class RoleSums:
    """Sums over the images of a role in a split."""

    images: int = 0
    pixels: int = 0
    sum: list[float] = field(default_factory=list)
    square: list[float] = field(default_factory=list)
    id_pixels: dict[str, int] = field(default_factory=dict)
    id_images: dict[str, int] = field(default_factory=dict)
    smallest: list[int] = field(default_factory=list)
    largest: list[int] = field(default_factory=list)
    low: float = math.inf
    high: float = -math.inf
    missing_images: int = 0
    missing_pixels: int = 0

    def merge(self, other: Mapping[str, Any]) -> None:
        """Add other sums, as `asdict` returns them."""
        self.images += other["images"]
        self.pixels += other["pixels"]
        self.sum = _added(self.sum, other["sum"])
        self.square = _added(self.square, other["square"])
        self.low, self.high = min(self.low, other["low"]), max(self.high, other["high"])
        self.missing_images += other["missing_images"]
        self.missing_pixels += other["missing_pixels"]
        for counts, added in ((self.id_pixels, other["id_pixels"]), (self.id_images, other["id_images"])):
            for name, count in added.items():
                counts[name] = counts.get(name, 0) + count
        self.smallest = min(filter(None, (self.smallest, other["smallest"])), default=[], key=_area)
        self.largest = max(filter(None, (self.largest, other["largest"])), default=[], key=_area)

    def description(self, kind: Kind) -> dict[str, Any]:
        """The card's entry: original sizes, and mean and standard deviation or the share of each id."""
        entry: dict[str, Any] = {"images": self.images, "smallest": self.smallest, "largest": self.largest}
        if kind == "instances":
            return entry | {"distinct_ids": len(self.id_images)}
        if kind == "labels":
            order = sorted(self.id_pixels, key=int)
            return entry | {
                "classes_present": [int(name) for name in order],
                "frequencies": {name: self.id_pixels[name] / self.pixels for name in order},
                "images_with": {name: self.id_images[name] for name in order},
            }
        mean = [total / max(1, self.pixels) for total in self.sum]
        spread = [
            max(0.0, square / max(1, self.pixels) - m * m) ** 0.5
            for square, m in zip(self.square, mean, strict=True)
        ]
        return entry | {"mean": mean, "std": spread, "low": self.low, "high": self.high}

    def remarks(self, role: str, kind: Kind) -> list[str]:
        """What a person should look at: values that span little of their range, pixels without a value."""
        remarks = []
        low, high = (-1, 1) if kind == "channels" else (0, np.iinfo(kinds.dtype(kind)).max)
        if kind not in kinds.IDS and kind != "lab_ab" and 0 <= self.high - self.low <= SMALL * (high - low):
            remarks.append(
                f"{role}: values {self.low:g} to {self.high:g} of {low} to {high}, so images have little "
                "contrast; shard.range says which values of the files are black and white"
            )
        if self.missing_pixels:
            remarks.append(
                f"{role}: {self.missing_pixels:,} pixels of {self.missing_images:,} images have no value "
                "(NaN, nodata); they are read as black"
            )
        return remarks


def _area(size: list[int]) -> tuple[int, list[int]]:
    return size[0] * size[1], size


def _added(one: list[float], other: list[float]) -> list[float]:
    return [a + b for a, b in zip(one, other, strict=True)] if one and other else one or other


@dataclass(slots=True)
class Statistics:
    """Sums per role over the pairs of a split."""

    roles: dict[Role, RoleSums] = field(default_factory=dict)

    def add(self, role: Role, image: Mapping[str, Any], original: tuple[int, int]) -> None:
        """Add the `measures` of one image, and its pixels without a value (`missing`)."""
        self.roles.setdefault(role, RoleSums()).merge(
            {
                "images": 1,
                "pixels": image["pixels"],
                "sum": image.get("sum", []),
                "square": image.get("square", []),
                "id_pixels": {
                    str(i): n for i, n in zip(image.get("ids", ()), image.get("counts", ()), strict=True)
                },
                "id_images": {str(i): 1 for i in image.get("ids", ())},
                "smallest": list(original),
                "largest": list(original),
                "low": image["low"],
                "high": image["high"],
                "missing_images": int(image.get("missing", 0) > 0),
                "missing_pixels": image.get("missing", 0),
            }
        )

    def merge(self, other: Mapping[Role, Mapping[str, Any]]) -> None:
        """Add another partition's sums, from `to_json`."""
        for role, sums in other.items():
            self.roles.setdefault(role, RoleSums()).merge(sums)

    def to_json(self) -> dict[Role, dict[str, Any]]:
        """The sums as plain values, for a marker."""
        return {role: asdict(sums) for role, sums in sorted(self.roles.items())}


def remarks(spec: DatasetSpec, statistics: Mapping[Split, Statistics], *, keep_shape: bool) -> list[str]:
    """What a person should look at, over all splits.

    keep_shape   whether images that are stretched should not be
    """
    total = Statistics()
    for split in statistics.values():
        total.merge(split.to_json())
    roles = sorted(total.roles.items())
    texts = [text for role, sums in roles for text in sums.remarks(role, spec.roles[role].kind)]
    sizes = {role: sums.largest for role, sums in roles if _stretch(sums.largest, spec.size)}
    if keep_shape and sizes:
        role, (width, height) = next(iter(sizes.items()))
        texts.append(
            f"{role}: images (of `role: pair` each half) of {width}x{height} are stretched to "
            f"{spec.size[0]}x{spec.size[1]}; shard.fit: crop keeps their shape, stretch says that it is meant"
        )
    return texts


def _stretch(original: Sequence[int], stored: tuple[int, int]) -> bool:
    ratio = original[0] * stored[1] / (original[1] * stored[0])
    return max(ratio, 1 / ratio) >= STRETCHED


# -- the card -----------------------------------------------------------------


def write(
    folder: str,
    spec: DatasetSpec,
    statistics: Mapping[Split, Statistics],
    rejects: Mapping[str, int],
    leaks: Mapping[str, Any],
    notes: Sequence[str],
) -> dict[str, bytes]:
    """Write card.json, card.md and samples.png into a shards folder; returns their contents by name.

    leaks   from `suspects.Found.leaks`
    notes   the `remarks`
    """
    content = {
        "size": list(spec.size),
        "roles": {role: stored.model_dump(exclude_none=True) for role, stored in spec.roles.items()},
        "splits": {
            split: {
                "pairs": spec.rows(split),
                "shards": len(spec.splits[split]),
                "roles": {
                    role: sums.description(spec.roles[role].kind)
                    for role, sums in statistics[split].roles.items()
                },
            }
            for split in get_args(Split)
            if split in spec.splits
        },
        "remarks": list(notes),
        "rejects": dict(sorted(rejects.items())),
        "leakage": leaks,
    }
    files = {
        "card.json": json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n",
        "card.md": markdown(content).encode(),
        "samples.png": encode.encode_png(samples(folder, spec)),
    }
    for name, data in files.items():
        storage.write_bytes(storage.join(folder, name), data)
    return files


def samples(folder: str, spec: DatasetSpec) -> Array:
    """A sheet of the first pairs: one row a pair, one column a role."""
    split = next(split for split in get_args(Split) if split in spec.splits)
    blank = np.full((spec.size[1], spec.size[0], 3), 255, np.uint8)
    rows = [
        [sample.picture(spec, role) if role in sample.images else blank for role in spec.roles]
        for sample in read_split(folder, spec, split, limit=SAMPLES)
    ]
    return pictures.sheet(rows)


def markdown(content: Mapping[str, Any]) -> str:
    """The card as Markdown."""
    width, height = content["size"]
    lines = ["# Data set card", "", f"All images are stored at {width}x{height} pixels.", ""]
    lines += ["| role | kind | encoding | classes |", "|---|---|---|---|"]
    for role, stored in content["roles"].items():
        lines.append(f"| {role} | {stored['kind']} | {stored['encoding']} | {stored.get('classes', '')} |")
    lines += ["", "| split | pairs | shards |", "|---|---|---|"]
    lines += [
        f"| {name} | {split['pairs']:,} | {split['shards']:,} |" for name, split in content["splits"].items()
    ]
    lines += ["", "![samples](samples.png)", ""]
    for name, split in content["splits"].items():
        lines += [f"## {name}", "", "| role | original sizes | values |", "|---|---|---|"]
        for role, sums in split["roles"].items():
            sizes = sorted({"x".join(map(str, sums["smallest"])), "x".join(map(str, sums["largest"]))})
            lines.append(f"| {role} | {' to '.join(sizes)} | {_values(sums)} |")
        lines.append("")
    if content["remarks"]:
        lines += ["## To look at", "", *(f"- {text}" for text in content["remarks"]), ""]
    if content["rejects"]:
        lines += ["## Rejected", "", "| reason | pairs |", "|---|---|"]
        lines += [f"| {reason} | {count:,} |" for reason, count in content["rejects"].items()]
        lines.append("")
    return "\n".join(lines + _leak_lines(content["leakage"])) + "\n"


def _values(sums: Mapping[str, Any]) -> str:
    if "frequencies" in sums:
        common = sorted(sums["frequencies"].items(), key=lambda item: -item[1])[:8]
        shares = ", ".join(f"{name}: {share:.1%}" for name, share in common)
        return f"{len(sums['classes_present'])} classes; most frequent {shares}"
    if "distinct_ids" in sums:
        return f"{sums['distinct_ids']:,} distinct ids"
    return f"mean {_numbers(sums['mean'])}, standard deviation {_numbers(sums['std'])}"


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:.3g}" for value in values)


def _leak_lines(leaks: Mapping[str, Any]) -> list[str]:
    if not leaks["held_out"]:
        return []
    lines = [
        "## Near-duplicates between splits",
        "",
        f"{leaks['found']:,} of {leaks['train']:,} training targets look like one of "
        f"{leaks['held_out']:,} held-out ones. Look at them: they may be duplicates.",
    ]
    if leaks["val"]:
        lines.append(
            f"Of {leaks['val']:,} validation targets {leaks['found_in_val']:,} look like one of test."
        )
    if leaks["examples"]:
        lines += ["", "| key | held-out key | distance |", "|---|---|---|"]
        lines += [f"| {_cell(a)} | {_cell(b)} | {apart:.4f} |" for a, b, apart in leaks["examples"]]
    return lines


def _cell(text: str) -> str:
    """A key as a cell of a Markdown table; keys are text that nobody has checked."""
    plain = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:120])
    return "`" + plain.replace("`", "'").replace("|", "\\|") + "`"
