"""The one place that maps work over the cluster, on Ray Data.

    for result in each(list_files, units, stage="ingest"): ...               tasks: any process, one item each
    for row in on_actors(InferenceWorker, job, units, stage="infer", ...):   actors that hold a model

Items and results are any Python values that can be pickled. At most as many are in flight as the cluster can
run, and results wait for the reader. A process that dies is replaced and its item is done again, so a task
must be one that may be repeated. An error of ours arrives as the same error.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import ray
import ray.data
from ray import cloudpickle
from ray.data import ActorPoolStrategy
from ray.exceptions import RayError

from stages.base import Resources
from stages.errors import PixloomError, StageError, full_disk, innermost, one_line
from stages.parallel.threads import own_cores

Item = TypeVar("Item")
Value = TypeVar("Value")

UNITS_AT_ONCE = 2
"""Work units an actor has in hand: one is read or written while the other is computed."""

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
    """Yields `task(item)` for every item, in no order, from tasks on the cluster; Ray shows them as `stage`.

    num_cpus   CPUs that one task reserves: less than 1 for tasks that wait for a store
    blocks     most tasks to make; the items of one block are done one after the other

    Raises the task's own PixloomError, or StageError naming the stage.
    """
    if not items:
        return

    def run(row: dict[str, Any]) -> dict[str, Any]:
        return {"result": _result(stage, lambda: task(cloudpickle.loads(row["item"])))}

    run.__name__ = stage
    # Pickled here, since Arrow turns tuples into lists and gives all dicts of a column the same keys.
    rows = [{"item": cloudpickle.dumps(item)} for item in items]
    data = ray.data.from_items(rows, override_num_blocks=min(len(items), blocks)).map(run, num_cpus=num_cpus)
    yield from cast(Iterator[Value], _values(stage, data))


def on_actors(
    worker: type, job: Any, units: Sequence[int], *, stage: str, most: int, gpu: bool
) -> Iterator[dict[str, Any]]:
    """Yields the rows that a worker class returns for all work units, in no order; Ray shows it as `stage`.

    Each process builds `worker(job=job)` once and calls it with {"unit": array of one}; it returns columns of
    one row. Units are numbers whose meaning is in the job. Raises as `each` does.

    most   processes at most
    """
    most = max(1, min(most, len(units)))
    for start in range(0, len(units), MAX_BLOCKS * 64):
        chunk = units[start : start + MAX_BLOCKS * 64]
        data = ray.data.from_items(
            [{"unit": unit} for unit in chunk], override_num_blocks=min(len(chunk), MAX_BLOCKS)
        ).map_batches(
            type(stage, (_Actor,), {}),
            fn_constructor_kwargs={"worker": worker, "job": job, "stage": stage},
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
        for columns in _values(stage, data):
            yield {name: column[0] for name, column in columns.items()}


class _Actor:
    """A worker in its process."""

    def __init__(self, worker: type, job: Any, stage: str) -> None:
        self.stage = stage
        self.worker: Any = None
        self.error: PixloomError | None = None
        try:
            self.worker = worker(job=job)
        except Exception as error:  # raised at the first call, which can return it
            self.error = failure(stage, error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"result": [_result(self.stage, lambda: self._call(batch))]}

    def _call(self, batch: dict[str, Any]) -> Any:
        if self.error is not None:
            raise self.error
        return self.worker(batch)


def _result(stage: str, call: Callable[[], Any]) -> bytes:
    """What a call returned or raised, pickled. Ray Data itself loses the type and text of what was raised."""
    try:
        return cast(bytes, cloudpickle.dumps((call(), None)))
    except Exception as error:
        ours = failure(stage, error)
        if ours is not error:
            ours.add_note(traceback.format_exc())
        return cast(bytes, cloudpickle.dumps((None, ours)))


def _values(stage: str, data: Any) -> Iterator[Any]:
    """The values in a data set of results, as they come. Raises the first error."""
    try:
        for row in data.iter_rows():
            value, error = cloudpickle.loads(row["result"])
            if error is not None:
                raise error
            yield value
    except RayError as error:
        raise failure(stage, error) from error


def failure(stage: str, error: BaseException) -> PixloomError:
    """The error of ours, as it is or as Ray wrapped it; else a StageError naming the stage and the cause."""
    if isinstance(error, PixloomError):
        return error
    inner = innermost(error)
    if isinstance(inner, PixloomError):
        return type(inner)(str(inner))
    if full := full_disk(error):
        return StageError(f"{stage}: {full}")
    return StageError(f"{stage}: a worker process failed: {one_line(inner, kind=True)}")


def uses_gpu(resources: Resources) -> bool:
    """Whether to work on GPUs: as configured, else if the cluster has any."""
    return ray.cluster_resources().get("GPU", 0) > 0 if resources.gpu is None else resources.gpu


def pool_size(resources: Resources, *, gpu: bool) -> int:
    """The most processes that hold a model: as configured, else as many as suit the cluster."""
    if resources.infer_actors is not None:
        return resources.infer_actors
    cluster = ray.cluster_resources()
    nodes = sum(bool(node["Alive"]) for node in ray.nodes())
    # On a single machine Ray may be started with more CPUs than the machine has.
    cores = own_cores() if nodes == 1 else int(cluster.get("CPU", 1))
    return processes(gpus=int(cluster.get("GPU", 0)), cores=cores, gpu=gpu)


def processes(*, gpus: int, cores: int, gpu: bool) -> int:
    """The number of processes that suits a cluster: one a GPU, or one for every two cores."""
    return max(1, gpus if gpu else cores // 2)


def threads(resources: Resources, processes: int) -> int:
    """Torch threads of each of so many processes: as configured, else its share of this machine's cores."""
    return resources.threads_per_worker or max(1, own_cores() // processes)
