"""Pairs for a person to look at: shifted, mirrored, mismatched, near-duplicate, constant; drift of splits.

in:  the images of a pair, in the shard stage's task  -> `sign`, a row of signs-<shard>.parquet
     signs-<shard>.parquet  {key, source, target}: the cells of both images
out: `find`: Suspects; suspects.csv {kind, key, split, score, reason, shard}, the worst of each kind first

A multichannel Wiener filter, fitted to a sample of the pairs, predicts the spectra of a target's cells from
those of its source. The spectrum of its errors weighs all products of predictions and targets, as in a
matched filter. A pair is mismatched if its prediction fits its target hardly better than those of other pairs
do, mirrored if that of the mirrored source fits better, shifted if its own fits better elsewhere (a phase
correlation; Kuglin and Hines, 1975). Nothing is left out by itself.
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
SIDE, GRID, FEATURES = 96, 32, 5  # pixels and cells of a side; a cell has RGB and slopes across and down
RANGE = 5  # cells, over which a source explains its target
STEP, REACH = 4, 16  # steps in a cell, and steps looked for: shifts of up to 12 % of the width
SAMPLE = 2000  # pairs that the filter is fitted to, and training images that others are compared with
OTHERS = 500  # pairs of them that each pair is compared with
LEAST = 30  # pairs of a sample that tells wrong ones apart
HELD_OUT = 10_000  # held-out images that every later image is compared with
RIDGE = 1e-2  # of the power of each frequency
ROUNDING = (GRID / 255) ** 2 / 12  # the power of a cell's rounding
ROWS = 256  # compared at once
THUMB = 16  # cells of a thumbnail's side
ALIKE = 0.002  # how far from 1 the correlation of the thumbnails of near-duplicates may be
LEVELS = 4  # an image whose cells differ by fewer levels of 256 is constant
MOST = 1000  # rows of suspects.csv of one kind
EXAMPLES = 20
ROLES: tuple[Role, ...] = ("source", "target")
DRIFT = 0.6  # standard deviations between images by which a split's mean colour may differ
CERTAIN = 5.0  # standard errors that such a difference must have
ORDER: tuple[Split, ...] = ("test", "val", "train")  # an image is compared with those before it
EXPLAINED = 3.0  # the least usual fit that tells wrong pairs
CHANCE = 3.5  # deviations, which one of 4,000 mismatched pairs fits by chance
SEARCHED = 1.0  # how much more the best of all shifts fits by chance
SHIFT, GAIN = 0.012, 1.0  # the least shift, and how much better a pair must fit there, or mirrored
KINDS = ("constant", "mirrored", "shifted", "mismatched", "near_duplicate")
"""The kinds, in the order in which one explains away those after it, but for near-duplicates."""

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Spectra = npt.NDArray[np.complex64]

SIGNS = pa.schema([("key", pa.string()), *((role, pa.binary(FEATURES * GRID * GRID)) for role in ROLES)])


class Suspect(NamedTuple):
    """A pair to look at: the score is 1 at the limit, and more the farther beyond."""

    kind: str
    key: str
    split: Split
    score: float
    reason: str
    shard: str


# -- one pair -----------------------------------------------------------------

_MEANS = np.kron(np.eye(GRID), np.full(SIDE // GRID, GRID / SIDE)).astype(np.float32)  # of cells


def sign(images: Mapping[Role, Array], specs: Mapping[Role, RoleSpec]) -> dict[str, Any]:
    """What the search needs of a pair's source and target: the values of `SIGNS` without the key."""
    lightness = images["source"] if specs["source"].kind == "lab_l" else None
    small = [
        _small(pictures.picture(images[r], specs[r].kind, classes=specs[r].classes, lightness=lightness))
        for r in ROLES
    ]
    grey = np.stack([np.asarray(image.convert("L")) for image in small]).astype(np.int16)
    slopes = np.zeros((2, 2, SIDE, SIDE), np.int16)  # across and down
    slopes[:, 0, :, 1:-1] = np.abs(grey[:, :, 2:] - grey[:, :, :-2])
    slopes[:, 1, 1:-1] = np.abs(grey[:, 2:] - grey[:, :-2])
    edges = (_MEANS @ np.sqrt(slopes, dtype=np.float32) @ _MEANS.T * 15.9).astype(np.uint8)
    colours = [np.asarray(image.reduce(SIDE // GRID)).transpose(2, 0, 1) for image in small]
    return {r: c.tobytes() + e.tobytes() for r, c, e in zip(ROLES, colours, edges, strict=True)}


def _small(picture: Array) -> Image.Image:
    """A thumbnail; to reduce by whole numbers first is twice as fast as `resize` alone."""
    image = Image.fromarray(picture)
    image = image.reduce(tuple(max(1, round(side / SIDE)) for side in image.size))  # type: ignore[arg-type]
    return image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)


# -- what all pairs are compared with -----------------------------------------

_hann = np.hanning(GRID + 2)[1:-1].astype(np.float32)
_WINDOW = np.minimum(1, 3 * np.outer(_hann, _hann))
_kernel = np.exp(-((2 * np.pi * RANGE * np.fft.fftfreq(GRID)) ** 2) / 2)
_lags = np.fft.fft(_kernel / _kernel.sum()).real  # so that a smoothed spectrum is never negative
_LAGS = np.outer(_lags, _lags)[:, :, None, None]
_S, _T = slice(FEATURES), slice(FEATURES, None)
_HALVES = (np.where(np.arange(GRID // 2 + 1) % (GRID // 2), 2, 1) ** 0.5)[:, None, None]  # of a spectrum
_STEPS = (np.arange(-REACH, REACH + 1) / (STEP * GRID)).astype(np.float32)  # shares of the width or height
_DOWN = np.exp(2j * np.pi * np.outer(_STEPS, GRID * np.fft.fftfreq(GRID))).astype(np.complex64)
_ACROSS = np.exp(2j * np.pi * np.outer(np.arange(GRID // 2 + 1), _STEPS)).astype(np.complex64)


def _stored_cells(table: pa.Table, role: Role) -> npt.NDArray[np.uint8]:
    """The cells (N, FEATURES, GRID, GRID) of a role."""
    return np.frombuffer(b"".join(table[role].to_pylist()), np.uint8).reshape(-1, FEATURES, GRID, GRID)


def _spectra(cells: npt.NDArray[np.uint8]) -> Spectra:
    """Their spectra (N, FEATURES, GRID, GRID // 2 + 1)."""
    values = cells * np.float32(1 / 255)
    values -= values.mean(axis=(2, 3), keepdims=True)
    values *= _WINDOW
    spectra: Spectra = np.fft.rfft2(values)  # type: ignore[assignment]  # numpy 2 keeps the precision
    return spectra


class Fits(NamedTuple):
    """How well some sources and targets explain each other, in deviations over how well other pairs do."""

    own: Floats
    mirrored: Floats
    """Once the source is mirrored."""
    moved: Floats
    """Once the target is moved back, by that which fits best."""
    dx: Floats
    """How far it lies to the right, as a share of the width."""
    dy: Floats


@dataclass(frozen=True, slots=True)
class Explanation:
    """How well sources and targets explain each other, from a sample of the pairs."""

    predict: Spectra
    """What makes of a source's spectrum its target's, whitened."""
    whiten: Spectra
    keys: Mapping[str, int]
    """Row of each key in the two that follow."""
    sources: Floats
    targets: Floats
    usual: float = 0.0
    """The median of `Fits.own` over the sample; 0: there are too few pairs, or they explain nothing."""
    least: float = 0.0
    """The fit below which a pair is mismatched."""

    @classmethod
    def of(cls, sample: pa.Table) -> Explanation:
        """Fit the filter to a sample."""
        density: npt.NDArray[Any] = np.zeros((GRID, GRID // 2 + 1, 2 * FEATURES, 2 * FEATURES))
        for rows in _slices(sample):
            both = np.concatenate([_spectra(_stored_cells(rows, role)) for role in ROLES], axis=1)
            both = both.transpose(2, 3, 0, 1).astype(np.complex128)
            density = density + both.conj().swapaxes(2, 3) @ both
        lags = np.fft.irfft2(density / max(1, sample.num_rows), (GRID, GRID), axes=(0, 1)) * _LAGS
        eye = np.eye(2 * FEATURES)
        density = np.fft.rfft2(lags, axes=(0, 1)) * (1 + RIDGE * eye) + ROUNDING * eye
        among, between, targets = (density[..., a, b] for a, b in ((_S, _S), (_S, _T), (_T, _T)))
        predict = np.linalg.solve(among, between)
        rest = targets - between.conj().swapaxes(2, 3) @ predict
        whiten = np.linalg.cholesky(np.linalg.inv(rest)) * _HALVES
        first, second = (
            np.ascontiguousarray(weights.transpose(2, 3, 0, 1), np.complex64)
            for weights in (predict @ whiten, whiten)
        )
        others = sample[:OTHERS]
        keys = {key: row for row, key in enumerate(others["key"].to_pylist())}
        ours = _flat(_views(_stored_cells(others, "source"), first))
        theirs = _flat(_views(_stored_cells(others, "target"), second))
        fitted = cls(first, second, keys, ours, theirs)
        if sample.num_rows < LEAST:
            return fitted
        usual = float(np.median(np.concatenate([fitted.fits(rows).own for rows in _slices(sample)])))
        return replace(fitted, usual=usual, least=min(CHANCE, usual / 2))

    def fits(self, table: pa.Table) -> Fits:
        """How well the pairs of a table fit."""
        source, target = (_stored_cells(table, role) for role in ROLES)
        ours, theirs = _views(source, self.predict), _views(target, self.whiten)
        mirrored = _views(source[..., ::-1], self.predict)
        products = (ours.conj() * theirs).sum(axis=1)
        surface = ((_DOWN @ products) @ _ACROSS).real
        place = surface.reshape(len(surface), -1).argmax(axis=1)
        down, across = np.divmod(place, len(_STEPS))
        # what others reach: a pair is not compared with itself
        rows = np.array([self.keys.get(key, -1) for key in table["key"].to_pylist()])
        counted = np.arange(len(self.keys)) != rows[:, None]
        scale, zero = np.zeros((2, len(rows)), np.float32)
        for others in (_flat(ours) @ self.targets.T, _flat(theirs) @ self.sources.T):
            spread = others.std(axis=1, where=counted) + np.float32(1e-6)
            scale += 0.5 / spread
            zero += others.mean(axis=1, where=counted) / spread / 2
        middle = surface[:, REACH - 1 : REACH + 2, REACH - 1 : REACH + 2].max(axis=(1, 2))
        own, turned, moved = (
            fit * scale - zero
            for fit in (middle, (_flat(mirrored) * _flat(theirs)).sum(axis=1), surface.max(axis=(1, 2)))
        )
        return Fits(own, turned, moved, _STEPS[across], _STEPS[down])


def _views(cells: npt.NDArray[np.uint8], filters: Spectra) -> Spectra:
    """Filtered spectra of length 1, so that products are correlations."""
    views: Spectra = np.einsum("nikl,ijkl->njkl", _spectra(cells), filters, order="C")
    vectors = _flat(views)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True) + np.float32(1e-6)
    return views


def _flat(views: Spectra) -> Floats:
    """The same as real vectors."""
    vectors: Floats = views.reshape(len(views), -1).view(np.float32)
    return vectors


def _slices(table: pa.Table) -> Iterator[pa.Table]:
    """Its rows, as many as are compared at once."""
    return (table.slice(start, ROWS) for start in range(0, table.num_rows, ROWS))


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
        vectors, starts = [np.empty((0, THUMB**2), np.float32)], {}
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
    """Keys and vectors (N, THUMB * THUMB) of mean 0 and length 1 of the targets that are not constant."""
    colours = _stored_cells(table, "target")[:, :3].mean(axis=1, dtype=np.float32)
    blocks = colours.reshape(-1, THUMB, GRID // THUMB, THUMB, GRID // THUMB)
    grey = blocks.mean(axis=(2, 4)).reshape(-1, THUMB**2)
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
    cells = [_stored_cells(table, role)[:, :3] for role in ROLES]
    level = np.min([np.ptp(c, axis=(2, 3)).max(axis=1) for c in cells], axis=0)
    usual, least = explanation.usual, explanation.least
    known = usual >= EXPLAINED
    own, turned, moved, dx, dy = explanation.fits(table) if known else np.zeros((5, len(level)))
    mirrored = known & (turned > least) & (turned > moved - GAIN / 2)  # one fit against the best of many
    shifted = known & (moved > least + SEARCHED) & (np.hypot(dx, dy) > SHIFT)
    scores = {
        "constant": np.where(level < LEVELS, 1.0 + LEVELS - level, 0),
        "mirrored": np.where(mirrored, (turned - own) / GAIN, 0),
        "shifted": np.where(shifted, (moved - own) / GAIN, 0),
        "mismatched": (usual - own) / (usual - least) if known else np.zeros(len(level)),
    }
    reasons = {
        "constant": lambda n: f"the parts of one of its images differ by {level[n]} of 255 levels",
        "mirrored": lambda n: (
            f"the mirrored source explains the target by {turned[n]:.1f}, its own by {own[n]:.1f}"
        ),
        "shifted": lambda n: f"the target is {dx[n]:+.1%} of the width and {dy[n]:+.1%} of the height away",
        "mismatched": lambda n: f"source and target explain each other by {own[n]:.1f}, {usual:.1f} is usual",
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
    for table in _slices(signs):
        suspects += judge(table, split, shard, explanation)
        found.compared[split] += len(targets_of(table)[0])
        for key, other, apart, leaked in thumbnails.nearest(table, split):
            reason = f"its target is like that of {other} ({thumbnails.split_of(other)})"
            suspects.append(Suspect("near_duplicate", key, split, 2 - apart / ALIKE, reason, shard))
            found.leaked[split] += leaked
            found.examples += [(key, other, apart)] if leaked else []
        cells = np.concatenate([_stored_cells(table, role)[:, :3] for role in ROLES], axis=1)
        colours = cells.sum(axis=(2, 3), dtype=np.int64)
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
