"""The tables of scores: what the summary counts and averages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from stages import storage
from stages.scoring import table
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
    summary = merge_parts(parts, str(tmp_path / "metrics.parquet"))
    assert (summary["l1"], summary["example_missing"]) == (0.5, "c: gone")
    assert summary["baselines"]["nearest"]["num_images"] == 1
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
    _, sums = table.merge_sums(parts, names)
    assert set(sums) == {"fid", "kid", "frechet_other", "kernel_other", "feature_images"}
    for network, vectors in every.items():
        fake, real = (np.concatenate(side) for side in zip(*vectors, strict=True))
        assert sums[names[network][1]] == pytest.approx(table.metrics.kernel_distance(fake, real))
    assert sums["feature_images"] == 8
    assert all(table.metrics.lower_is_better(name) for name in sums if name != "feature_images")
