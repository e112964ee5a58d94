"""The Ray cluster a run computes on: the one it is submitted to, the one `RAY_ADDRESS` names, or its own."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray

from stages import storage
from stages.base import Resources

logger = logging.getLogger(__name__)

QUIET = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a report waits for the next check: 2 s each by default
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@contextmanager
def cluster(resources: Resources, options: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Join or start Ray for a `with` block; what was started here is taken down again, what was joined stays.

    `options`: the config's `storage` section, which every worker gets too.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    environment = storage.worker_environment(options) | {name: os.environ[name] for name in QUIET}
    runtime_env = {"env_vars": environment}
    joined = "RAY_ADDRESS" in os.environ
    if joined:
        ray.init(runtime_env=runtime_env, log_to_driver=False, logging_level=logging.WARNING)
        logger.info("joined the Ray cluster at %s", os.environ["RAY_ADDRESS"])
    else:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        ray.init(
            # Logical CPUs: on a small machine too, training and the reading that feeds it run together.
            num_cpus=max(4, cores + resources.train_workers),
            include_dashboard=False,
            runtime_env=runtime_env,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    try:
        yield
    finally:
        ray.shutdown()
