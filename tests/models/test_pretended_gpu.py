"""Training steps on a pretended GPU: no mixed devices, no waiting for it, no more work than is stored.

python -m tests.support.pretended_gpu > tests/models/pretended_gpu.json      stores today's counts
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import pretended_gpu

STORED = Path(__file__).with_name("pretended_gpu.json")
MORE = 1.1  # of launches or bytes is too much


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    if lacking := pretended_gpu.unavailable():
        pytest.skip(f"NOT RUN: {lacking}")
    command = [sys.executable, "-m", pretended_gpu.__name__]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return counts


def test_no_step_mixes_devices_or_reads_what_is_on_the_device(found: dict[str, dict[str, Any]]) -> None:
    assert {name: counts["error"] for name, counts in found.items() if "error" in counts} == {}


def test_a_step_launches_and_moves_no_more_than_is_stored(found: dict[str, dict[str, Any]]) -> None:
    stored = json.loads(STORED.read_text())
    assert found.keys() == stored.keys()
    grown = [
        f"{name}: {what} {counts[what]:,}, {stored[name][what]:,} stored"
        for name, counts in found.items()
        for what in ("launches", "bytes")
        if counts[what] > MORE * stored[name][what]
    ]
    assert not grown, f"{grown}; if it is meant, store the counts again"


def test_generating_launches_as_much_for_a_large_batch_as_for_a_small_one(
    found: dict[str, dict[str, Any]],
) -> None:
    few, many = (found[f"generating, U-Net-256, batch {rows}"]["launches"] for rows in (16, 64))
    assert few == many


def test_deterministic_training_finds_kernels_for_all(found: dict[str, dict[str, Any]]) -> None:
    assert {name: counts["refused"] for name, counts in found.items() if counts["refused"]} == {}


def test_images_stay_channels_last_all_the_way(found: dict[str, dict[str, Any]]) -> None:
    """Only the batch itself is copied from one layout to the other; R1's gradients are torch's own."""
    every = [counts["mixed layouts"] for name, counts in found.items() if "R1" not in name]
    assert {name for names in every for name in names} <= {"clone.default"}
