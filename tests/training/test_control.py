"""The board and its reader: each point once, a line of progress that says how it ended."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterable

import pytest

from stages.parallel.cluster import failure
from stages.progress import Progress
from stages.tracking.run import MetricRow, NullRun
from stages.training.control import Event, Notices, Poster, cause
from stages.training.relay import Reader


class Kept(NullRun):
    """A run that keeps what it is given."""

    def metrics_batch(self, rows: Iterable[MetricRow]) -> None:
        self.__dict__.setdefault("rows", []).extend(rows)


def point(step: int, name: str = "generator/gan") -> tuple[int, int, int, str, float, int]:
    return (step, step * 4, 0, name, 1.0, 1000)


def test_what_is_posted_is_taken_once_and_answered_with_the_order() -> None:
    board = Notices()
    poster = Poster(board)
    poster.post(Event("note", "hello"))
    assert poster.order() == ""
    board.stop("preempted")
    poster.post(Event("note", "again"))
    assert poster.order() == "preempted"
    assert [event.value for event in board.take()] == ["hello", "again"]
    assert board.take() == []


def test_a_failure_for_good_is_the_first_one() -> None:
    board = Notices()
    board.give_up("damaged shard")
    board.give_up("something later")
    assert board.why_not() == "damaged shard"


def test_points_that_a_restart_repeats_are_recorded_once() -> None:
    run = Kept()
    reader = Reader("train-global", 100, run)
    reader.handle([Event("points", [point(1), point(2)]), Event("points", [point(2), point(3)])])
    assert [row.step for row in run.rows if row.name == "generator/gan"] == [1, 2, 3]
    assert [row.value for row in run.rows if row.name == "images"] == [4, 8, 12]
    reader.handle([Event("points", [point(3, "validation/l1")])])
    assert run.rows[-1].name == "validation/l1"


def test_curves_per_layer_stay_out_of_the_charts() -> None:
    run = Kept()
    names = ["generator/feature_matching/layer0", "generator/feature_matching/scale0"]
    Reader("train", 1, run).handle([Event("points", [point(1, name) for name in names])])
    assert {row.name for row in run.rows} == {names[1], "images", "epoch"}


def test_the_last_line_of_progress_is_always_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    reader = Reader("train-global", 100, NullRun())
    reader.handle([Event("progress", (40, "epoch 1/2")), Event("progress", (100, "epoch 2/2  G 1"))])
    reader.finish()
    assert "100/100 images" in caplog.text
    assert "epoch 2/2  G 1" in caplog.text


def test_no_line_of_progress_is_said_twice(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for interval in (0.0, 60.0):
        caplog.clear()
        with Progress("infer", total=2, unit="images", interval=interval) as progress:
            progress.advance(2)
        assert caplog.text.count("2/2 images") == 1


def test_a_dead_worker_is_told_in_a_few_words() -> None:
    text = "The actor is dead because its worker process has died. Worker exit type: X Worker exit detail: Y"
    assert cause(ConnectionError(text)) == (
        "ConnectionError: The actor is dead because its worker process has died"
    )
    outer = RuntimeError("outer")
    outer.__cause__ = ValueError("inner\nlast line")
    assert cause(outer) == "ValueError: last line"


def test_a_full_disk_of_rays_is_told_with_its_machine() -> None:
    text = "ray::work() (pid=1, ip=10.0.0.7)\nray.exceptions.OutOfDiskError: Local disk is full"
    wrapped = RuntimeError(text)
    assert cause(wrapped).startswith("Ray's object store on 10.0.0.7 is full")
    assert str(failure("infer", wrapped)).startswith("infer: Ray's object store on 10.0.0.7 is full")


def test_the_boards_process_does_without_torch() -> None:
    code = "import sys, stages.training.control; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
