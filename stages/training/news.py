"""What the workers of a phase and its driver say to each other, as plain values: `News` and `Order`.

    worker  -- News -->   Mailbox  -->  driver      points of curves, progress, notes, pictures
    worker  <-- Stop --   Mailbox  <--  driver      the order to end the phase after a checkpoint

A worker posts through its `Channel` and never waits for the driver, nor the driver for workers. News that is
lost with the mailbox was only early: the curves are in the checkpoints, and MLflow gets them from there.

Imports neither torch nor Ray: the mailbox is a process of its own (`stages.training.control`), which torch
would take seconds to load, and the loop (`stages.training.loop`) runs without Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from stages.base import Point
from stages.errors import PixloomError


@dataclass(frozen=True, slots=True)
class Points:
    """New points of the curves."""

    points: Sequence[Point]


@dataclass(frozen=True, slots=True)
class Advance:
    """How many images of the phase are done, and the text that ends the progress line."""

    images: int
    text: str


@dataclass(frozen=True, slots=True)
class Note:
    """A line for the driver's log. `restarts`: it says why workers were lost and the group starts again."""

    text: str
    restarts: bool = False


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint was written, in so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Begin:
    """How the phase is computed from here on (`stages.training.execution`), by name."""

    notes: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class SampleGrid:
    """Sample pictures (H, W, 3) uint8 of a step."""

    images: int
    step: int
    pixels: np.ndarray


News = Points | Advance | Note | Saved | Begin | SampleGrid


@dataclass(frozen=True, slots=True)
class Save:
    """Write a checkpoint now and continue."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Write a checkpoint now and end the phase."""

    reason: str


Order = Save | Stop


class Mailbox:
    """News on its way to the driver, and its order on the way back. An actor in a cluster."""

    def __init__(self) -> None:
        self.news: list[News] = []
        self.order: Stop | None = None
        self.failure: PixloomError | None = None

    def post(self, news: Sequence[News]) -> Stop | None:
        """Add news; returns the driver's order."""
        self.news += news
        return self.order

    def take(self) -> list[News]:
        """All news since the last call."""
        news, self.news = self.news, []
        return news

    def stop(self, reason: str) -> None:
        """Order the workers to write a checkpoint at once and end the phase."""
        self.order = Stop(reason)

    def give_up(self, failure: PixloomError) -> None:
        """Record why a restart would fail again; the first failure is kept."""
        self.failure = self.failure or failure

    def permanent_failure(self) -> PixloomError | None:
        """Why an earlier attempt failed permanently."""
        return self.failure


class Channel:
    """A worker's way to the driver; also knows when the worker last made progress.

    send   delivers news and returns the driver's order, as far as it is known
    """

    def __init__(self, send: Callable[[Sequence[News]], Stop | None]) -> None:
        self.send = send
        self.last_alive = time.monotonic()
        self.stores = 0  # how deep in `storing`

    def post(self, *news: News) -> None:
        """Send news."""
        self.send(news)

    def stop_order(self) -> Stop | None:
        """The driver's order, as far as it is known."""
        return self.send(())

    def alive(self) -> None:
        """Record that the worker makes progress."""
        self.last_alive = time.monotonic()

    @contextmanager
    def storing(self) -> Iterator[None]:
        """While files are read or written a worker is not hung, however long: stores have time-outs."""
        self.stores += 1
        try:
            yield
        finally:
            self.stores -= 1
            self.alive()
