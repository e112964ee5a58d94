"""Pairs for a person to look at: shifted, mirrored, mismatched, near-duplicate, constant; drift of splits.

in:  the images of a pair, in the shard stage's task  -> `sign`, a row of signs-<shard>.parquet
     signs-<shard>.parquet  {key, peak, center, mirrored, dx, dy, source, target}
out: `find`: Suspects; suspects.csv {kind, key, split, score, reason, shard}, the worst of each kind first

Phase correlation of the edges says how far target and source lie apart, and whether the mirrored source fits
better (Kuglin and Hines, 1975). What a source predicts of its target is a ridge regression over the cells of
a sample of the pairs, quadratic in a cell's colours and edges: a pair is mismatched if its source and its
target explain each other no better than they explain other pairs; one that is called mirrored or shifted has
to fit once that is undone. Nothing is left out by itself.
"""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from stages import storage
from stages.base import Role, Split
from stages.images import pictures
from stages.images.kinds import Array
from stages.parallel.cluster import each
from stages.shards.dataset import DatasetSpec, RoleSpec

NAME = "suspects.csv"
SIDE, GRID, FEATURES = 96, 16, 4  # pixels and cells of a side; a cell has the means of RGB and of its edges
REACH = 11  # pixels of SIDE: 12 % of the width, the longest shift that is looked for
LOWPASS = 0.12  # cycles a pixel: finer edges of a photo and of its labels do not agree
SAMPLE = 2000  # pairs that the regression is fitted to, and training images that others are compared with
OTHERS = 500  # pairs of them that each pair is compared with
LEAST = 30  # pairs of a sample that tells mismatched ones apart
HELD_OUT = 10_000  # held-out images that every later image is compared with
RIDGE = 1e-3
ROWS = 256  # compared at once
ALIKE = 0.002  # how far from 1 the correlation of the thumbnails of near-duplicates may be
LEVELS = 4  # an image whose cells differ by fewer levels of 256 is constant
MOST = 1000  # rows of suspects.csv of one kind
EXAMPLES = 20
ROLES: tuple[Role, ...] = ("source", "target")
DRIFT = 0.6  # standard deviations between images by which a split's mean colour may differ
CERTAIN = 5.0  # standard errors that such a difference must have
ORDER: tuple[Split, ...] = ("test", "val", "train")  # an image is compared with those before it
EXPLAINED = 2.0  # the least usual standing that tells mismatched pairs
MISMATCHED = 0.33, 0.66  # shares of the usual standing, between which the limit of mismatched pairs lies
UNUSUAL = 3.5  # deviations below the usual standing, where that limit lies
FITTING = 0.5  # the share of the usual standing that a shifted or mirrored pair reaches once it is corrected
SHIFT, GAIN = 0.012, 3.5  # the least shift, and how far the edges must agree better there
SHARP = 0.6  # of the usual agreement of edges, which they must reach there
MIRRORED = 0.3  # how far the edges must agree better when mirrored
KINDS = ("constant", "mirrored", "shifted", "mismatched", "near_duplicate")
"""The kinds, in the order in which one explains away those after it, but for near-duplicates."""

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

SIGNS = pa.schema(
    [
        ("key", pa.string()),
        *((name, pa.float32()) for name in ("peak", "center", "mirrored", "dx", "dy")),
        ("source", pa.binary(GRID * GRID * FEATURES)),
        ("target", pa.binary(GRID * GRID * FEATURES)),
    ]
)


class Suspect(NamedTuple):
    """A pair to look at: the score is 1 at the limit, and more the farther beyond."""

    kind: str
    key: str
    split: Split
    score: float
    reason: str
    shard: str


# -- one pair -----------------------------------------------------------------

_hann = np.hanning(SIDE + 2)[1:-1].astype(np.float32)
_WINDOW = np.outer(_hann, _hann)
_squares = np.fft.fftfreq(SIDE)[:, None] ** 2 + np.fft.rfftfreq(SIDE)[None] ** 2
_LOWPASS = np.exp(-_squares / (2 * LOWPASS**2)).astype(np.float32)
_weights = _LOWPASS * np.where(np.arange(SIDE // 2 + 1) % (SIDE // 2), 2, 1)  # of both halves of a spectrum
_DEVIATION = float(np.sqrt((_weights * _LOWPASS).sum())) / SIDE**2  # of a surface of random phases
# The spectrum of a mirrored image is the conjugate one with the rows reversed, moved by a pixel.
_MIRROR = (_weights * np.exp(-2j * np.pi * np.fft.rfftfreq(SIDE))).astype(np.complex64)
_REVERSED = -np.arange(SIDE) % SIDE
_NEAR = np.arange(-REACH - 1, REACH + 2)
_MEANS = np.kron(np.eye(GRID), np.full(SIDE // GRID, GRID / SIDE)).astype(np.float32)  # of cells


def sign(images: Mapping[Role, Array], specs: Mapping[Role, RoleSpec]) -> dict[str, Any]:
    """What the search needs of a pair's source and target: the values of `SIGNS` without the key."""
    lightness = images["source"] if specs["source"].kind == "lab_l" else None
    small = [
        _small(pictures.picture(images[r], specs[r].kind, classes=specs[r].classes, lightness=lightness))
        for r in ROLES
    ]
    edges = _edges(np.stack([np.asarray(image.convert("L")) for image in small]))
    strong = (_MEANS @ edges @ _MEANS.T * 11).astype(np.uint8)  # roots of at most 2 * 255
    cells = [
        image.reduce(SIDE // GRID).tobytes() + e.tobytes() for image, e in zip(small, strong, strict=True)
    ]
    source, target = map(_phases, np.fft.rfft2((edges - edges.mean(axis=(1, 2), keepdims=True)) * _WINDOW))
    rows = np.fft.ifft(target * source.conj() * _LOWPASS, axis=0)[_NEAR]
    near = np.fft.irfft(rows, axis=1)[:, _NEAR] / _DEVIATION
    y, x = np.unravel_index(near[1:-1, 1:-1].argmax(), (2 * REACH + 1, 2 * REACH + 1))
    return {
        "peak": float(near[y + 1, x + 1]),
        "center": float(near[REACH : REACH + 3, REACH : REACH + 3].max()),
        "mirrored": float((target * source[_REVERSED] * _MIRROR).real.sum()) / (SIDE**2 * _DEVIATION),
        "dx": float(x - REACH + _between(*near[y + 1, x : x + 3])) / SIDE,
        "dy": float(y - REACH + _between(*near[y : y + 3, x + 1])) / SIDE,
        "source": cells[0],
        "target": cells[1],
    }


def _small(picture: Array) -> Image.Image:
    """A thumbnail; to reduce by whole numbers first is twice as fast as `resize` alone."""
    image = Image.fromarray(picture)
    image = image.reduce(tuple(max(1, round(side / SIDE)) for side in image.size))  # type: ignore[arg-type]
    return image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)


def _edges(grey: npt.NDArray[np.uint8]) -> Floats:
    """The roots of the gradients of images (N, SIDE, SIDE)."""
    wide = grey.astype(np.int16)
    edges = np.zeros(wide.shape, np.int16)
    edges[:, :, 1:-1] = np.abs(wide[:, :, 2:] - wide[:, :, :-2])
    edges[:, 1:-1] += np.abs(wide[:, 2:] - wide[:, :-2])
    roots: Floats = np.sqrt(edges, dtype=np.float32)
    return roots


def _phases(spectrum: npt.NDArray[np.complexfloating[Any]]) -> npt.NDArray[np.complexfloating[Any]]:
    """Its phases, less of those whose amplitude is tiny."""
    size = np.abs(spectrum)
    phases: npt.NDArray[np.complexfloating[Any]] = spectrum / (size + np.float32(0.03 * size.mean() + 1e-6))
    return phases


def _between(before: float, top: float, after: float) -> float:
    """Where a parabola through three neighbours has its top, in -0.5 .. 0.5."""
    bend = before - 2 * top + after
    return float(np.clip((before - after) / (2 * bend), -0.5, 0.5)) if bend < 0 else 0.0


# -- what all pairs are compared with -----------------------------------------


def _stored_cells(table: pa.Table, role: str) -> npt.NDArray[np.uint8]:
    """The cells (N, GRID, GRID, FEATURES) of a role."""
    rows = np.frombuffer(b"".join(table[role].to_pylist()), np.uint8).reshape(-1, GRID * GRID * FEATURES)
    colours, edges = np.split(rows, [GRID * GRID * 3], axis=1)
    shape = (-1, GRID, GRID)
    return np.concatenate([colours.reshape(*shape, 3), edges.reshape(*shape, 1)], axis=3)


def _cells_of(table: pa.Table, role: Role) -> Floats:
    """The same, 0 .. 1."""
    return _stored_cells(table, role).astype(np.float32) / np.float32(255)


def _features(cells: Floats) -> Floats:
    """What the regression sees of a cell: its means and its height in the image, and their products."""
    heights = np.linspace(-1, 1, GRID, dtype=np.float32)[None, :, None, None]
    x = np.concatenate([cells, np.broadcast_to(heights, (*cells.shape[:3], 1))], axis=3)
    first, second = np.triu_indices(FEATURES + 1)
    return np.concatenate([np.ones_like(x[..., :1]), x, x[..., first] * x[..., second]], axis=3)


@dataclass(frozen=True, slots=True)
class Explanation:
    """How well sources and targets explain each other, from a sample of the pairs."""

    weights: Floats
    scales: tuple[Floats, Floats]
    """Deviations of the predictions' and of the targets' features, over all cells."""
    keys: Mapping[str, int]
    """Row of each key in the two that follow."""
    predictions: Floats
    targets: Floats
    sharp: float
    """The median of the edges' best agreement."""
    usual: float = 0.0
    """The median of `standing` over the sample; 0: there are too few pairs, or they explain nothing."""
    least: float = 0.0
    """The standing below which a pair is mismatched."""

    @classmethod
    def of(cls, sample: pa.Table) -> Explanation:
        """Fit the regression to a sample."""
        features, targets = _features(_cells_of(sample, "source")), _cells_of(sample, "target")
        rows, wanted = features.reshape(-1, features.shape[-1]), targets.reshape(-1, FEATURES)
        square = rows.T @ rows / len(rows) + RIDGE * np.eye(rows.shape[1], dtype=np.float32)
        weights = np.linalg.solve(square, rows.T @ wanted / len(rows)).astype(np.float32)
        predicted = features @ weights
        scales = (_deviations(predicted), _deviations(targets))
        keys = {key: row for row, key in enumerate(sample["key"][:OTHERS].to_pylist())}
        ours, theirs = _normed(predicted[:OTHERS], scales[0]), _normed(targets[:OTHERS], scales[1])
        sharp = float(np.median(sample["peak"].to_numpy()))
        fitted = cls(weights, scales, keys, ours, theirs, sharp)
        if sample.num_rows < LEAST:
            return fitted
        standing = fitted.standing(sample, *fitted.views(sample), sample["center"].to_numpy())
        usual = float(np.median(standing))
        deviation = 1.4826 * float(np.median(np.abs(standing - usual)))  # of a normal distribution
        low, high = (usual * share for share in MISMATCHED)
        return replace(fitted, usual=usual, least=float(np.clip(usual - UNUSUAL * deviation, low, high)))

    def views(self, table: pa.Table) -> tuple[Floats, Floats]:
        """What the sources predict and what the targets are, as `_normed` vectors."""
        predicted = _features(_cells_of(table, "source")) @ self.weights
        return _normed(predicted, self.scales[0]), _normed(_cells_of(table, "target"), self.scales[1])

    def standing(self, table: pa.Table, ours: Floats, target: Floats, agreement: Floats) -> Floats:
        """How far each pair explains itself better than it explains others, in deviations over those.

        Half of the agreement of its edges counts too. ours, target: from `views`.
        """
        own = (ours * target).sum(axis=1)
        place = np.array([self.keys.get(key, -1) for key in table["key"].to_pylist()])
        counted = np.arange(len(self.keys)) != place[:, None]  # a pair is not compared with itself
        total = agreement / 2
        for others in (ours @ self.targets.T, target @ self.predictions.T):
            spread = others.std(axis=1, where=counted) + np.float32(1e-6)
            total = total + (own - others.mean(axis=1, where=counted)) / spread / 2
        return np.asarray(total, np.float32)


def _deviations(cells: Floats) -> Floats:
    centred: Floats = (cells - cells.mean(axis=(1, 2), keepdims=True)).std(axis=(0, 1, 2)) + 1e-6
    return centred


def _normed(cells: Floats, scales: Floats) -> Floats:
    """Cells as vectors (N, ...) of mean 0 and length 1, so that products are correlations."""
    rows = ((cells - cells.mean(axis=(1, 2), keepdims=True)) / scales).reshape(len(cells), -1)
    normed: Floats = rows / (np.linalg.norm(rows, axis=1, keepdims=True) + np.float32(1e-6))
    return normed


def _moved(vectors: Floats, dx: Floats, dy: Floats) -> Floats:
    """`_normed` cells moved by shares of the width and of the height; cells at the rim fill the gap."""
    cells = vectors.reshape(-1, GRID, GRID, FEATURES)
    for axis, by in ((2, dx), (1, dy)):
        place = np.clip(np.arange(GRID) - GRID * by[:, None], 0, GRID - 1)
        at = np.expand_dims(place.astype(np.float32), (3 - axis, 3))
        before = np.floor(at).astype(int)
        after = np.minimum(before + 1, GRID - 1)
        low, high = (np.take_along_axis(cells, index, axis) for index in (before, after))
        cells = low + (high - low) * (at - before)
    return _normed(cells, np.ones(FEATURES, np.float32))


@dataclass(frozen=True, slots=True)
class Thumbnails:
    """Targets in the order of `ORDER`: an image is compared with those before it."""

    keys: Mapping[str, int]
    """The place of each key."""
    vectors: Floats
    """Of length 1, so that products are correlations."""
    starts: Mapping[Split, int]
    """Where each split begins."""

    @classmethod
    def read(cls, folder: str, shards: Mapping[Split, Sequence[str]]) -> Thumbnails:
        """The first `HELD_OUT` targets of test and val, and the first `SAMPLE` of train."""
        keys: list[str] = []
        vectors, starts = [np.empty((0, GRID * GRID), np.float32)], {}
        for split in ORDER:
            starts[split] = len(keys)
            most = SAMPLE if split == "train" else HELD_OUT - len(keys)
            more_keys, more = targets_of(first_signs(folder, shards.get(split, ()), most))
            keys += more_keys
            vectors.append(more)
        return cls({key: place for place, key in enumerate(keys)}, np.concatenate(vectors), starts)

    def split_of(self, key: str) -> Split:
        """The split of one of the keys."""
        return next(split for split in reversed(ORDER) if self.keys[key] >= self.starts[split])

    def nearest(self, table: pa.Table, split: Split) -> list[tuple[str, str, float, bool]]:
        """Of each image that is like one before it: both keys, their distance, whether splits differ."""
        keys, vectors = targets_of(table)
        start = self.starts[split]
        end = min((s for s in self.starts.values() if s > start), default=len(self.vectors))
        if not end or not keys:
            return []
        apart = 1 - vectors @ self.vectors[:end].T
        place = np.array([self.keys.get(key, end) for key in keys])
        apart[np.arange(end) >= place[:, None]] = np.inf
        leaked = np.count_nonzero(apart[:, :start] < ALIKE, axis=1) > 0
        apart[leaked, start:] = np.inf
        nearest = apart.argmin(axis=1)
        least = apart[np.arange(len(keys)), nearest]
        names = list(self.keys)
        return [
            (keys[row], names[nearest[row]], max(0.0, round(float(least[row]), 5)), bool(leaked[row]))
            for row in np.flatnonzero(least < ALIKE)
        ]


def first_signs(folder: str, shards: Sequence[str], most: int) -> pa.Table:
    """The signs of the first pairs of some shards."""
    tables, rows = [SIGNS.empty_table()], 0
    for shard in shards:
        if rows >= most:
            break
        tables.append(storage.read_parquet(storage.join(folder, signs_name(shard))))
        rows += tables[-1].num_rows
    return pa.concat_tables(tables)[:most]


def signs_name(shard: str) -> str:
    """The file of the signs of a shard's pairs."""
    return f"signs-{shard}"


def targets_of(table: pa.Table) -> tuple[list[str], Floats]:
    """Keys and vectors (N, GRID * GRID) of mean 0 and length 1 of the targets that are not constant."""
    grey = _stored_cells(table, "target")[..., :3].mean(axis=3, dtype=np.float32).reshape(-1, GRID * GRID)
    rows = np.flatnonzero(np.ptp(grey, axis=1) >= LEVELS)
    vectors = grey[rows] - grey[rows].mean(axis=1, keepdims=True)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return table["key"].take(pa.array(rows)).to_pylist(), vectors


# -- the search ---------------------------------------------------------------


@dataclass(slots=True)
class Found:
    """What was found in some shards."""

    suspects: defaultdict[str, list[Suspect]] = field(default_factory=lambda: defaultdict(list))
    """The worst `MOST` of each kind."""
    counts: Counter[str] = field(default_factory=Counter)
    """All suspects of each kind."""
    compared: Counter[str] = field(default_factory=Counter)
    """Images of each split that were compared."""
    leaked: Counter[str] = field(default_factory=Counter)
    """Those of them that are like one of a split before."""
    examples: list[tuple[str, str, float]] = field(default_factory=list)
    held_out: int = 0
    """Images of val and test that were compared with."""
    colours: defaultdict[str, Ints] = field(
        default_factory=lambda: defaultdict(lambda: np.zeros((3, 6), np.int64))
    )
    """Of each split: its pairs, and the sums and squares of the colours of their sources and targets."""

    def add(self, other: Found) -> None:
        """Add what was found in other shards, in any order."""
        self.counts += other.counts
        self.compared += other.compared
        self.leaked += other.leaked
        self.examples = sorted([*self.examples, *other.examples])[:EXAMPLES]
        self.rank(suspect for suspects in other.suspects.values() for suspect in suspects)
        for split, sums in other.colours.items():
            self.colours[split] += sums

    def rank(self, suspects: Iterable[Suspect]) -> None:
        """Keep the worst of these too."""
        for suspect in suspects:
            self.suspects[suspect.kind].append(suspect)
        for kind, ranked in self.suspects.items():
            self.suspects[kind] = sorted(ranked, key=lambda s: (-s.score, s.key))[:MOST]

    def leaks(self) -> dict[str, Any]:
        """Counts of training images that look like a held-out one, of validation images like a test one.

        Thumbnails are compared, so these are pairs to look at, not certain duplicates. An example is a key,
        the held-out key, and how far their correlation is from 1.
        """
        return {
            "train": self.compared["train"],
            "held_out": self.held_out,
            "found": self.leaked["train"],
            "val": self.compared["val"],
            "found_in_val": self.leaked["val"],
            "examples": self.examples,
        }

    def remarks(self) -> list[str]:
        """What a person should look at: how many suspects there are, and splits of other colours."""
        named = ", ".join(f"{kind} {self.counts[kind]:,}" for kind in KINDS if self.counts[kind])
        advice = f"{NAME} lists the worst; pair.exclude leaves out those that a person has confirmed"
        return ([f"pairs that may be wrong: {named}; {advice}"] if named else []) + self.drift()

    def drift(self) -> list[str]:
        """Remarks about splits whose colours differ from those of train."""
        remarks = []
        for split in ("val", "test"):
            count, train = self.colours[split][0, 0], self.colours["train"][0, 0]
            if min(count, train) < LEAST:
                continue
            mean = {name: self.colours[name][1] / self.colours[name][0] for name in ("train", split)}
            spread = np.sqrt(self.colours["train"][2] / train - mean["train"] ** 2) + 1e-6
            apart = np.abs(mean[split] - mean["train"]) / spread
            most = int(apart.argmax())
            if apart[most] > DRIFT and apart[most] * (count * train / (count + train)) ** 0.5 > CERTAIN:
                role, colour = ("source", "target")[most // 3], ("red", "green", "blue")[most % 3]
                remarks.append(
                    f"{split}: the mean {colour} of its {role}s is {apart[most]:.1f} deviations off train's"
                )
        return remarks

    def table(self) -> bytes:
        """The worst of each kind as CSV."""
        file = io.StringIO(newline="")
        writer = csv.writer(file)
        writer.writerow(Suspect._fields)
        for kind in KINDS:
            writer.writerows(s._replace(score=round(s.score, 3)) for s in self.suspects[kind])
        return file.getvalue().encode()


def judge(table: pa.Table, split: Split, shard: str, explanation: Explanation) -> Iterator[Suspect]:
    """The suspects among some pairs of a shard but for near-duplicates, each of its first kind."""
    peak, center, mirrored, dx, dy = (
        table[name].to_numpy() for name in ("peak", "center", "mirrored", "dx", "dy")
    )
    level = np.min([np.ptp(_stored_cells(table, r)[..., :3], axis=(1, 2)).max(axis=1) for r in ROLES], axis=0)
    usual = explanation.usual
    ours, theirs = explanation.views(table)
    known = usual >= EXPLAINED
    sides = ours.reshape(-1, GRID, GRID, FEATURES)[:, :, ::-1].reshape(ours.shape)
    views = (ours, center), (sides, mirrored), (_moved(ours, dx, dy), peak)
    standing, turned, moved = (
        explanation.standing(table, view, theirs, edges) if known else np.full(len(level), np.inf)
        for view, edges in views
    )
    fitting = FITTING * usual
    # how far the mirrored source explains the target better, as a difference of correlations
    better_mirrored = np.asarray(((sides - ours) * theirs).sum(axis=1), np.float32)
    scores = {
        "constant": np.where(level < LEVELS, 1.0 + LEVELS - level, 0),
        "mirrored": np.where((better_mirrored > 0) & (turned > fitting), (mirrored - center) / MIRRORED, 0),
        "shifted": np.where(
            (np.hypot(dx, dy) > SHIFT) & (peak > SHARP * explanation.sharp) & (moved > fitting),
            (peak - center) / GAIN,
            0,
        ),
        "mismatched": (usual - standing) / (usual - explanation.least) if known else np.zeros(len(level)),
    }
    reasons = {
        "constant": lambda n: f"the parts of one of its images differ by {level[n]} of 255 levels",
        "mirrored": lambda n: (
            f"the edges of the mirrored source agree by {mirrored[n]:.1f}, its own by {center[n]:.1f}"
        ),
        "shifted": lambda n: f"the target is {dx[n]:+.1%} of the width and {dy[n]:+.1%} of the height away",
        "mismatched": lambda n: (
            f"source and target explain each other by {standing[n]:.1f}, {usual:.1f} is usual"
        ),
    }
    keys = table["key"].to_pylist()
    left = np.ones(len(keys), bool)
    for kind, score in scores.items():
        for row in np.flatnonzero(left & (score >= 1)):
            yield Suspect(kind, keys[row], split, float(score[row]), reasons[kind](row), shard)
        left &= score < 1


def search(
    unit: tuple[Split, str], *, folder: str, explanation: Explanation, thumbnails: Thumbnails
) -> Found:
    """The suspects of one shard."""
    split, shard = unit
    signs = storage.read_parquet(storage.join(folder, signs_name(shard)))
    found = Found()
    suspects: list[Suspect] = []
    for start in range(0, signs.num_rows, ROWS):
        table = signs.slice(start, ROWS)
        suspects += judge(table, split, shard, explanation)
        found.compared[split] += len(targets_of(table)[0])
        for key, other, apart, leaked in thumbnails.nearest(table, split):
            reason = f"its target is like that of {other} ({thumbnails.split_of(other)})"
            suspects.append(Suspect("near_duplicate", key, split, 2 - apart / ALIKE, reason, shard))
            found.leaked[split] += leaked
            found.examples += [(key, other, apart)] if leaked else []
        cells = np.concatenate([_stored_cells(table, role)[..., :3] for role in ROLES], axis=3)
        colours = cells.sum(axis=(1, 2), dtype=np.int64)
        found.colours[split] += np.stack([np.full(6, len(colours)), colours.sum(0), (colours**2).sum(0)])
    found.counts.update(suspect.kind for suspect in suspects)
    found.rank(suspects)
    return found


def find(folder: str, spec: DatasetSpec) -> Found:
    """Look at every pair of a shards folder; one task looks at one shard."""
    shards = {split: [file.name for file in spec.splits[split]] for split in ORDER if split in spec.splits}
    names = [name for split in reversed(ORDER) for name in shards.get(split, ())]
    explanation = Explanation.of(first_signs(folder, names, SAMPLE))
    thumbnails = Thumbnails.read(folder, shards)
    call = partial(search, folder=folder, explanation=explanation, thumbnails=thumbnails)
    units = [(split, name) for split, names in shards.items() for name in names]
    found = Found(held_out=thumbnails.starts["train"])
    for part in each(call, units, stage="suspects", blocks=1024):
        found.add(part)
    return found
