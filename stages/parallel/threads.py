"""Bounded read-ahead by threads of this process. No Ray here.

prefetch_map(pool, read, items, ahead=8)    results in the items' order, at most 8 of them waiting
Prefetch([list_pages], depth=4)             an iterator run by a thread, at most 4 values ahead
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from typing import TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")


def own_cores() -> int:
    """Cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prefetch_map(
    threads: Executor, call: Callable[[Item], Value], items: Iterable[Item], *, ahead: int
) -> Iterator[Value]:
    """Yields `call(item)` for each item, in the items' order; threads work on at most `ahead` items ahead."""
    return results((threads.submit(call, item) for item in items), ahead=ahead)


def results(futures: Iterable[Future[Value]], *, ahead: int) -> Iterator[Value]:
    """Yields the futures' results in their order; takes at most `ahead` futures before the oldest is done."""
    waiting: deque[Future[Value]] = deque()
    try:
        for future in futures:
            waiting.append(future)
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


class Prefetch(Iterator[Value]):
    """Iterates over the values of one or more iterators, each run by its own thread, `depth` values ahead.

    sources   functions that return an iterator; called in the thread
    depth     most values that wait to be read

    The values of one iterator keep their order; those of several are mixed as they are ready. The first error
    of an iterator ends the iteration: it is raised to the reader, and again at every further read.
    """

    def __init__(
        self, sources: Sequence[Callable[[], Iterator[Value]]], *, depth: int, name: str = "prefetch"
    ) -> None:
        self._ready: queue.Queue[tuple[Value | None, BaseException | None]] = queue.Queue(depth)
        self._closed = threading.Event()
        self._running = len(sources)
        self._error: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._run, args=[source], name=name, daemon=True) for source in sources
        ]
        for thread in self._threads:
            thread.start()

    def __next__(self) -> Value:
        while self._error is None and self._running:
            value, error = self._ready.get()
            if error is None:
                return value  # type: ignore[return-value]
            if isinstance(error, StopIteration):
                self._running -= 1
            else:
                self._error = error
        raise self._error or StopIteration

    def close(self) -> None:
        """Stop the threads and drop the values that wait. A thread stops after the value it works on."""
        self._closed.set()
        self._running = 0
        for thread in self._threads:
            thread.join(timeout=30)

    def _run(self, source: Callable[[], Iterator[Value]]) -> None:
        try:
            values = source()
            try:
                for value in values:
                    if not self._put(value, None):
                        return
            finally:
                close = getattr(values, "close", None)
                if close is not None:
                    close()
        except BaseException as error:
            self._put(None, error)
        else:
            self._put(None, StopIteration())

    def _put(self, value: Value | None, error: BaseException | None) -> bool:
        while not self._closed.is_set():
            try:
                self._ready.put((value, error), timeout=0.1)
            except queue.Full:
                continue
            return True
        return False
