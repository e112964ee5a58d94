"""What a running phase tells the driver, and the driver it: a notice board that both can reach.

Workers post events and never wait; the driver takes them, prints progress and writes to MLflow, so workers
need no route to a tracking server and a SQLite file may lie on the driver's disk. What is lost with the
board (its node may die) is only early news: the curves are in the checkpoints and come again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import ray

from stages.curves import Point
from stages.progress import Progress
from stages.tracking import MetricRow, Run

logger = logging.getLogger(__name__)


class Event(NamedTuple):
    """points: list[Point]; progress: (images, text); note: text; picture: (images, PNG bytes)."""

    kind: Literal["points", "progress", "note", "picture"]
    value: Any


class Notices:
    """The board itself; an actor in a cluster, a plain object in one process."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.order = ""
        self.failure = ""

    def post(self, events: Sequence[Event]) -> str:
        """Put up events; returns the driver's order, "" for none."""
        self.events += events
        return self.order

    def take(self) -> list[Event]:
        """All events since the last time."""
        events, self.events = self.events, []
        return events

    def stop(self, reason: str) -> None:
        """Order the workers to end the phase at the next checkpoint, which they make at once."""
        self.order = reason

    def give_up(self, reason: str) -> None:
        """Say that starting again would fail again, so that the next attempt ends at once."""
        self.failure = self.failure or reason

    def why_not(self) -> str:
        """What an earlier attempt failed for, for good; "" if nothing."""
        return self.failure


def open_board() -> Any:
    """A board that all workers can reach, on a node that lives as long as the driver."""
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=True
    )
    actor = ray.remote(Notices)
    return actor.options(num_cpus=0, scheduling_strategy=here, max_concurrency=1).remote()


class Poster:
    """A worker's way to the board."""

    def __init__(self, board: Any) -> None:
        self.board = board
        self._answer: Any = None
        self._order = ""

    def post(self, *events: Event) -> None:
        """Put up events without waiting. A board that is gone is done without."""
        if isinstance(self.board, Notices):
            self._order = self.board.post(events)
            return
        self._look()
        self._answer = self.board.post.remote(list(events))

    def order(self) -> str:
        """The driver's order as of some post before; "" for none."""
        self._look()
        return self._order

    def _look(self) -> None:
        if self._answer is None:
            return
        ready, _ = ray.wait([self._answer], timeout=0)
        if ready:
            try:
                self._order = ray.get(self._answer)
            except ray.exceptions.RayError:
                logger.debug("the board is gone")
            self._answer = None


@dataclass
class Reader:
    """The driver's side: events become progress lines and MLflow records, each point once."""

    label: str
    total_images: int
    track: Run
    step: int = -1
    """The last step whose points were passed on: a restart repeats some."""
    _progress: Progress | None = None
    _pictured: int = -1
    _text: str = ""
    """What the next progress line ends with, while it has not been said."""

    def handle(self, events: Sequence[Event]) -> None:
        """Pass events on."""
        for event in events:
            match event.kind:
                case "points":
                    self.points(event.value)
                case "progress":
                    self._advance(*event.value)
                case "note":
                    logger.warning("%-13s %s", self.label, event.value)
                case "picture":
                    images, step, png = event.value
                    self._picture(images, step, png)

    def points(self, points: Sequence[Point]) -> None:
        """Send points of steps not sent before."""
        fresh = [point for point in points if point.step > self.step]
        if not fresh:
            return
        self.step = fresh[-1].step
        self.track.metrics_batch(
            MetricRow(point.name, point.value, point.step, point.time_ms)
            for point in fresh
            if "/layer" not in point.name  # in metrics.parquet; too many for a page of charts
        )
        steps = {point.step: point for point in fresh}
        self.track.metrics_batch(
            MetricRow(name, value, point.step, point.time_ms)
            for point in steps.values()
            for name, value in (("images", point.images), ("epoch", point.epoch))
        )

    def _advance(self, images: int, text: str) -> None:
        if self._progress is None or images < self._progress.done:
            self._progress = Progress(self.label, total=self.total_images, unit="images", done=images)
        said = self._progress.spoken
        self._progress.advance(images - self._progress.done, text)
        self._text = text if self._progress.spoken == said else ""

    def finish(self) -> None:
        """The last progress line, whatever was said shortly before."""
        if self._progress is not None and self._text:
            self._progress.say(self._text)

    def _picture(self, images: int, step: int, png: Any) -> None:
        if images > self._pictured:
            self._pictured = images
            self.track.image(png, "samples", step)
