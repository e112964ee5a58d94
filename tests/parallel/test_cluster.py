"""Work mapped over the cluster, and how many processes do it."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from stages.base import Resources
from stages.errors import StageError, UserError
from stages.parallel import cluster
from stages.parallel.cluster import (
    each,
    in_order,
    on_actors,
    on_every_node,
    pool_size,
    processes,
    threads,
    uses_gpu,
)
from stages.parallel.threads import own_cores


@dataclass(frozen=True)
class Span:
    """An item of a type that Arrow does not know."""

    start: int
    stop: int


def numbers(span: Span) -> dict[str, Any]:
    """A value of types that Arrow would change: a tuple, a key of its own, an array, a set."""
    return {
        "bounds": (span.start, str(span.stop)),
        f"from_{span.start}": None,
        "values": np.arange(span.start, span.stop, dtype=np.uint16),
        "ends": {span.stop},
    }


@pytest.mark.ray
def test_values_come_back_as_the_task_returned_them(ray_local: None) -> None:
    spans = [Span(n, n + 3) for n in range(20)]
    values = sorted(each(numbers, spans, stage="count"), key=lambda value: value["bounds"][0])
    for value, span in zip(values, spans, strict=True):
        expected = numbers(span)
        assert value.keys() == expected.keys()
        assert value["bounds"] == expected["bounds"]
        assert value["ends"] == expected["ends"]
        assert value["values"].dtype == np.uint16
        assert np.array_equal(value["values"], expected["values"])
    assert list(each(numbers, [], stage="count")) == []
    assert sorted(each(abs, [-1, 2, -3], stage="count", blocks=1, num_cpus=0.5)) == [1, 2, 3]


def refuse(item: int) -> int:
    if item == 1:
        raise UserError("pair.split: no such split\nof two lines")
    return item


def abs_of(item: int) -> int:
    return abs(item)


def divide(item: int) -> float:
    return 1 / item


@pytest.mark.ray
def test_our_errors_arrive_as_they_are_and_others_name_the_stage(ray_local: None) -> None:
    with pytest.raises(UserError) as ours:
        list(each(refuse, [0, 1, 2], stage="pair"))
    assert str(ours.value) == "pair.split: no such split\nof two lines"
    with pytest.raises(
        StageError, match=r"^pair: a worker process failed: ZeroDivisionError: division"
    ) as other:
        list(each(divide, [1, 0], stage="pair"))
    assert "return 1 / item" in other.value.__notes__[0]


def die_once(item: int, folder: str) -> int:
    try:
        Path(folder, str(item)).touch(exist_ok=False)
    except FileExistsError:
        return item
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("killed")


@pytest.mark.ray
def test_the_item_of_a_killed_process_is_done_again(ray_local: None, tmp_path: Path) -> None:
    (tmp_path / "1").touch()
    task = partial(die_once, folder=str(tmp_path))
    assert sorted(each(task, [0, 1], stage="ingest")) == [0, 1]
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


def title(_: int) -> str:
    return " ".join(psutil.Process().cmdline())


class Worker:
    """Returns what it was built with and the unit it was called with."""

    def __init__(self, job: Any) -> None:
        self.job = job
        if job == "cannot start":
            raise UserError("evaluate.lpips: no such file")

    def __call__(self, unit: int) -> dict[str, Any]:
        if self.job == "fail":
            raise UserError("evaluate.lpips: no such file")
        return {"square": unit**2, "job": self.job, "title": title(0)}


@pytest.mark.ray
def test_processes_are_named_after_the_stage(ray_local: None) -> None:
    (text,) = each(title, [0], stage="shard")
    assert "Map(shard)" in text
    ((_, row),) = on_actors(Worker, "job", [7], stage="infer", most=1, gpu=False)
    assert "MapBatches(infer)" in row["title"]


@pytest.mark.ray
def test_actors_do_every_unit_and_their_errors_arrive_as_they_are(ray_local: None) -> None:
    rows = dict(on_actors(Worker, "job", list(range(9)), stage="evaluate", most=2, gpu=False))
    assert {unit: row["square"] for unit, row in rows.items()} == {n: n**2 for n in range(9)}
    assert {row["job"] for row in rows.values()} == {"job"}
    for job in ("cannot start", "fail"):
        with pytest.raises(UserError, match=r"^evaluate\.lpips: no such file"):
            list(on_actors(Worker, job, [1], stage="evaluate", most=2, gpu=False))


def count_up(start: int) -> Iterator[int]:
    for number in range(start, start + 3):  # noqa: UP028  Ray sends to the generator
        yield number
    if start > 90:
        raise UserError("shards/a.parquet: damaged")


@pytest.mark.ray
def test_values_read_ahead_come_in_order_and_errors_in_one_line(ray_local: None) -> None:
    """Of items without end."""
    values = in_order(count_up, itertools.count(0, 3), stage="count", at_once=2)
    assert list(itertools.islice(values, 20)) == list(range(20))
    with pytest.raises(UserError, match=r"^shards/a\.parquet: damaged$"):
        list(in_order(count_up, [99], stage="count", at_once=2))


@pytest.mark.ray
def test_every_node_is_asked(ray_local: None) -> None:
    ((name, answer),) = on_every_node(abs_of, -3, timeout_s=120)
    assert name
    assert answer() == 3


@pytest.mark.parametrize(
    ("gpu", "gpus", "cores", "expected"),
    [
        (False, 0, 1, 1),
        (False, 0, 2, 1),
        (False, 0, 9, 4),
        (False, 8, 64, 32),  # GPUs that are not used do not count
        (True, 1, 64, 1),
        (True, 8, 64, 8),
        (True, 0, 64, 1),  # asked for where there is none: Ray says so
    ],
)
def test_a_process_has_a_gpu_or_two_cores(gpu: bool, gpus: int, cores: int, expected: int) -> None:
    assert processes(gpus=gpus, cores=cores, gpu=gpu) == expected


def test_a_configured_pool_size_is_taken_as_it_is() -> None:
    for gpu in (False, True):
        assert pool_size(Resources(infer_actors=3), gpu=gpu) == 3


@pytest.mark.ray
def test_on_one_machine_the_pool_is_that_of_its_cores_and_not_of_rays_cpus(ray_local: None) -> None:
    assert pool_size(Resources(), gpu=False) == max(1, own_cores() // 2)
    assert not uses_gpu(Resources())
    assert uses_gpu(Resources(gpu=True))
    assert not uses_gpu(Resources(gpu=False))


@pytest.mark.parametrize(
    ("configured", "cores", "processes", "expected"),
    [(None, 2, 1, 2), (None, 2, 2, 1), (None, 2, 5, 1), (None, 16, 5, 3), (4, 2, 5, 4)],
)
def test_threads_share_the_cores_of_a_machine(
    monkeypatch: pytest.MonkeyPatch, configured: int | None, cores: int, processes: int, expected: int
) -> None:
    monkeypatch.setattr(cluster, "own_cores", lambda: cores)
    assert threads(Resources(threads_per_worker=configured), processes) == expected
