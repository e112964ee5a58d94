"""The control channel: news is recorded once; all workers follow an order alike, after a checkpoint."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from stages.base import Point
from stages.errors import StageError, UserError, cause
from stages.parallel.cluster import failure
from stages.progress import Progress
from stages.training import checkpoints, loop
from stages.training.control import NewsRecorder
from stages.training.loop import Ending, Loop, Task, Worker, train_phase
from stages.training.news import (
    Advance,
    Begin,
    Channel,
    Mailbox,
    News,
    Note,
    Points,
    SampleGrid,
    Saved,
    Stop,
)
from tests.training.test_loop import (
    PatientWriter,
    Rows,
    assert_equal,
    losses,
    nothing,
    phase_jobs,
    task,
    weights,
)

STEPS = 9  # of the phase: 3 epochs of 3 steps


class Recorded:
    """A run that keeps what is recorded."""

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self.pictures: list[int] = []
        self.tagged: dict[str, str] = {}

    def tags(self, values: Mapping[str, str]) -> None:
        self.tagged |= values

    def points(self, points: Sequence[Point]) -> None:
        self.rows += points

    def curves(self, folder: str) -> None:
        self.rows.append(folder)

    def image(self, array: np.ndarray, key: str, step: int) -> None:
        self.pictures.append(step)


def point(step: int, name: str = "generator/gan") -> Point:
    return Point(step, step * 4, 0, name, 1.0, 1000)


# -- news ---------------------------------------------------------------------


def test_news_is_taken_once_and_answered_with_the_order() -> None:
    mailbox = Mailbox()
    channel = Channel(mailbox.post)
    channel.post(Note("hello"))
    assert channel.stop_order() is None
    mailbox.stop("preempted")
    channel.post(Note("again"))
    assert channel.stop_order() == Stop("preempted")
    assert mailbox.take() == [Note("hello"), Note("again")]
    assert mailbox.take() == []


def test_a_permanent_failure_is_the_first_one() -> None:
    mailbox = Mailbox()
    mailbox.give_up(StageError("damaged shard"))
    mailbox.give_up(UserError("something later"))
    assert str(mailbox.permanent_failure()) == "damaged shard"


def test_points_are_recorded() -> None:
    run, points = Recorded(), [point(1), point(2), point(2, "validation/l1")]
    NewsRecorder("train-global", "phase", 100, run).handle([Points(points[:1]), Points(points[1:])])
    assert run.rows == points


def test_how_a_phase_is_computed_is_logged_and_tagged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run = Recorded()
    NewsRecorder("train-global", "phase", 100, run).handle(
        [Begin({"precision": "bf16", "workers": "2 on cuda"})]
    )
    assert run.tagged == {"pixloom.precision": "bf16", "pixloom.workers": "2 on cuda"}
    assert run.rows == ["phase"]  # whose checkpoint may hold points of another command
    assert "precision bf16  workers 2 on cuda" in caplog.text


def test_a_restart_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    NewsRecorder("train-global", "phase", 100, Recorded()).handle(
        [Note("worker 1 was lost", restarts=True), Saved(0.5)]
    )
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", "train-global  worker 1 was lost")
    ]


def test_images_that_a_restart_repeats_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    recorder = NewsRecorder("train-global", "phase", 2000, Recorded())
    recorder.handle([Advance(images, "") for images in (1200, 1500, 200, 1500)])
    assert [record.message for record in caplog.records if "again" in record.message] == [
        "train-global  1,300 images are done again"
    ]


def test_pictures_that_a_restart_repeats_are_recorded_once() -> None:
    run = Recorded()
    grids = [SampleGrid(images, images // 4, np.zeros((2, 2, 3), np.uint8)) for images in (4, 8, 4, 8, 12)]
    NewsRecorder("train", "phase", 100, run).handle(grids)
    assert run.pictures == [1, 2, 3]


def test_the_last_line_of_progress_is_always_written(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    recorder = NewsRecorder("train-global", "phase", 100, Recorded())
    recorder.handle([Advance(40, "epoch 1/2"), Advance(100, "epoch 2/2  G 1")])
    recorder.finish()
    assert "100/100 images" in caplog.text
    assert "epoch 2/2  G 1" in caplog.text


def test_no_line_of_progress_is_said_twice(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for interval in (0.0, 60.0):
        caplog.clear()
        with Progress("infer", total=2, unit="images", interval=interval) as progress:
            progress.advance(2)
        assert caplog.text.count("2/2 images") == 1


def test_a_dead_worker_is_named_in_a_few_words() -> None:
    text = "The actor is dead because its worker process has died. Worker exit type: X Worker exit detail: Y"
    assert cause(ConnectionError(text)) == (
        "ConnectionError: The actor is dead because its worker process has died"
    )
    outer = RuntimeError("outer")
    outer.__cause__ = ValueError("inner\nlast line")
    assert cause(outer) == "ValueError: last line"


def test_a_full_disk_of_rays_is_named_with_its_machine() -> None:
    text = "ray::work() (pid=1, ip=10.0.0.7)\nray.exceptions.OutOfDiskError: Local disk is full"
    wrapped = RuntimeError(text)
    assert cause(wrapped).startswith("Ray's object store on 10.0.0.7 is full")
    assert str(failure("infer", wrapped)).startswith("infer: Ray's object store on 10.0.0.7 is full")


@pytest.mark.parametrize(
    ("module", "absent"), [("stages.training.news", "torch ray"), ("stages.training.control", "torch")]
)
def test_the_mailboxs_process_loads_no_torch(module: str, absent: str) -> None:
    code = f"import sys, {module}; sys.exit(any(name in sys.modules for name in '{absent}'.split()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("module", ["stages.training.loop", "stages.shards.feed"])
def test_the_loop_and_its_feed_need_no_ray(module: str) -> None:
    code = f"import sys, {module}; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- orders -------------------------------------------------------------------


def stop_at(poll: int) -> Callable[[Sequence[News]], Stop | None]:
    """Sends no news; the order to stop comes with the poll of this number, counted from 1."""
    polls = 0

    def send(news: Sequence[News]) -> Stop | None:
        nonlocal polls
        polls += not news
        return Stop("drained") if polls >= poll else None

    return send


def train(
    task: Task,
    worker: Worker | None = None,
    *,
    send: Callable[[Sequence[News]], Stop | None] = lambda _: None,
    warned_at: int = STEPS + 1,
    load: Callable[[], dict[str, float]] = dict,
) -> Ending:
    """A phase in this process, whose machines are to be taken away from the poll `warned_at` on."""
    polls = 0

    def preempted() -> bool:
        nonlocal polls
        polls += 1
        return polls >= warned_at

    return train_phase(task, worker or Worker(), Rows(16), Channel(send), nothing, preempted, load)


@pytest.fixture
def polls_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "ORDERS_S", 0.0)
    monkeypatch.setattr(loop, "WARNINGS_S", -1.0)
    monkeypatch.setattr(loop, "Writer", PatientWriter)


def names(folder: Path) -> list[str]:
    return checkpoints.names(str(folder / "checkpoints"))


def test_a_resumed_phase_asks_for_orders_as_often_as_one_from_the_start(
    polls_at_every_step: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = task(tmp_path, phase_jobs()[0], checkpoint_images=None)
    train(one, send=stop_at(4))
    monkeypatch.undo()
    orders = Loop(one, Worker(), Channel(lambda _: None), nothing, lambda: False, dict).orders
    orders._polled -= 0.5  # the first step took half a second
    orders.poll(5)
    assert 5 < orders._next_step <= 5 + loop.ORDERS_S / 0.5


@pytest.mark.parametrize("step", [2, 4])
def test_a_phase_stops_after_a_checkpoint_and_resumes_to_the_same_bits(
    polls_at_every_step: None, tmp_path: Path, step: int
) -> None:
    job = phase_jobs()[0]
    train(task(tmp_path / "whole", job))
    parts = task(tmp_path / "parts", job, checkpoint_images=None)
    ending = train(parts, send=stop_at(step))
    assert (ending.stopped, ending.position.steps) == ("drained", step)
    assert names(tmp_path / "parts")[-1] == f"step-{step:08d}"
    assert not (tmp_path / "parts" / "model").exists()
    ending = train(parts)
    assert (ending.stopped, ending.position.steps) == ("", STEPS)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert_equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_a_preemption_warning_makes_one_checkpoint_and_training_continues(
    polls_at_every_step: None, tmp_path: Path
) -> None:
    job, mailbox = phase_jobs()[0], Mailbox()
    train(task(tmp_path / "whole", job))
    warned = task(tmp_path / "warned", job, checkpoint_images=None, keep_checkpoints=9)
    ending = train(warned, send=mailbox.post, warned_at=2)
    assert (ending.stopped, ending.position.steps) == ("", STEPS)
    assert [int(name.removeprefix("step-")) for name in names(tmp_path / "warned")] == [2, 3, 6, 9]
    notes = [news.text for news in mailbox.take() if isinstance(news, Note)]
    assert notes == ["a machine will be taken away soon; saving a checkpoint now"]
    assert losses(tmp_path / "warned") == losses(tmp_path / "whole")


def test_orders_are_polled_no_more_often_than_their_interval(tmp_path: Path) -> None:
    polls = []
    train(task(tmp_path, phase_jobs()[0]), send=lambda news: polls.append(news) if not news else None)
    assert 1 <= len(polls) < STEPS


def one_of_two(rank: int, world: int, folder: str) -> None:
    """One of two processes; only the first hears the order and posts news."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    loop.ORDERS_S, loop.WARNINGS_S, loop.Writer = 0.0, -1.0, PatientWriter  # type: ignore[misc]
    worker, job, root = Worker(rank=rank, world=world), phase_jobs()[0], Path(folder)
    mailbox = Mailbox()
    train(task(root / "whole", job), worker, send=mailbox.post, load=lambda: {f"system/{rank}": 1.0})
    news = mailbox.take()
    named = {point.name for one in news if isinstance(one, Points) for point in one.points}
    assert f"system/{rank}" in named  # of every worker; all else is the first one's
    assert ("generator/gan" in named, any(isinstance(one, Saved) for one in news)) == ((rank == 0,) * 2)
    parts = task(root / "parts", job, checkpoint_images=None)
    ending = train(parts, worker, send=stop_at(4) if rank == 0 else lambda _: None)
    assert ending.position.steps == 4
    assert ending.stopped == ("drained" if rank == 0 else "ordered to stop")
    dist.barrier()
    assert names(root / "parts")[-1] == "step-00000004"
    dist.barrier()
    assert train(parts, worker).position.steps == STEPS
    train(task(root / "warned", job, checkpoint_images=None, keep_checkpoints=9), worker, warned_at=2)
    train(task(root / "rarely", job, checkpoint_seconds=1000, keep_checkpoints=9), worker)
    dist.destroy_process_group()


def test_two_workers_follow_one_order(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_of_two, (2, str(tmp_path)), nprocs=2)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert_equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    assert [int(name.removeprefix("step-")) for name in names(tmp_path / "warned")] == [2, 3, 6, 9]
    assert losses(tmp_path / "warned") == losses(tmp_path / "whole")
    assert [int(name.removeprefix("step-")) for name in names(tmp_path / "rarely")] == [3, 6, 9]
    assert losses(tmp_path / "rarely") == losses(tmp_path / "whole")
