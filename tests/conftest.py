"""Fixtures shared by all tests: one local Ray, the published tensors where they are at hand."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stores.fixtures import client_options, s3_bucket, s3_store
from tests.support.browser import browser

__all__ = ["browser", "client_options", "s3_bucket", "s3_store"]  # fixtures, found by their names here

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
os.environ.setdefault(
    "RAY_worker_niceness", "0"
)  # at Ray's 15, workers hardly run beside other busy processes

# Started in the background, a shell has SIGINT ignored; tests press Ctrl-C in the processes they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference"


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """Tensors of the published implementations; skips loudly where they are absent."""
    if not REFERENCE.is_dir():
        pytest.skip(f"NOT RUN: needs the research-only material in {REFERENCE}, which is not there")
    return REFERENCE


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """One local Ray for the whole session; its CPUs are logical, so more than the machine has."""
    import ray

    with tempfile.TemporaryDirectory(prefix="rt", dir="/tmp", ignore_cleanup_errors=True) as temp:
        ray.init(
            num_cpus=6,
            include_dashboard=False,
            object_store_memory=300 << 20,
            _temp_dir=temp,
            log_to_driver=False,
        )
        yield
        ray.shutdown()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Networks as small as the tests' lose more by waiting for a second thread than it does for them."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
