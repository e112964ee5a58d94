"""The nightly benchmark: its figures are where the others print them, its picture shows every point."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import data, nightly


def test_a_ratio_is_read_where_a_benchmark_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    data.show(
        {"torch DataLoader, 2 workers": [10.0, 10.0], "feed": [40.0, 60.0]}, "torch DataLoader, 2 workers"
    )
    printed = capsys.readouterr().out
    assert nightly.ratio_in(printed, nightly.MEASURES["training input"][1]) == 5
    with pytest.raises(ValueError, match="feed"):
        nightly.ratio_in("nothing", nightly.MEASURES["training input"][1])


def test_the_picture_has_every_processor_and_every_point(tmp_path: Path) -> None:
    points = [
        {
            "time": f"2026-01-0{day}T02:00:00+00:00",
            "processor": place,
            "ratios": dict.fromkeys(nightly.MEASURES, 1.5),
        }
        for day in (1, 2)
        for place in ("one", "other")
    ]
    nightly.draw(points[:2], tmp_path / "two.png")
    nightly.draw(points, tmp_path / "four.png")
    two, four = (np.asarray(Image.open(tmp_path / name)) for name in ("two.png", "four.png"))
    assert (two != 255).mean() < (four != 255).mean()
