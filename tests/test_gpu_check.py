"""The GPU's one script runs to its end on a CPU, with the few packages that a machine with a GPU may have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics.functional.image as tmi
from PIL import Image

from benchmarks import gpu_check

ABSENT = ("ray", "mlflow", "pyarrow", "s3fs", "isal", "obstore", "fsspec", "pandas", "psutil", "torchmetrics")


def without(packages: Sequence[str], folder: Path) -> dict[str, str]:
    """The environment of a process in which none of these packages can be imported."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({packages}))\n")
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}."}


def facades(folder: Path) -> Path:
    """Two random images to train on and two to test."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 256, 512, 3), np.uint8)
    for split, first in (("train", 0), ("test", 2)):
        (folder / split).mkdir(parents=True)
        for index in (1, 2):
            Image.fromarray(pixels[first + index - 1]).save(folder / split / f"{index}.jpg")
    return folder


def test_every_part_runs_to_its_end_without_ray_and_the_data_libraries(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--tiny", "--epochs", "1"]
    command += ["--keep", "0", "--out", str(out), "--facades", str(facades(tmp_path / "facades"))]
    environment = without(ABSENT, tmp_path / "packages")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((out / "gpu.json").read_text())
    assert [row for row in rows if "failed" in row] == []
    assert {row["part"] for row in rows} == {"machine", *gpu_check.PARTS} - {"compiled", "graph"}
    assert "skipped" in next(row["result"] for row in rows if row["part"] == "tests")
    assert len([row for row in rows if row["part"] == "train"]) == 2 * 6
    assert next(row for row in rows if row["part"] == "facades")["steps"] == 2
    assert (out / "facades.png").exists()
    table = (out / "gpu.md").read_text()
    assert "**train**" in table
    assert "| ours bf16 |" in table


def test_the_gpus_tests_of_loop_feed_and_inference_need_neither_ray_nor_s3(tmp_path: Path) -> None:
    """They are collected, that is imported; only what reads or writes Parquet needs pyarrow and fsspec."""
    packages = [name for name in ABSENT if name not in ("pyarrow", "fsspec")]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "--collect-only", "-q"]
    environment = without(packages, tmp_path / "packages")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("loop", "feed", "gradients", "inference", "step"):
        assert f"test_{name}.py: " in done.stdout


def test_a_failure_is_a_row_and_the_next_part_runs(tmp_path: Path) -> None:
    report = gpu_check.Report(tmp_path, torch.device("cpu"), 1.0)
    with report.trying("train", case="one"):
        raise RuntimeError("no such kernel")
    report.add("infer", ms=1.5)
    rows = json.loads((tmp_path / "gpu.json").read_text())
    assert rows[0]["failed"].endswith("no such kernel")
    assert rows[1] == {"part": "infer", "ms": 1.5}


def test_scores_are_those_of_the_evaluation() -> None:
    fake, real = (torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8) for _ in range(2))
    scores = gpu_check.scores(fake, real)
    x, y = fake.double() / 255, real.double() / 255
    assert scores["ssim"] == pytest.approx(
        float(tmi.structural_similarity_index_measure(x, y, data_range=1.0)), abs=1e-6
    )
    psnr = [float(tmi.peak_signal_noise_ratio(a, b, data_range=1.0)) for a, b in zip(x, y, strict=True)]
    assert scores["psnr"] == pytest.approx(sum(psnr) / 2)
