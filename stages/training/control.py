"""What a running phase tells the driver, and the driver it: a notice board that both can reach.

Workers post events and never wait; the driver takes them, prints progress and writes to MLflow, so workers
need no route to a tracking server and a SQLite file may lie on the driver's disk. What is lost with the
board (its node may die) is only early news: the curves are in the checkpoints and come again.

Events are plain values and this module imports little: the board is a process of its own, and torch would
take it seconds to load.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import ray
from ray.train import UserCallback
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import ResizingState

from stages.errors import full_disk

SAVE = "save"
"""The order to make a checkpoint and go on; any other is a reason to stop after one."""

SAVE_S = 60.0  # how long a change of the number of workers waits for a checkpoint

logger = logging.getLogger(__name__)


class Event(NamedTuple):
    """What happened.

    points    list of (step, images, epoch, name, value, time_ms)
    progress  (images, text)
    note      text
    picture   (images, step, (H, W, 3) uint8)
    """

    kind: Literal["points", "progress", "note", "picture"]
    value: Any


class Notices:
    """The board itself; an actor in a cluster, a plain object in one process."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.order = ""
        self.failure = ""
        self.saves = 0

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

    def save(self) -> None:
        """Order the workers to make a checkpoint at once and go on: they will be started again."""
        self.order = self.order or SAVE

    def saved(self) -> None:
        """Say that the ordered checkpoint is written."""
        self.saves += 1
        if self.order == SAVE:
            self.order = ""

    def count_saves(self) -> int:
        """How many ordered checkpoints are written."""
        return self.saves

    def give_up(self, reason: str) -> None:
        """Say that starting again would fail again, so that the next attempt ends at once."""
        self.failure = self.failure or reason

    def why_not(self) -> str:
        """What an earlier attempt failed for, for good; "" if nothing."""
        return self.failure


def open_board() -> Any:
    """A board that all workers can reach, on the driver's node; should that be lost alone, on another.

    Without the second, workers that find no board would be started again for ever: Ray Train does not count
    attempts that end by a node taken away with notice.
    """
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=True
    )
    actor = ray.remote(Notices)
    return actor.options(
        num_cpus=0, scheduling_strategy=here, max_concurrency=1, max_restarts=-1, max_task_retries=-1
    ).remote()


class Poster:
    """A worker's way to the board; also knows when the worker last did something."""

    def __init__(self, board: Any) -> None:
        self.board = board
        self.seen_alive = time.monotonic()
        self._answer: Any = None
        self._order = ""

    def post(self, *events: Event) -> None:
        """Put up events without waiting. A board that is gone is done without."""
        if isinstance(self.board, Notices):
            self._order = self.board.post(events)
            return
        self._look()
        answer = self.board.post.remote(list(events))
        self._answer = self._answer or answer  # one that is waited for is not given up for a later one

    def alive(self) -> None:
        """The worker gets on with its work."""
        self.seen_alive = time.monotonic()

    def saved(self) -> None:
        """The ordered checkpoint is written."""
        self._order, self._answer = "", None
        if isinstance(self.board, Notices):
            self.board.saved()
        else:
            self.board.saved.remote()

    def order(self) -> str:
        """The driver's order as far as it is known, "" for none; asks for the next time, and never waits."""
        self.post()
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


class Teller(UserCallback):  # type: ignore[misc]
    """In Ray Train's controller: says in one line what happened to a worker."""

    def __init__(self, notices: Any) -> None:
        self.notices = notices

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        """Tell the driver."""
        told = "; ".join(f"worker {rank}: {cause(error)}" for rank, error in worker_exceptions.items())
        self.notices.post.remote([Event("note", f"lost workers, starts them again ({told})")])


class Saver(ControllerCallback):  # type: ignore[misc]
    """In Ray Train's controller: before it starts a running group again in another size, a checkpoint.

    So that workers that join cost no step, wherever in an epoch they come.
    """

    def __init__(self, notices: Any) -> None:
        self.notices = notices

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:  # noqa: ARG002
        """Have the running workers make a checkpoint; wait for it, but not for ever."""
        if not isinstance(current_state, ResizingState):
            return
        told = f"goes on with {current_state.scaling_decision.num_workers} workers, after a checkpoint"
        self.notices.post.remote([Event("note", told)])
        had = ray.get(self.notices.count_saves.remote())
        self.notices.save.remote()
        until = time.monotonic() + SAVE_S
        while ray.get(self.notices.count_saves.remote()) == had and time.monotonic() < until:
            time.sleep(0.1)


def cause(error: BaseException) -> str:
    """The innermost reason of a failure in Ray, in one line."""
    if full := full_disk(error):
        return full
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, first = next(iter(failures.items()))
        return f"worker {rank}: {cause(first)}"
    while (inner := getattr(error, "cause", None) or error.__cause__) is not None and inner is not error:
        error = inner
    lines = str(error).strip().splitlines() or [""]
    told = lines[0].partition(". ")[0] if "actor is dead" in lines[0] else lines[-1]
    return f"{type(error).__name__}: {told.partition('Worker exit detail')[0].strip()}"[:200]
