"""The tables of scores: what the summary counts and averages."""

from __future__ import annotations

from typing import Any

import pytest

from stages.scoring.table import summarise


def test_a_summary_counts_what_is_missing_and_means_what_is_there() -> None:
    def row(group: str, l1: float | None, base: float | None = None) -> dict[str, Any]:
        return {
            "split": "test",
            "group": group,
            "error": None if l1 is not None else "missing",
            "l1": l1,
            "mean_target_l1": base,
        }

    summary = summarise(iter([row("a", 0.1, 0.4), row("b", 0.3, 0.2), row("b", None), row("", 0.2)]), ["l1"])
    assert summary["l1"] == pytest.approx(0.2)
    assert (summary["num_images"], summary["num_missing"]) == (3, 1)
    assert summary["baselines"] == {"mean_target": {"l1": pytest.approx(0.3), "num_images": 2}}
    assert summary["groups"]["test"]["num_images"] == 3
    assert summary["groups"]["test/b"]["l1"] == 0.3
