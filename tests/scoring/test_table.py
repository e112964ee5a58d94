"""The tables of scores: what the summary counts and averages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from stages import storage
from stages.scoring import metrics, table
from stages.scoring.intervals import interval
from stages.scoring.table import ROW_FIELDS, UnitScores, headline, merge_parts, shown, summarise


def row(group: str, l1: float | None, base: float | None = None) -> dict[str, Any]:
    error = None if l1 is not None else "missing"
    return {"split": "test", "group": group, "error": error, "l1": l1, "mean_target_l1": base}


def scores(*rows: dict[str, Any]) -> pa.Table:
    floats = [("l1", pa.float64()), ("mean_target_l1", pa.float64())]
    texts = [(name, ROW_FIELDS[name]) for name in ("split", "group", "error")]
    return pa.Table.from_pylist(list(rows), schema=pa.schema(texts + floats))


def test_a_summary_counts_what_is_missing_and_means_what_is_there() -> None:
    summary = summarise(scores(row("a", 0.1, 0.4), row("b", 0.3, 0.2), row("b", None), row("", 0.2)), ["l1"])
    assert summary["l1"] == pytest.approx(0.2)
    assert (summary["num_images"], summary["num_missing"]) == (3, 1)
    base = summary["baselines"]["mean_target"]
    assert (base["l1"], base["num_images"]) == (pytest.approx(0.3), 2)
    assert base["differences"]["l1"].mean == pytest.approx(-0.1)
    assert summary["groups"]["test"]["num_images"] == 3
    assert summary["groups"]["test/b"]["l1"] == 0.3
    assert set(summary["groups"]) == {"test", "test/a", "test/b"}


def test_every_mean_has_its_interval_and_the_headline_its_ends() -> None:
    summary = summarise(scores(*(row("", i / 20, 0.7 - i / 20) for i in range(20))), ["l1"])
    low, high = summary["intervals"]["l1"]
    assert low < summary["l1"] < high
    assert summary["groups"]["test"]["intervals"]["l1"] == (low, high)
    assert set(summary["baselines"]["mean_target"]["intervals"]) == {"l1"}
    numbers = headline(summary)
    assert (numbers["l1_low"], numbers["l1_high"]) == (low, high)
    assert shown(numbers, "l1") == f"{summary['l1']:.4g} ({low:.4g} to {high:.4g})"
    assert (shown({"fid": 3.0}, "fid"), shown(numbers, "fid")) == ("3", "")


def test_groups_beyond_the_limit_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "MAX_GROUPS", 3)
    summary = summarise(scores(*(row(f"g{i}", 0.5) for i in range(9))), ["l1"])
    assert list(summary["groups"]) == ["test", "test/g0", "test/g1"]


def test_parts_of_different_columns_are_one_table(tmp_path: Path) -> None:
    parts = [str(tmp_path / f"part-{unit}.parquet") for unit in range(2)]
    known = {**dict.fromkeys(ROW_FIELDS), "split": "test", "group": ""}
    UnitScores(rows=[known | {"key": "a", "l1": 0.25, "nearest_l1": 0.5}]).write(parts[0])
    UnitScores(rows=[known | {"key": "b", "l1": 0.75}, known | {"key": "c", "error": "gone"}]).write(parts[1])
    summary, groups = merge_parts(parts, str(tmp_path / "metrics.parquet"))
    assert (summary["l1"], summary["example_missing"]) == (0.5, "c: gone")
    assert summary["baselines"]["nearest"]["num_images"] == 1
    assert len(groups) == 2
    merged = storage.read_parquet(str(tmp_path / "metrics.parquet"))
    assert merged["key"].to_pylist() == ["a", "b", "c"]
    assert merged["nearest_l1"].to_pylist() == [0.5, None, None]


def test_each_networks_features_have_their_own_distances_over_all_parts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    parts = [str(tmp_path / f"part-{number}.parquet") for number in range(2)]
    every: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"inception": [], "other": []}
    for part in parts:
        unit = UnitScores(rows=[{"key": "a", "l1": 0.5}])
        for (network, vectors), size in zip(every.items(), (3, 5), strict=True):
            vectors.append((rng.normal(size=(4, size)), rng.normal(size=(4, size))))
            unit.add_features(network, *vectors[-1])
        unit.write(part)
    names = {"inception": ("fid", "kid"), "other": ("frechet_other", "kernel_other")}
    sums = table.merge_sums(parts, names, np.zeros(8)).distances
    assert set(sums) == {"fid", "kid", "frechet_other", "kernel_other", "feature_images"}
    for network, vectors in every.items():
        fake, real = (np.concatenate(side) for side in zip(*vectors, strict=True))
        assert sums[names[network][1]] == pytest.approx(metrics.KernelDistance(fake, real)())
    assert sums["feature_images"] == 8
    assert all(metrics.lower_is_better(name) for name in sums if name != "feature_images")


def test_distances_and_scores_of_segmentation_have_intervals_over_images_or_groups(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    parts = [str(tmp_path / f"part-{number}.parquet") for number in range(3)]
    every: list[np.ndarray] = []
    for part in parts:
        unit = UnitScores(rows=[{"key": "a", "l1": 0.5}])
        unit.add_features("net", rng.normal(size=(20, 6)), rng.normal(size=(20, 6)))
        for _ in range(20):
            every.append(metrics.confusion(rng.integers(2, size=50) * rng.integers(2), np.ones(50), 2))
            for name in ("generated", "target"):
                unit.add_matrix(name, every[-1])
        unit.write(part)
    names = {"net": ("frechet_net", "kernel_net")}
    alone = table.merge_sums(parts, names, np.zeros(60))
    scores = alone.segmentation["generated"]
    assert set(alone.intervals) == {"frechet_net", "kernel_net", *scores, *(f"target_{n}" for n in scores)}
    for name, one in alone.intervals.items():
        assert one.low < one.mean < one.high
        assert one.mean == {**alone.distances, **scores, f"target_{name[7:]}": one.mean}[name]
    # accuracy is a mean over images of one size: its interval is that of a mean
    accuracy = np.array([np.diag(matrix).sum() / 50 for matrix in every])
    assert alone.intervals["pixel_accuracy"][1:] == pytest.approx(interval(accuracy)[1:], abs=0.03)
    grouped = table.merge_sums(parts, names, np.repeat(np.arange(4), 15))
    assert grouped.distances == pytest.approx(alone.distances)
    assert all(grouped.intervals[name] != one for name, one in alone.intervals.items())
    summary = {"baselines": {}, "segmentation": alone.segmentation, "intervals": alone.intervals}
    summary["intervals"] = {name: (one.low, one.high) for name, one in alone.intervals.items()}
    numbers = headline(summary)
    assert numbers["mean_iou_low"] < numbers["mean_iou"] < numbers["mean_iou_high"]


def test_of_more_images_than_are_kept_the_frechet_distance_has_no_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "KID_IMAGES", 30)
    rng = np.random.default_rng(0)
    parts = [str(tmp_path / f"part-{number}.parquet") for number in range(2)]
    for part in parts:
        unit = UnitScores(rows=[{"key": "a", "l1": 0.5}])
        unit.add_features("net", rng.normal(size=(40, 6)), rng.normal(size=(40, 6)))
        unit.write(part)
    whole = table.merge_sums(parts, {"net": ("frechet", "kernel")}, np.zeros(80))
    assert whole.distances["feature_images"] == 80
    assert set(whole.intervals) == {"kernel"}
