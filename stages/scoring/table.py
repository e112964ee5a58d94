"""The scores as files: a part for each unit of work, and what all parts together say.

part-<unit>.parquet    a row an image: key, split, group, its pair's place, every metric, every baseline's
part-<unit>.npz        confusion matrices, and of each usable image its counts of classes and its features
metrics.parquet        the rows of all parts

Parts are added in unit order, so that the sums do not depend on how many processes wrote them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages import storage
from stages.scoring import metrics
from stages.scoring.intervals import Interval, blocks, difference, group_numbers, interval, jackknife
from stages.scoring.metrics import Moments

BASELINES = ("mean_target", "untrained", "nearest")
MAX_GROUPS = 200  # groups in summary.json; more are no summary
KID_IMAGES = 10_000
BOUNDS = ("low", "high")

ROW_FIELDS = {
    "key": pa.string(),
    "split": pa.string(),
    "group": pa.string(),
    "error": pa.string(),
    "file": pa.string(),
    "row_group": pa.int32(),
    "row": pa.int32(),
    "generated": pa.string(),  # below the folder of images
}


@dataclass(slots=True)
class UnitScores:
    """What is measured of a unit's images."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    features: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """Vectors of the images, by `fake_` or `real_` and the network's name."""
    matrices: dict[str, np.ndarray] = field(default_factory=dict)
    counts: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """`segmentation_counts` of the images, by the name of their matrix."""

    def add_matrix(self, name: str, matrix: np.ndarray) -> None:
        """Add an image's confusion matrix to the unit's. Every usable image has one, of zeros or not."""
        self.matrices[name] = self.matrices.get(name, 0) + matrix
        self.counts.setdefault(name, []).append(metrics.segmentation_counts(matrix))

    def add_features(self, network: str, fakes: np.ndarray, reals: np.ndarray) -> None:
        """Add a network's feature vectors (N, D) of generated images and of their targets."""
        for side, vectors in (("fake", fakes), ("real", reals)):
            self.features.setdefault(f"{side}_{network}", []).append(vectors)

    def write(self, part: str) -> None:
        """Write the sums, then the table part whose presence means that the unit is finished."""
        arrays = {f"matrix_{name}": matrix for name, matrix in self.matrices.items()}
        arrays |= {f"counts_{name}": np.stack(counts) for name, counts in self.counts.items()}
        arrays |= {name: np.concatenate(vectors) for name, vectors in self.features.items()}
        if arrays:
            sink = io.BytesIO()
            np.savez(sink, **arrays)  # type: ignore[arg-type]
            storage.write_bytes(_sums_uri(part), sink.getvalue())
        scores = {name: pa.float64() for row in self.rows for name in row if name not in ROW_FIELDS}
        storage.write_parquet(part, pa.Table.from_pylist(self.rows, schema=pa.schema(ROW_FIELDS | scores)))


def _sums_uri(part: str) -> str:
    return f"{part.removesuffix('.parquet')}.npz"


# -- one number of many -----------------------------------------------------------------------------


def summarise(scores: pa.Table, names: Sequence[str]) -> dict[str, Any]:
    """The summary of all rows: means with their intervals, of the model, of baselines, by split and group.

    names   the model's metrics; a baseline also has the differences of the model from it, image by image
    """
    usable = scores.filter(scores["error"].is_null())
    columns = {name: usable[name].to_numpy() for name in usable.column_names if name not in ROW_FIELDS}
    model = {name: columns[name] for name in names}
    groups = group_numbers(usable["group"])
    baselines: dict[str, dict[str, Any]] = {}
    for baseline in BASELINES:
        own = {n: columns[f"{baseline}_{n}"] for n in metrics.PIXEL_METRICS if f"{baseline}_{n}" in columns}
        if scored := max((int(np.isfinite(values).sum()) for values in own.values()), default=0):
            apart = {n: interval(model[n] - values, groups) for n, values in own.items() if n in model}
            baselines[baseline] = {
                **_means(own, groups),
                "num_images": scored,
                "differences": {name: found for name, found in apart.items() if found},
            }
    by_group: dict[str, dict[str, Any]] = {}
    for label, rows in _labels(usable):
        part = {name: values[rows] for name, values in model.items()}
        by_group[label] = {**_means(part, groups[rows]), "num_images": len(rows)}
    return {
        **_means(model, groups),
        "num_images": usable.num_rows,
        "num_missing": scores.num_rows - usable.num_rows,
        "deviations": {n: float(np.nanstd(v)) for n, v in model.items() if np.isfinite(v).any()},
        "baselines": baselines,
        "groups": dict(sorted(by_group.items())),
    }


def _means(columns: Mapping[str, np.ndarray], groups: np.ndarray) -> dict[str, Any]:
    """The mean of each column that has a value, and their intervals as {"intervals": {name: (low, high)}}."""
    means = {n: float(np.nanmean(values)) for n, values in columns.items() if np.isfinite(values).any()}
    found = {name: interval(columns[name], groups) for name in means}
    return {**means, "intervals": {name: (one.low, one.high) for name, one in found.items() if one}}


def _labels(scores: pa.Table) -> Iterator[tuple[str, np.ndarray]]:
    """Each split and each group of a split, at most MAX_GROUPS, with the numbers of its rows."""
    splits = pc.fill_null(scores["split"].combine_chunks(), "")
    groups = pc.fill_null(scores["group"].combine_chunks(), "")
    nested = pc.if_else(pc.equal(groups, ""), None, pc.binary_join_element_wise(splits, groups, "/"))
    labels = [encoded.dictionary_encode() for encoded in (splits, nested)]
    every = [(labels_, number) for labels_ in labels for number in range(len(labels_.dictionary))]
    for encoded, number in every[:MAX_GROUPS]:
        yield (
            encoded.dictionary[number].as_py(),
            np.flatnonzero(np.asarray(encoded.indices.fill_null(-1)) == number),
        )


def merge_parts(parts: Sequence[str], uri: str) -> tuple[dict[str, Any], np.ndarray]:
    """Write the rows of all parts to one file; their summary, and the number of each usable image's group.

    Holds one part at a time, and the numbers of all: 8 bytes a score, 150 MB for a million images.
    """
    schema = pa.unify_schemas([pq.read_schema(io.BytesIO(storage.read_bytes(part))) for part in parts])
    baseline_columns = tuple(f"{baseline}_" for baseline in BASELINES)
    scores = [name for name in schema.names if name not in ROW_FIELDS]
    example_missing: str | None = None

    def write() -> pa.Table:
        nonlocal example_missing
        kept = []
        with storage.create(uri) as file, pq.ParquetWriter(file, schema) as writer:
            for part in parts:
                table = pa.concat_tables(
                    [schema.empty_table(), storage.read_parquet(part)], promote_options="default"
                )
                writer.write_table(table)
                missing = table.filter(table["error"].is_valid())
                if missing.num_rows and example_missing is None:
                    example_missing = f"{missing['key'][0]}: {missing['error'][0]}"
                kept.append(table.select(["split", "group", "error", *scores]))
        return pa.concat_tables(kept)

    rows = storage.written(write, uri)
    names = [name for name in scores if not name.startswith(baseline_columns)]
    groups = group_numbers(rows.filter(rows["error"].is_null())["group"])
    return {**summarise(rows, names), "example_missing": example_missing}, groups


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeSet:
    """What is measured of all images together."""

    matrices: dict[str, np.ndarray]
    """Confusion matrices."""
    segmentation: dict[str, dict[str, float]]
    """Scores by the name of their matrix."""
    distances: dict[str, float]
    """Between the features of two images or more, and `feature_images`, their number."""
    intervals: dict[str, Interval]
    """Of distances and scores, under the names of `headline`."""


def merge_sums(
    parts: Sequence[str], distances: Mapping[str, tuple[str, str]], groups: np.ndarray
) -> WholeSet:
    """Add up what the parts have of segmentation and of features.

    distances   the names of the Frechet and the kernel distance of each network's features
    groups      a number for each usable image, in the order of the parts
    """
    matrices: dict[str, np.ndarray] = {}
    counts: dict[str, list[np.ndarray]] = {}
    moments: dict[str, Moments] = {}
    vectors: dict[str, list[np.ndarray]] = {}
    for part in parts:
        if not storage.exists(_sums_uri(part)):
            continue
        with np.load(io.BytesIO(storage.read_bytes(_sums_uri(part)))) as arrays:
            for name, array in arrays.items():
                if name.startswith("matrix_"):
                    matrices[name[7:]] = matrices.get(name[7:], 0) + array
                elif name.startswith("counts_"):
                    counts.setdefault(name[7:], []).append(array)
                else:
                    moments.setdefault(name, Moments()).add(array)
                    kept = vectors.setdefault(name, [])
                    if sum(map(len, kept)) < KID_IMAGES:
                        kept.append(array)
    found: dict[str, Interval | None] = {}
    scores: dict[str, dict[str, float]] = {}
    for name, parts_of in counts.items():
        images = np.concatenate(parts_of)
        scores[name] = metrics.segmentation_scores(images.sum(0))
        found |= _score_intervals(_prefix(name, counts), images, blocks(groups), scores[name])
    sums: dict[str, float] = {}
    for network, (frechet, kernel) in distances.items():
        fake, real = f"fake_{network}", f"real_{network}"
        if fake not in moments or moments[fake].count < 2:
            continue
        fakes, reals = np.concatenate(vectors[fake]), np.concatenate(vectors[real])
        block = blocks(groups[: len(fakes)])
        kernel_of = metrics.KernelDistance(fakes, reals, block)
        sums[kernel], found[kernel] = kernel_of(), jackknife(kernel_of, block)
        if moments[fake].count > len(fakes):
            sums[frechet] = metrics.frechet_distance(moments[fake], moments[real])
        else:
            sums[frechet] = metrics.frechet_distance_of(fakes, reals)
            found[frechet] = jackknife(partial(_frechet_of_blocks, fakes, reals, block), block)
        sums["feature_images"] = moments[fake].count
    intervals = {name: one for name, one in found.items() if one}
    return WholeSet(matrices=matrices, segmentation=scores, distances=sums, intervals=intervals)


def _frechet_of_blocks(fakes: np.ndarray, reals: np.ndarray, block: np.ndarray, kept: np.ndarray) -> float:
    rows = kept[block]
    return metrics.frechet_distance_of(fakes[rows], reals[rows])


def _score_intervals(
    prefix: str, counts: np.ndarray, block: np.ndarray, names: Iterable[str]
) -> dict[str, Interval | None]:
    """The intervals of a matrix's scores. `counts`: `segmentation_counts` of each image, (N, 3, classes)."""
    sums = np.zeros((int(block.max()) + 1, *counts.shape[1:]))
    np.add.at(sums, block, counts)

    def score(name: str, kept: np.ndarray) -> float:
        return metrics.segmentation_scores(sums[kept].sum(0)).get(name, math.nan)

    return {prefix + name: jackknife(partial(score, name), block) for name in names}


def _prefix(matrix: str, matrices: Collection[str]) -> str:
    """What distinguishes the scores of a matrix: nothing for the main ones of the generated images."""
    own = "generated" if "generated" in matrices else "palette"
    return "" if matrix == own else f"{matrix}_"


def segmentation_names(matrices: Collection[str]) -> list[str]:
    """The names of the scores of these matrices."""
    return [_prefix(matrix, matrices) + name for matrix in matrices for name in metrics.SEGMENTATION_SCORES]


def segmentation(summary: Mapping[str, Any]) -> dict[str, float]:
    """The scores of segmentation by the names of `headline`."""
    matrices = summary.get("segmentation", {})
    return {_prefix(m, matrices) + name: v for m, scores in matrices.items() for name, v in scores.items()}


def headline(summary: Mapping[str, Any]) -> dict[str, float]:
    """The few numbers by which runs are compared; `l1_low` and `l1_high` are the ends of `l1`'s interval."""
    numbers = {name: float(value) for name, value in summary.items() if isinstance(value, float)}
    ends = {
        f"{name}_{end}": float(bound)
        for name, pair in summary.get("intervals", {}).items()
        for end, bound in zip(BOUNDS, pair, strict=True)
    }
    for baseline, means in summary["baselines"].items():
        numbers |= {f"{baseline}_l1": float(means["l1"])} if "l1" in means else {}
    return numbers | segmentation(summary) | ends


def shown(numbers: Mapping[str, float], name: str) -> str:
    """A number of `headline` as text, with its interval if it has one; "" if it is absent."""
    if name not in numbers:
        return ""
    low, high = (numbers.get(f"{name}_{end}") for end in BOUNDS)
    between = "" if low is None or high is None else f" ({low:.4g} to {high:.4g})"
    return f"{numbers[name]:.4g}{between}"


def is_bound(name: str) -> bool:
    """Whether a number of `headline` is the end of another's interval."""
    return name.endswith(tuple(f"_{end}" for end in BOUNDS))


def of_images(uri: str, metric: str) -> pa.Table | None:
    """A metric in `metrics.parquet` as {key, group, metric}; None if it is of no single image."""
    table = storage.read_parquet(uri)
    return table.select(["key", "group", metric]) if metric in table.column_names else None


def difference_of(uri: str, other: str, metric: str) -> Interval | None:
    """`difference` of a metric in two `metrics.parquet`; None if it is of no single image, or too few."""
    ours, theirs = of_images(uri, metric), of_images(other, metric)
    return None if ours is None or theirs is None else difference(ours, theirs, metric)
