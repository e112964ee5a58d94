"""The control channel of a phase on Ray: what reads and writes its mailbox, an actor.

Courier(mailbox)             how a worker sends news: without waiting
reading(mailbox, handle)     the driver: handle news while the phase runs
NewsRecorder                 the driver: news becomes progress lines, MLflow records, metrics
LostWorkers(mailbox)         Ray Train's controller: a line for each worker that failed
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.train import UserCallback

from stages.errors import cause
from stages.parallel import monitoring
from stages.progress import Progress
from stages.training.news import Advance, Begin, News, Note, Points, SampleGrid, Saved, Stop

if TYPE_CHECKING:
    from stages.tracking.run import Run

POLL_S = 1.0

logger = logging.getLogger(__name__)


class Courier:
    """Sends news to the mailbox without waiting; returns the last order that has arrived. For any thread."""

    def __init__(self, mailbox: Any) -> None:
        self.mailbox = mailbox
        self._answer: Any = None
        self._order: Stop | None = None
        self._one_at_a_time = threading.Lock()

    def __call__(self, news: Sequence[News]) -> Stop | None:
        """Send news. Errors are ignored if the mailbox's node is gone."""
        with self._one_at_a_time:
            if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
                try:
                    self._order = ray.get(self._answer)
                except ray.exceptions.RayError:
                    logger.debug("the mailbox is gone")
                self._answer = None
            answer = self.mailbox.post.remote(list(news))
            self._answer = self._answer or answer  # wait for the older answer: it arrives first
            return self._order


class LostWorkers(UserCallback):  # type: ignore[misc]
    """Reports, in one line, each worker that failed."""

    def __init__(self, mailbox: Any) -> None:
        self.mailbox = mailbox

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        """Post the news."""
        lost = ", ".join(f"worker {rank} was lost ({cause(e)})" for rank, e in worker_exceptions.items())
        self.mailbox.post.remote(
            [Note(f"{lost}; restarting the group from its last checkpoint", restarts=True)]
        )


@contextmanager
def reading(mailbox: Any, handle: Callable[[Sequence[News]], None]) -> Iterator[None]:
    """Handle a mailbox's news in a thread until the block ends; the mailbox ends with it."""
    over = threading.Event()

    def read() -> None:
        while not over.wait(POLL_S):
            with suppress(ray.exceptions.RayError):
                handle(ray.get(mailbox.take.remote()))

    thread = threading.Thread(target=read, name="mailbox-reader", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with suppress(ray.exceptions.RayError):
            handle(ray.get(mailbox.take.remote(), timeout=10))
        ray.kill(mailbox)


@dataclass
class NewsRecorder:
    """Turns news into log lines and records. A restart repeats points, which MLflow takes once each.

    folder   of the phase; a restart may go on from points of its checkpoint that another command wrote
    """

    label: str
    folder: str
    total_images: int
    track: Run
    _pictured: int = -1
    _progress: Progress | None = None
    _text: str = ""  # the end of the newest progress line

    def __post_init__(self) -> None:
        self._phase = {"phase": self.label.removeprefix("train-")}

    def handle(self, news: Sequence[News]) -> None:
        """Log and record news."""
        for one in news:
            match one:
                case Points(points):
                    self.track.points(points)
                    for point in points:
                        if point.name in monitoring.CURVES:
                            monitoring.CURVES[point.name].set(point.value, self._phase)
                case Advance(images, text):
                    self._advance(images, text)
                case Note(text, restarts):
                    logger.warning("%-13s %s", self.label, text)
                    if restarts:
                        monitoring.TRAIN_RESTARTS.inc(1, self._phase)
                case Saved(seconds):
                    monitoring.TRAIN_CHECKPOINT_SECONDS.set(seconds, self._phase)
                case Begin(notes):
                    logger.info("%-13s %s", self.label, "  ".join(f"{name} {notes[name]}" for name in notes))
                    self.track.tags({f"pixloom.{name}": text for name, text in notes.items()})
                    self.track.curves(self.folder)
                case SampleGrid(images, step, pixels):
                    if images > self._pictured:
                        self._pictured = images
                        self.track.image(pixels, "samples", step)

    def finish(self) -> None:
        """Write the last progress line if it was not written yet; nothing flows any more."""
        for gauge in monitoring.CURVES.values():
            gauge.set(0, self._phase)
        if self._progress is not None and self._progress.said != self._progress.done:
            self._progress.say(self._text)

    def _advance(self, images: int, text: str) -> None:
        if self._progress is not None and (again := self._progress.done - images) > 0:
            logger.info("%-13s %s images are done again", self.label, f"{again:,}")
            self._progress = None
        if self._progress is None:
            self._progress = Progress(self.label, total=self.total_images, unit="images", done=images)
        if images > self._progress.done:
            monitoring.TRAIN_IMAGES.inc(images - self._progress.done, self._phase)
        self._progress.advance(images - self._progress.done, text)
        self._text = text
