"""The driver's side of the board: what workers tell becomes progress lines and MLflow records."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import ray

from stages.progress import Progress
from stages.tracking.run import MetricRow, Run
from stages.training.control import Event
from stages.training.curves import Point

POLL_S = 1.0

logger = logging.getLogger(__name__)


@contextmanager
def reading(notices: Any, handle: Callable[[Sequence[Event]], None]) -> Iterator[None]:
    """Pass on what a board holds, from a thread, until the block ends; the board ends with it."""
    over = threading.Event()

    def read() -> None:
        while not over.wait(POLL_S):
            with suppress(ray.exceptions.RayError):
                handle(ray.get(notices.take.remote()))

    thread = threading.Thread(target=read, name="board-reader", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with suppress(ray.exceptions.RayError):
            handle(ray.get(notices.take.remote(), timeout=10))
        ray.kill(notices)


@dataclass
class Reader:
    """Passes events on, each point of a curve once."""

    label: str
    total_images: int
    track: Run
    _sent: dict[str, int] = field(default_factory=dict)
    """The last step of each curve that was passed on: a restart repeats some."""
    _counted: int = -1
    _progress: Progress | None = None
    _pictured: int = -1
    _text: str = ""
    """What the next progress line ends with, while it has not been said."""

    def handle(self, events: Sequence[Event]) -> None:
        """Pass events on."""
        for event in events:
            match event.kind:
                case "points":
                    self.points([Point(*row) for row in event.value])
                case "progress":
                    self._advance(*event.value)
                case "note":
                    logger.warning("%-13s %s", self.label, event.value)
                case "picture":
                    images, step, png = event.value
                    self._picture(images, step, png)

    def points(self, points: Sequence[Point]) -> None:
        """Send points of steps not sent before."""
        fresh = [point for point in points if point.step > self._sent.get(point.name, -1)]
        self._sent |= {point.name: point.step for point in fresh}
        self.track.metrics_batch(
            MetricRow(point.name, point.value, point.step, point.time_ms)
            for point in fresh
            if "/layer" not in point.name  # in metrics.parquet; too many for a page of charts
        )
        steps = {point.step: point for point in fresh if point.step > self._counted}
        self._counted = max([self._counted, *steps])
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
