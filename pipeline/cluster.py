"""The Ray cluster of a run: the one it is submitted to, the one `RAY_ADDRESS` names, or one started here."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import signal
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import AuthenticationError

from pipeline import cli
from pipeline.config import PipelineConfig
from stages import storage
from stages.base import Resources
from stages.config.tracking import sqlite_file
from stages.errors import StageError, UserError, named, one_line
from stages.models.fast import heap
from stages.parallel.cluster import set_up_data
from stages.parallel.threads import own_cores

logger = logging.getLogger(__name__)

QUIET = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a report waits for the next check: 2 s each by default
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Environment variables win over these (setdefault); without this, Ray refuses a job that sets one itself.
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",
}

UNWATCHED = {
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes this machine away with notice
    "REPORTER_UPDATE_INTERVAL_MS": "3600000",
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",  # look for new log files twice a second, not ten times
    "RAY_num_workers_soft_limit": "0",  # idle workers wake 100 times a second, ...
    "RAY_idle_worker_killing_time_threshold_ms": "10000",  # ... so they end after 10 s
}
"""Settings for a cluster we start ourselves. Ray's own monitoring cost 3 % of training time on two cores
(benchmarks/README.md), and without a dashboard nobody would see it."""

LOCK = "pixloom.lock"
EXIT_S = 5.0  # that Ray's processes have to end by themselves


@contextmanager
def cluster(
    resources: Resources, options: Mapping[str, Mapping[str, Any]], folders: Mapping[str, str]
) -> Iterator[None]:
    """Join or start Ray for a `with` block. A Ray started here is stopped at the end; a joined one continues.

    `options`: the config's `storage` section, for every worker. `folders`: see `result_folders`.
    """
    joined = "RAY_ADDRESS" in os.environ
    for name, value in (QUIET if joined else QUIET | UNWATCHED).items():
        os.environ.setdefault(name, value)
    # A node remembers for ten minutes that an environment failed, as on a full disk: each start has its own.
    environment = storage.worker_environment(options) | heap.ENVIRONMENT | {"PIXLOOM_START": uuid.uuid4().hex}
    runtime_env = {"env_vars": environment | {name: os.environ[name] for name in QUIET}}
    if joined:
        _join(os.environ["RAY_ADDRESS"], runtime_env)
        machines = {node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
        for key, folder in folders.items() if len(machines) > 1 else ():
            logger.warning("%s: all %d machines of the cluster must see %s", key, len(machines), folder)
    else:
        others = set(psutil.Process().children())
        # Logical CPUs: training and the tasks that read for it must fit, also on a small machine.
        session = _start(others, max(4, own_cores() + resources.train_workers), runtime_env)
        held = _hold(Path(session))
    cli.stop_on_sigterm()  # Ray has set a handler of its own
    set_up_data()
    try:
        yield
    finally:
        if joined:
            _shut_down()
        else:
            _end(others)
            shutil.rmtree(session, ignore_errors=True)
            os.close(held)


def _hold(session: Path) -> int:
    """Lock a session folder while this process lives, and delete those of processes that were killed.

    The system frees a lock when its process ends: a lock that can be taken proves that no owner is left.
    Returns the descriptor that holds the lock.
    """
    held = os.open(session / "partial", os.O_CREAT | os.O_RDWR, 0o600)
    with suppress(OSError):  # not every file system can
        fcntl.flock(held, fcntl.LOCK_EX)
        (session / "partial").rename(session / LOCK)  # others see it locked, or not at all
    for lock in session.parent.glob(f"session_2*/{LOCK}"):
        with suppress(OSError), lock.open("rb+") as file:  # one of another user, or taken
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
    return held


def _start(
    others: set[psutil.Process], cpus: int, runtime_env: Mapping[str, Any], *, again: bool = True
) -> str:
    """Start Ray on this machine; returns its session folder. Raises StageError if it does not start.

    again   try once more after a failure: Ray gives its processes 30 s, which is short on a busy machine
    """
    try:
        context = ray.init(
            num_cpus=cpus,
            include_dashboard=False,
            runtime_env=dict(runtime_env),
            log_to_driver=False,
            logging_level=logging.ERROR,  # a warning at every start would say that tokens are on
        )
    except BaseException as error:  # Ray has no type of its own for it; Ctrl-C, SIGTERM
        _end(others)
        if not isinstance(error, Exception):
            raise
        reason = f"Ray did not start on this machine: {one_line(error, kind=True)}"
        if not again:
            raise StageError(reason) from error
        logger.warning("%s; trying once more", reason)
        return _start(others, cpus, runtime_env, again=False)
    return str(context.address_info["session_dir"])


def _end(others: set[psutil.Process]) -> None:
    """End the Ray of this process with all its processes.

    A worker can hang for good in the exit handlers of Ray's C++, hundreds of megabytes in hand.

    others   children of this process that are not Ray's
    """
    own = {child for one in set(psutil.Process().children()) - others for child in _family(one)}
    try:
        _shut_down()
    finally:
        for process in psutil.wait_procs(own, timeout=EXIT_S)[1]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _shut_down() -> None:
    """End Ray in this process. Its C++ resets SIGTERM without Python's knowledge."""
    ray.shutdown()
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def _family(process: psutil.Process) -> list[psutil.Process]:
    """A process and all below it."""
    with suppress(psutil.NoSuchProcess):
        return [process, *process.children(recursive=True)]
    return []


def _join(address: str, runtime_env: Mapping[str, Any]) -> None:
    """Connect to a running cluster. Raises UserError naming the address if that fails."""
    try:
        ray.init(runtime_env=dict(runtime_env), log_to_driver=False, logging_level=logging.WARNING)
    except (AuthenticationError, ConnectionError, RuntimeError, ValueError) as error:
        reason = one_line(error)
        raise UserError(f"RAY_ADDRESS={address}: cannot join the Ray cluster there: {reason}") from error
    logger.info("joined the Ray cluster at %s", address)


def result_folders(config: PipelineConfig) -> dict[str, str]:
    """The folders of this machine that a run writes results to, by the config's key."""
    with named("workspace"), storage.located(config.workspace):
        folders = {"workspace": config.workspace} if storage.is_local(config.workspace) else {}
    tracked = sqlite_file(config.tracking.place(config.workspace))
    if config.tracking.enabled and tracked is not None:
        folders["tracking.uri"] = str(tracked)
    return folders


def check_folders(folders: Mapping[str, str], config: str) -> None:
    """Refuse a workspace that is a file, and the folder a job was uploaded as: Ray deletes it after the job.

    Raises UserError naming the config file and the key.
    """
    for key, folder in folders.items():
        if key == "workspace" and Path(folder).is_file():
            raise UserError(f"{config}: workspace: {folder} is a file; name a folder")
        if "runtime_resources" in Path(folder).parts:
            other = "a bucket (s3://...)" if key == "workspace" else "an MLflow server (http://...)"
            raise UserError(
                f"{config}: {key}: {folder} is in the job's uploaded folder, which Ray deletes; "
                f"name {other} or an absolute path that every machine sees"
            )
