"""The one place that maps work over the cluster, on Ray Data.

    for result in each(list_files, units, stage="ingest"): ...               tasks: any process, one item each
    for row in on_actors(InferenceWorker, job, units, stage="infer", ...):   actors that hold a model

Items and results are plain Python values that can be pickled (dataclasses, dicts, arrays). At most as many
are in flight as the cluster can run, and results wait for the reader. A process that dies is replaced and its
item is done again, so a task must be one that may be repeated. An error of ours arrives as the same error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import ray
import ray.data
from ray.data import ActorPoolStrategy
from ray.exceptions import RayError

from stages.base import Resources
from stages.errors import PixloomError, StageError, full_disk, innermost, one_line
from stages.parallel.threads import own_cores

Item = TypeVar("Item")
Value = TypeVar("Value")

UNITS_AT_ONCE = 2
"""Units in an actor's hands: one is read or written while the other is computed."""

MAX_BLOCKS = 4096
"""Blocks of one Ray Data run: its cost grows with them."""


def each(
    task: Callable[[Item], Value],
    items: Sequence[Item],
    *,
    stage: str,
    num_cpus: float = 1,
    blocks: int = MAX_BLOCKS,
) -> Iterator[Value]:
    """`task(item)` for every item, in no order, by tasks on the cluster; Ray's dashboard names them `stage`.

    num_cpus   what one task takes of the cluster: less than 1 for tasks that wait for a store
    blocks     tasks at most: items of one block are done one after the other

    Raises the task's own PixloomError, or StageError naming the stage.
    """
    if not items:
        return

    def run(row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"value": task(row["item"]), "error": None}
        except PixloomError as error:  # as data: Ray would log its traceback and wrap it several times
            return {"value": None, "error": error}

    run.__name__ = stage
    results = ray.data.from_items(
        [{"item": item} for item in items], override_num_blocks=min(len(items), blocks)
    ).map(run, num_cpus=num_cpus)
    try:
        for row in results.iter_rows():
            if row["error"] is not None:
                raise row["error"]
            yield cast(Value, row["value"])
    except RayError as error:
        raise failure(stage, error) from error


def on_actors(
    worker: type, job: Any, units: Sequence[int], *, stage: str, most: int, gpu: bool
) -> Iterator[dict[str, Any]]:
    """The rows of a worker class for all units, in no order.

    The class is built once a process as `worker(job=job)` and called with {"unit": array}; units are small
    numbers whose meaning is in the job. Raises the worker's own PixloomError, or StageError.
    """
    most = max(1, min(most, len(units)))
    for start in range(0, len(units), MAX_BLOCKS * 64):
        chunk = units[start : start + MAX_BLOCKS * 64]
        rows = ray.data.from_items(
            [{"unit": unit} for unit in chunk], override_num_blocks=min(len(chunk), MAX_BLOCKS)
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
    inner = innermost(error)
    if isinstance(inner, PixloomError):
        return type(inner)(str(inner))
    if full:
        return StageError(f"{stage}: {full}")
    return StageError(f"{stage}: a worker process failed: {one_line(inner, kind=True)}")


def uses_gpu(resources: Resources) -> bool:
    """Whether to work on GPUs: as configured, else if the cluster has any."""
    return ray.cluster_resources().get("GPU", 0) > 0 if resources.gpu is None else resources.gpu


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
