"""The Ray cluster a run computes on: the one it is submitted to, the one `RAY_ADDRESS` names, or its own."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.exceptions import AuthenticationError

from pipeline.config import PipelineConfig
from stages import storage
from stages.base import Resources
from stages.errors import UserError
from stages.models.fast import heap

logger = logging.getLogger(__name__)

QUIET = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a report waits for the next check: 2 s each by default
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # A job may set some of these itself. They are kept (setdefault), and Ray does not call it a conflict.
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",
}

UNWATCHED = {
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes this machine away with notice
    "REPORTER_UPDATE_INTERVAL_MS": "3600000",
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",  # looks for new log files twice a second, not ten times
    "RAY_num_workers_soft_limit": "0",  # processes that wait for work, which wake 100 times a second, ...
    "RAY_idle_worker_killing_time_threshold_ms": "10000",  # ... end after 10 s of it, however many cores
}
"""For a cluster of our own, whose processes share the cores with the work, and which has no dashboard to show
what they would measure: on two cores it takes what trains 3 % of the time (benchmarks/README.md)."""


@contextmanager
def cluster(
    resources: Resources, options: Mapping[str, Mapping[str, Any]], folders: Mapping[str, str]
) -> Iterator[None]:
    """Join or start Ray for a `with` block; what was started here is taken down again, what was joined stays.

    `options`: the config's `storage` section, which every worker gets too. `folders`: see `kept_in`.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    environment = storage.worker_environment(options) | heap.ENVIRONMENT
    runtime_env = {"env_vars": environment | {name: os.environ[name] for name in QUIET}}
    joined = "RAY_ADDRESS" in os.environ
    if joined:
        _join(os.environ["RAY_ADDRESS"], runtime_env)
        machines = {node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
        for key, folder in folders.items() if len(machines) > 1 else ():
            logger.warning("%s: all %d machines of the cluster must see %s", key, len(machines), folder)
    else:
        for name, value in UNWATCHED.items():
            os.environ.setdefault(name, value)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        ray.init(
            # Logical CPUs: on a small machine too, training and the reading that feeds it run together.
            num_cpus=max(4, cores + resources.train_workers),
            include_dashboard=False,
            runtime_env=runtime_env,
            log_to_driver=False,
            logging_level=logging.ERROR,  # a warning says at every start that tokens are on
        )
    _quiet_data()
    try:
        yield
    finally:
        ray.shutdown()


def _quiet_data() -> None:
    """Stages say how far they are themselves; Ray Data's own bars and plans would drown that."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.issue_detectors_config.detectors = []  # which find that a process that generates takes memory
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # that it has no bars


def _join(address: str, runtime_env: Mapping[str, Any]) -> None:
    """Connect to a running cluster. Raises UserError naming it where there is none, or it refuses."""
    try:
        ray.init(runtime_env=dict(runtime_env), log_to_driver=False, logging_level=logging.WARNING)
    except (AuthenticationError, ConnectionError, RuntimeError, ValueError) as error:
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"RAY_ADDRESS={address}: cannot join the Ray cluster there: {told[0]}") from error
    logger.info("joined the Ray cluster at %s", address)


def kept_in(config: PipelineConfig) -> dict[str, str]:
    """The folders of this machine that a run keeps results in, by the config's key."""
    kept = {"workspace": config.workspace} if storage.is_local(config.workspace) else {}
    tracked = config.tracking.place(config.workspace)
    if config.tracking.enabled and tracked.startswith("sqlite:///"):
        kept["tracking.uri"] = tracked.removeprefix("sqlite:///")
    return kept


def check_folders(folders: Mapping[str, str], config: str) -> None:
    """Refuse to keep results in the folder a job was uploaded as: it is deleted when no job needs it.

    Raises UserError naming the config file and the key.
    """
    for key, folder in folders.items():
        if "runtime_resources" in Path(folder).parts:
            other = "a bucket (s3://...)" if key == "workspace" else "an MLflow server (http://...)"
            raise UserError(
                f"{config}: {key}: {folder} is in the job's uploaded folder, which Ray deletes; "
                f"name {other} or an absolute path that every machine sees"
            )
