"""The one place that starts work on the cluster: on Ray Data, but for the two below.

    for result in each(list_files, units, stage="ingest"): ...               tasks: any process, one item each
    for unit, counts in on_actors(Worker, job, units, stage="infer", ...):   actors that hold a model
    for table in in_order(read, chunks, stage="train-input", at_once=2): ... tasks, in order, without end
    for name, answer in on_every_node(look, item, timeout_s=120): ...        a task on each node
    mailbox = service(Mailbox)                                               one actor that is always there

Items and results are any Python values that can be pickled. At most as many are in flight as the cluster can
run, and results wait for the reader. A process that dies is replaced and its item is done again, so a task
must be one that may be repeated. An error of ours arrives as the same error.
"""

from __future__ import annotations

import itertools
import logging
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import ray
import ray.data
from ray import cloudpickle
from ray.data import ActorPoolStrategy
from ray.exceptions import RayError, RayTaskError
from ray.util.debug import log_once
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from stages.base import Resources
from stages.errors import PixloomError, StageError, full_disk, innermost, one_line
from stages.parallel.threads import own_cores

Item = TypeVar("Item")
Value = TypeVar("Value")
Job = TypeVar("Job")

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
    data.set_name(stage)
    yield from _values(stage, data)


def in_order(
    task: Callable[[Item], Iterator[Value]], items: Iterable[Item], *, stage: str, at_once: int
) -> Iterator[Value]:
    """Yields what `task(item)` yields for every item, in order, read ahead by plain tasks of Ray.

    The tasks reserve no CPU: they are to wait for a store, and those that train may hold every CPU. The items
    may have no end. Arrays and tables are views of Ray's object store.

    Not a pipeline of Ray Data: its scheduler polls without pause while its output is waited for, which took
    0.7 of a core, and the interpreter, from the process that trains.

    at_once   tasks that run, or whose values wait

    Raises the task's own PixloomError, in one line, or RayError.
    """
    ahead = ray.remote(num_cpus=0, num_returns="streaming")(task).options(name=stage)
    remaining = iter(items)
    running = deque(ahead.remote(item) for item in itertools.islice(remaining, at_once))
    while running:
        try:
            yield from map(ray.get, running[0])
        except RayTaskError as error:
            if isinstance(error.cause, PixloomError):  # its one line, without what Ray adds to the text
                raise type(error.cause)(one_line(error.cause, limit=1000)) from error
            raise
        running.popleft()
        running.extend(ahead.remote(item) for item in itertools.islice(remaining, 1))


def on_actors(
    worker: Callable[[Job], Callable[[int], Value]],
    job: Job,
    units: Sequence[int],
    *,
    stage: str,
    most: int,
    gpu: bool,
) -> Iterator[tuple[int, Value]]:
    """Yields each work unit and what a worker returned for it, in no order; Ray shows it as `stage`.

    Each process builds `worker(job)` once and calls it with units: numbers whose meaning is in the job.
    Raises as `each` does.

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
        data.set_name(stage)
        yield from _values(stage, data)


class _Actor:
    """A worker in its process."""

    def __init__(self, worker: type, job: Any, stage: str) -> None:
        self.stage = stage
        self.worker: Any = None
        self.error: PixloomError | None = None
        try:
            self.worker = worker(job)
        except Exception as error:  # raised at the first call, which can return it
            self.error = failure(stage, error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"result": [_result(self.stage, lambda: self._call(int(batch["unit"][0])))]}

    def _call(self, unit: int) -> tuple[int, Any]:
        if self.error is not None:
            raise self.error
        return unit, self.worker(unit)


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


def service(kind: type) -> Any:
    """An actor of a class, on this node; if that node alone is lost, Ray starts it again on another one."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return (
        ray.remote(kind)
        .options(
            num_cpus=0, scheduling_strategy=here, max_concurrency=1, max_restarts=-1, max_task_retries=-1
        )
        .remote()
    )


def on_every_node(
    task: Callable[[Item], Value], item: Item, *, timeout_s: float
) -> Iterator[tuple[str, Callable[[], Value]]]:
    """Yields, for every node, its host name and a function that waits for `task(item)` there.

    That function raises what the task raised, or GetTimeoutError.
    """
    ask = ray.remote(num_cpus=0)(task)
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            answer = ask.options(scheduling_strategy=there).remote(item)
            yield node["NodeManagerHostname"], partial(ray.get, answer, timeout=timeout_s)


def set_up_data() -> None:
    """Switch off Ray Data's own progress bars and plans: stages log their progress themselves."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.issue_detectors_config.detectors = []  # they report a process that generates for its memory
    # Of a pool's processes, each has 3 units in hand and works at 2: at Ray's own 1.75 no pool would grow.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.5
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    log_once("ray_data_progress_manager_disabled")  # Ray Data would warn once that its bars are off


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
