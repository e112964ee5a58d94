"""What a data set is like: measures of each image, their sums over millions, the card, leaks between splits.

in:  arrays as the shard stage makes them; afterwards the shards' small columns
out: card.json, card.md, samples.png in the shards folder

Sums are kept as integers (floats only for kind `channels`), so a card does not depend on the order of adding.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import ray.data

from stages import storage
from stages.base import Kind, Role, Split
from stages.images import encode, kinds, pictures
from stages.images.kinds import Array
from stages.shards.dataset import DatasetSpec, read_split

SAMPLES = 4
LEAK_DISTANCE = 2
"""Bits of 64 by which the hashes of near-duplicates may differ."""
LEAK_SAMPLE = 20_000
"""Held-out images that every training image is compared with."""
LEAK_EXAMPLES = 20
_PLAIN = 6  # a hash with fewer bits set, or unset, is of a plain image: many are alike by nature


# -- one image ----------------------------------------------------------------


def measures(array: Array, kind: Kind) -> dict[str, Any]:
    """What is kept of an image (H, W, C) beside its bytes.

    ids:     {ids: those present, counts: pixels of each, pixels}
    amounts: {mean, std: per channel, in stored values; hash: perceptual, or None; sum, square, pixels}
    """
    pixels = array.shape[0] * array.shape[1]
    if kind in kinds.IDS:
        counts = np.bincount(array.ravel())
        present = np.flatnonzero(counts)
        return {"ids": present.tolist(), "counts": counts[present].tolist(), "pixels": pixels}
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
    hashed = array.dtype == np.uint8 and array.shape[2] in (1, 3)
    return {
        "mean": mean.tolist(),
        "std": spread.tolist(),
        "hash": pictures.perceptual_hash(array) if hashed else None,
        "sum": total.tolist(),
        "square": square.tolist(),
        "pixels": pixels,
    }


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

    def merge(self, other: Mapping[str, Any]) -> None:
        """Add other sums, as `asdict` gives them."""
        self.images += other["images"]
        self.pixels += other["pixels"]
        self.sum = _added(self.sum, other["sum"])
        self.square = _added(self.square, other["square"])
        for mine, theirs in ((self.id_pixels, other["id_pixels"]), (self.id_images, other["id_images"])):
            for name, count in theirs.items():
                mine[name] = mine.get(name, 0) + count
        self.smallest = min(filter(None, (self.smallest, other["smallest"])), default=[], key=_area)
        self.largest = max(filter(None, (self.largest, other["largest"])), default=[], key=_area)

    def described(self, kind: Kind) -> dict[str, Any]:
        """For the card: mean and standard deviation, or the share of each id; original sizes."""
        found: dict[str, Any] = {"images": self.images, "smallest": self.smallest, "largest": self.largest}
        if kind == "instances":
            return found | {"distinct_ids": len(self.id_images)}
        if kind == "labels":
            order = sorted(self.id_pixels, key=int)
            return found | {
                "classes_present": [int(name) for name in order],
                "frequencies": {name: self.id_pixels[name] / self.pixels for name in order},
                "images_with": {name: self.id_images[name] for name in order},
            }
        mean = [total / max(1, self.pixels) for total in self.sum]
        spread = [
            max(0.0, square / max(1, self.pixels) - m * m) ** 0.5
            for square, m in zip(self.square, mean, strict=True)
        ]
        return found | {"mean": mean, "std": spread}


def _area(size: list[int]) -> tuple[int, list[int]]:
    return size[0] * size[1], size


def _added(one: list[float], other: list[float]) -> list[float]:
    return [a + b for a, b in zip(one, other, strict=True)] if one and other else one or other


@dataclass(slots=True)
class Statistics:
    """Sums per role over the pairs of a split."""

    roles: dict[Role, RoleSums] = field(default_factory=dict)

    def add(self, role: Role, found: Mapping[str, Any], original: tuple[int, int]) -> None:
        """Count one image by its `measures`."""
        self.roles.setdefault(role, RoleSums()).merge(
            {
                "images": 1,
                "pixels": found["pixels"],
                "sum": found.get("sum", []),
                "square": found.get("square", []),
                "id_pixels": {
                    str(i): n for i, n in zip(found.get("ids", ()), found.get("counts", ()), strict=True)
                },
                "id_images": {str(i): 1 for i in found.get("ids", ())},
                "smallest": list(original),
                "largest": list(original),
            }
        )

    def merge(self, other: Mapping[Role, Mapping[str, Any]]) -> None:
        """Add another bucket's sums, from `to_json`."""
        for role, sums in other.items():
            self.roles.setdefault(role, RoleSums()).merge(sums)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a marker."""
        return {role: asdict(sums) for role, sums in sorted(self.roles.items())}


# -- leaks --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Leaks:
    """Training images that look like a held-out one, and validation images that look like a test one.

    By perceptual hash: a hint to look, not a verdict.
    """

    role: str = ""
    train: int = 0
    held_out: int = 0
    found: int = 0
    val: int = 0
    found_in_val: int = 0
    examples: tuple[tuple[str, str, int], ...] = ()
    """(key, held-out key, bits of 64 that differ)"""


def near(
    ours: npt.NDArray[np.uint64], theirs: npt.NDArray[np.uint64], distance: int = LEAK_DISTANCE
) -> npt.NDArray[np.intp]:
    """For each hash of `ours` the index of its nearest in `theirs`, or -1 if none is within `distance`."""
    if not len(ours) or not len(theirs):
        return np.full(len(ours), -1, np.intp)
    apart = np.bitwise_count(ours[:, None] ^ theirs[None, :])
    nearest = apart.argmin(axis=1)
    return np.where(apart[np.arange(len(ours)), nearest] <= distance, nearest, -1)


def leakage(folder: str, spec: DatasetSpec) -> Leaks:
    """Compare every training image with (a sample of) the held-out ones, those of val with those of test.

    A shard a task.
    """
    role = next((r for r in ("target", "source") if r in spec.roles and hashable(spec.roles[r].kind)), None)
    names: dict[str, list[str]] = {
        split: [f.name for f in spec.splits.get(split, ())] for split in get_args(Split)
    }
    if role is None or sum(map(bool, names.values())) < 2:
        return Leaks()
    keys: list[str] = []
    hashes: list[npt.NDArray[np.uint64]] = [np.empty(0, np.uint64)]
    ends: dict[str, int] = {}  # those of test come first: val is compared with these alone
    for split in ("test", "val"):
        for name in names[split]:
            if len(keys) >= LEAK_SAMPLE:
                break
            found, values = read_hashes(folder, name, role)
            keys += found
            hashes.append(values)
        ends[split] = min(len(keys), LEAK_SAMPLE)
    held = np.concatenate(hashes)[:LEAK_SAMPLE]
    items = [
        {"name": name, "split": split, "end": end}
        for split, end in (("train", ends["val"]), ("val", ends["test"]))
        for name in names[split]
        if end
    ]
    compare = partial(_compare, folder=folder, role=role, held=ray.put((keys, held)))
    rows: list[dict[str, Any]] = []
    if items:
        compared = ray.data.from_items(items, override_num_blocks=min(len(items), 1024)).map(compare)
        rows = sorted(compared.iter_rows(), key=lambda row: str(row["name"]))
    examples = [tuple(example) for row in rows for example in json.loads(row["examples"])]
    total: Counter[str] = Counter()
    for row in rows:
        total.update({f"rows_{row['split']}": row["rows"], f"found_{row['split']}": row["found"]})
    return Leaks(
        role=role,
        train=total["rows_train"],
        held_out=len(held),
        found=total["found_train"],
        val=total["rows_val"],
        found_in_val=total["found_val"],
        examples=tuple(examples[:LEAK_EXAMPLES]),
    )


def hashable(kind: Kind) -> bool:
    """Whether images of a kind have a perceptual hash."""
    return kind in ("rgb", "grey", "lab_l")


def read_hashes(folder: str, name: str, role: Role) -> tuple[list[str], npt.NDArray[np.uint64]]:
    """Keys and hashes of a shard's images, without those too plain to compare."""
    table = storage.read_parquet(storage.join(folder, name), ["key", f"{role}_hash"]).drop_null()
    hashes = table[f"{role}_hash"].to_numpy().astype(np.uint64)
    bits = np.bitwise_count(hashes)
    kept = np.flatnonzero((bits >= _PLAIN) & (bits <= 64 - _PLAIN))
    return table["key"].take(kept).to_pylist(), hashes[kept]


def _compare(row: dict[str, Any], *, folder: str, role: Role, held: Any) -> dict[str, Any]:
    held_keys, held_hashes = ray.get(held)
    held_hashes = held_hashes[: row["end"]]
    keys, hashes = read_hashes(folder, row["name"], role)
    nearest = near(hashes, held_hashes)
    alike = np.flatnonzero(nearest >= 0)
    examples = [
        (keys[i], held_keys[nearest[i]], int(np.bitwise_count(hashes[i] ^ held_hashes[nearest[i]])))
        for i in alike[:LEAK_EXAMPLES]
    ]
    return {
        "name": row["name"],
        "split": row["split"],
        "rows": len(keys),
        "found": len(alike),
        "examples": json.dumps(examples),
    }


# -- the card -----------------------------------------------------------------


def write(
    folder: str,
    spec: DatasetSpec,
    statistics: Mapping[Split, Statistics],
    rejects: Mapping[str, int],
    leaks: Leaks,
) -> dict[str, bytes]:
    """Write card.json, card.md and samples.png into a shards folder; returns them by name."""
    found = {
        "size": list(spec.size),
        "roles": {role: known.model_dump(exclude_none=True) for role, known in spec.roles.items()},
        "splits": {
            split: {
                "pairs": spec.rows(split),
                "shards": len(spec.splits[split]),
                "roles": {
                    role: sums.described(spec.roles[role].kind)
                    for role, sums in statistics[split].roles.items()
                },
            }
            for split in get_args(Split)
            if split in spec.splits
        },
        "rejects": dict(sorted(rejects.items())),
        "leakage": asdict(leaks),
    }
    files = {
        "card.json": json.dumps(found, indent=2, ensure_ascii=False).encode() + b"\n",
        "card.md": markdown(found).encode(),
        "samples.png": encode.encode_png(samples(folder, spec)),
    }
    for name, data in files.items():
        storage.write_bytes(storage.join(folder, name), data)
    return files


def samples(folder: str, spec: DatasetSpec) -> Array:
    """The first pairs as a sheet: a row a pair, a column a role."""
    split = next(split for split in get_args(Split) if split in spec.splits)
    blank = np.full((spec.size[1], spec.size[0], 3), 255, np.uint8)
    rows = [
        [sample.picture(spec, role) if role in sample.images else blank for role in spec.roles]
        for sample in read_split(folder, spec, split, limit=SAMPLES)
    ]
    return pictures.sheet(rows)


def markdown(found: Mapping[str, Any]) -> str:
    """The card for people."""
    width, height = found["size"]
    lines = ["# Data set card", "", f"All images are stored at {width}x{height} pixels.", ""]
    lines += ["| role | kind | encoding | classes |", "|---|---|---|---|"]
    for role, known in found["roles"].items():
        lines.append(f"| {role} | {known['kind']} | {known['encoding']} | {known.get('classes', '')} |")
    lines += ["", "| split | pairs | shards |", "|---|---|---|"]
    lines += [
        f"| {name} | {split['pairs']:,} | {split['shards']:,} |" for name, split in found["splits"].items()
    ]
    lines += ["", "![samples](samples.png)", ""]
    for name, split in found["splits"].items():
        lines += [f"## {name}", "", "| role | original sizes | values |", "|---|---|---|"]
        for role, sums in split["roles"].items():
            sizes = sorted({"x".join(map(str, sums["smallest"])), "x".join(map(str, sums["largest"]))})
            lines.append(f"| {role} | {' to '.join(sizes)} | {_values(sums)} |")
        lines.append("")
    if found["rejects"]:
        lines += ["## Rejected", "", "| reason | pairs |", "|---|---|"]
        lines += [f"| {reason} | {count:,} |" for reason, count in found["rejects"].items()]
        lines.append("")
    return "\n".join(lines + _leak_lines(found["leakage"])) + "\n"


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
    if not leaks["role"]:
        return []
    lines = [
        "## Near-duplicates between splits",
        "",
        f"{leaks['found']:,} of {leaks['train']:,} training images ({leaks['role']}) look like one of "
        f"{leaks['held_out']:,} held-out images, by perceptual hash. Worth a look, not a verdict.",
    ]
    if leaks["val"]:
        lines.append(f"So do {leaks['found_in_val']:,} of {leaks['val']:,} validation images of test ones.")
    if leaks["examples"]:
        lines += ["", "| key | held-out key | bits of 64 that differ |", "|---|---|---|"]
        lines += [f"| {_cell(a)} | {_cell(b)} | {bits} |" for a, b, bits in leaks["examples"]]
    return lines


def _cell(text: str) -> str:
    """A key, which is a stranger's text, as a cell of a Markdown table."""
    plain = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:120])
    return "`" + plain.replace("`", "'").replace("|", "\\|") + "`"
