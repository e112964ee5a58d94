"""The scores as files: a part for each unit of work, and what all parts together say.

part-<unit>.parquet    a row an image: key, split, group, its pair's place, every metric, every baseline's
part-<unit>.npz        confusion matrices and feature vectors of the unit's images
metrics.parquet        the rows of all parts

Parts are added in unit order, so that the sums do not depend on how many processes wrote them.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages import storage
from stages.scoring import metrics
from stages.scoring.metrics import Moments, Sums

BASELINES = ("mean_target", "untrained", "nearest")
MAX_GROUPS = 200  # groups in summary.json; more are no summary
KID_IMAGES = 10_000

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
    generated_features: list[np.ndarray] = field(default_factory=list)
    target_features: list[np.ndarray] = field(default_factory=list)
    matrices: dict[str, np.ndarray] = field(default_factory=dict)

    def add_matrix(self, name: str, matrix: np.ndarray) -> None:
        """Add an image's confusion matrix to the unit's."""
        self.matrices[name] = self.matrices.get(name, 0) + matrix

    def write(self, part: str) -> None:
        """Write the sums, then the table part whose presence means that the unit is finished."""
        arrays = {f"matrix_{name}": matrix for name, matrix in self.matrices.items()}
        if self.generated_features:
            arrays["fake"] = np.stack(self.generated_features)
            arrays["real"] = np.stack(self.target_features)
        if arrays:
            sink = io.BytesIO()
            np.savez(sink, **arrays)  # type: ignore[arg-type]
            storage.write_bytes(_sums_uri(part), sink.getvalue())
        scores = {name: pa.float64() for row in self.rows for name in row if name not in ROW_FIELDS}
        storage.write_parquet(part, pa.Table.from_pylist(self.rows, schema=pa.schema(ROW_FIELDS | scores)))


def _sums_uri(part: str) -> str:
    return f"{part.removesuffix('.parquet')}.npz"


# -- one number of many -----------------------------------------------------------------------------


def summarise(rows: Iterator[Mapping[str, Any]], names: list[str]) -> dict[str, Any]:
    """The summary of rows in order: means and deviations of the model, means of baselines and groups."""
    model, groups = Sums(), dict[str, Sums]()
    baselines = {name: Sums() for name in BASELINES}
    counts: Counter[str] = Counter()
    for row in rows:
        if row["error"] is not None:
            counts["missing"] += 1
            continue
        counts["images"] += 1
        scores = {name: row[name] for name in names if row.get(name) is not None}
        model.add(scores)
        for group in dict.fromkeys((row["split"], "/".join(filter(None, (row["split"], row["group"]))))):
            if group in groups or len(groups) < MAX_GROUPS:
                groups.setdefault(group, Sums()).add({**scores, "_": 1.0})
        for baseline, sums in baselines.items():
            columns = {name: row.get(f"{baseline}_{name}") for name in metrics.PIXEL_METRICS}
            values = {name: value for name, value in columns.items() if value is not None}
            if values:
                sums.add({**values, "_": 1.0})
    means = model.means()
    return {
        **{name: means[name] for name in names if name in means},
        "num_images": counts["images"],
        "num_missing": counts["missing"],
        "deviations": model.deviations(),
        "baselines": {name: _means_and_count(sums) for name, sums in baselines.items() if sums.count},
        "groups": {name: _means_and_count(sums) for name, sums in sorted(groups.items())},
    }


def _means_and_count(sums: Sums) -> dict[str, float]:
    means = {name: value for name, value in sums.means().items() if name != "_"}
    return {**means, "num_images": sums.count.get("_", 0)}


def merge_parts(parts: Sequence[str], uri: str) -> dict[str, Any]:
    """Write the rows of all parts to one Parquet file and return their summary. Holds one part at a time."""
    schema = pa.unify_schemas([pq.read_schema(io.BytesIO(storage.read_bytes(part))) for part in parts])
    baseline_columns = tuple(f"{baseline}_" for baseline in BASELINES)
    names = [n for n in schema.names if n not in ROW_FIELDS and not n.startswith(baseline_columns)]
    example_missing: str | None = None

    def rows(writer: pq.ParquetWriter) -> Iterator[dict[str, Any]]:
        nonlocal example_missing
        for part in parts:
            table = storage.read_parquet(part)
            for name in schema.names:
                if name not in table.column_names:
                    table = table.append_column(name, pa.nulls(table.num_rows, schema.field(name).type))
            table = table.select(schema.names)
            writer.write_table(table)
            for row in table.to_pylist():
                if row["error"] is not None and example_missing is None:
                    example_missing = f"{row['key']}: {row['error']}"
                yield row

    def write() -> dict[str, Any]:
        with storage.create(uri) as file, pq.ParquetWriter(file, schema) as writer:
            return summarise(rows(writer), names)

    summary = storage.written(write, uri)
    return {**summary, "example_missing": example_missing}


def merge_sums(
    parts: Sequence[str], fid: str = "fid", kid: str = "kid"
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Confusion matrices by name, and the distances of the features of two images or more.

    fid, kid   the names of the Frechet and the kernel distance
    """
    matrices: dict[str, np.ndarray] = {}
    moments: dict[str, Moments] = {}
    vectors: dict[str, list[np.ndarray]] = {"fake": [], "real": []}
    for part in parts:
        if not storage.exists(_sums_uri(part)):
            continue
        with np.load(io.BytesIO(storage.read_bytes(_sums_uri(part)))) as arrays:
            for name, array in arrays.items():
                if name.startswith("matrix_"):
                    matrices[name[7:]] = matrices.get(name[7:], 0) + array
                else:
                    moments.setdefault(name, Moments.empty(array.shape[1])).add(array)
                    if sum(map(len, vectors[name])) < KID_IMAGES:
                        vectors[name].append(array)
    if not moments or moments["fake"].count < 2:
        return matrices, {}
    return matrices, {
        fid: metrics.frechet_distance(moments["fake"], moments["real"]),
        kid: metrics.kernel_distance(np.concatenate(vectors["fake"]), np.concatenate(vectors["real"])),
        "feature_images": moments["fake"].count,
    }


def headline(summary: Mapping[str, Any]) -> dict[str, float]:
    """The few numbers by which runs are compared."""
    numbers = {name: float(value) for name, value in summary.items() if isinstance(value, float)}
    for baseline, means in summary["baselines"].items():
        numbers |= {f"{baseline}_l1": float(means["l1"])} if "l1" in means else {}
    for name, scores in summary.get("segmentation", {}).items():
        prefix = "" if name in ("generated", "palette") else f"{name}_"
        numbers |= {f"{prefix}{key}": float(value) for key, value in scores.items()}
    return numbers
