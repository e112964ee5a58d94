"""Units of work on a pool of processes that each hold something expensive: a model, a set of networks.

    for row in on_actors(Generator, job, units, most=4, gpu=False): ...

A worker class is built once a process from its job and called with {"unit": array}; units are small numbers,
what they mean is in the job. A process that dies is replaced and its unit is done again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import ray.data
from ray.data import ActorPoolStrategy
from ray.exceptions import RayError

from stages.base import Resources
from stages.errors import PixloomError, StageError, full_disk

UNITS_AT_ONCE = 2
"""Units in a process's hands: one is read or written while the other is computed."""

BLOCKS = 4096  # units Ray Data is told of at once, in blocks of its own


def on_actors(
    worker: type, job: Any, units: Sequence[int], *, stage: str, most: int, gpu: bool
) -> Iterator[dict[str, Any]]:
    """The worker's rows for all units, in no order. Raises the worker's PixloomError, or StageError."""
    most = max(1, min(most, len(units)))
    for start in range(0, len(units), BLOCKS * 64):
        chunk = units[start : start + BLOCKS * 64]
        rows = ray.data.from_items(
            [{"unit": unit} for unit in chunk], override_num_blocks=min(len(chunk), BLOCKS)
        ).map_batches(
            worker,
            fn_constructor_kwargs={"job": job},
            batch_size=1,
            batch_format="numpy",
            num_cpus=0.5,  # actors that held all logical CPUs would leave none for Ray Data's own tasks
            num_gpus=1 if gpu else None,
            compute=ActorPoolStrategy(
                min_size=1,
                max_size=most,
                initial_size=most if len(chunk) >= 2 * most else 1,
                max_tasks_in_flight_per_actor=3,
                max_concurrent_calls_per_actor=UNITS_AT_ONCE,
                enable_true_multi_threading=True,
            ),
        )
        try:
            yield from rows.iter_rows()
        except RayError as error:
            raise failure(stage, error) from error


def failure(stage: str, error: BaseException) -> PixloomError:
    """The error of ours that Ray wrapped, or a StageError naming the innermost cause."""
    full = full_disk(error)
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, PixloomError):
            return type(inner)(str(inner))
        error, inner = inner, getattr(inner, "cause", None) or inner.__cause__
    if full:
        return StageError(f"{stage}: {full}")
    told = str(error).strip().splitlines() or [type(error).__name__]
    return StageError(f"{stage}: the processes that do the work failed: {told[-1][:300]}")


def uses_gpu(resources: Resources) -> bool:
    """Whether to work on GPUs: as configured, else if the cluster has any."""
    return ray.cluster_resources().get("GPU", 0) > 0 if resources.gpu is None else resources.gpu


def own_cores() -> int:
    """Cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pool_size(resources: Resources, *, gpu: bool) -> int:
    """Processes at most: as configured, else one a GPU, or one for every two cores."""
    if resources.infer_actors is not None:
        return resources.infer_actors
    if gpu:
        return max(1, int(ray.cluster_resources().get("GPU", 1)))
    nodes = [node for node in ray.nodes() if node["Alive"]]
    # of a single machine Ray may have been told more CPUs than it has
    cores = own_cores() if len(nodes) == 1 else int(ray.cluster_resources().get("CPU", 1))
    return max(1, cores // 2)


def threads(resources: Resources, processes: int) -> int:
    """Torch threads of one of so many processes."""
    return resources.threads_per_worker or max(1, own_cores() // processes)
