"""The tests of the GPU path pass on a pretended GPU: what they call exists, and nothing is read too early."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import pytest

from tests.support import pretended_gpu, pretended_memory


@pytest.mark.parametrize(
    "parts",
    [("test_step", "test_loop"), ("test_feed", "test_inference", "test_scoring")],
    ids=["training", "inference"],
)
def test_the_tests_of_a_gpu_pass_on_a_pretended_one(parts: Sequence[str]) -> None:
    """Steps, a phase that is resumed, its checkpoints; the feed, generating, scoring. In float32: faster."""
    if lacking := pretended_gpu.unavailable():
        pytest.skip(f"NOT RUN: {lacking}")
    files = [f"tests/gpu/{part}.py" for part in parts]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "-k", "not bf16", *files],
        env={**os.environ, pretended_memory.VARIABLE: "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
