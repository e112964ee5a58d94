"""Bounded read-ahead by threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from stages.parallel.threads import Prefetch, own_cores, prefetch_map


def test_results_come_in_order_and_only_so_many_are_begun() -> None:
    begun: list[int] = []
    go = threading.Event()

    def work(n: int) -> int:
        go.wait(10)
        return -n

    def numbers() -> Iterator[int]:
        for n in range(20):
            begun.append(n)
            yield n

    with ThreadPoolExecutor(4) as threads:
        results = prefetch_map(threads, work, numbers(), ahead=6)
        go.set()
        assert next(results) == 0
        assert len(begun) == 7
        assert list(results) == [-n for n in range(1, 20)]


def test_an_error_of_a_call_is_raised_at_its_place_and_the_rest_is_cancelled() -> None:
    with ThreadPoolExecutor(1) as threads:
        results = prefetch_map(threads, lambda n: 1 // n, [1, 0, *range(1, 100)], ahead=50)
        assert next(results) == 1
        with pytest.raises(ZeroDivisionError):
            next(results)
        assert list(results) == []


class Counter:
    """Yields numbers; says how many were taken and whether the iterator was closed."""

    def __init__(self, stop: int) -> None:
        self.stop, self.taken, self.closed = stop, threading.Semaphore(0), threading.Event()

    def __call__(self) -> Iterator[int]:
        try:
            for n in range(self.stop):
                self.taken.release()
                yield n
        finally:
            self.closed.set()


def test_one_iterator_keeps_its_order_and_several_lose_no_value() -> None:
    assert list(Prefetch([Counter(50)], depth=3)) == list(range(50))
    assert sorted(Prefetch([Counter(50), Counter(0), Counter(7)], depth=2)) == sorted([*range(50), *range(7)])
    assert list(Prefetch([], depth=1)) == []


def test_no_more_values_wait_than_allowed() -> None:
    counter = Counter(100)
    values = Prefetch([counter], depth=3)
    for _ in range(4):  # three that wait, one that a thread has ready
        assert counter.taken.acquire(timeout=60)
    assert not counter.taken.acquire(timeout=0.3)
    assert next(values) == 0
    assert counter.taken.acquire(timeout=60)
    values.close()


def test_an_error_is_raised_after_the_values_before_it_and_again_at_every_read() -> None:
    def fail() -> Iterator[int]:
        yield 1
        raise OSError("away")

    values = Prefetch([fail], depth=4)
    assert next(values) == 1
    for _ in range(2):
        with pytest.raises(OSError, match="away"):
            next(values)

    def cannot_start() -> Iterator[int]:
        raise OSError("no such place")

    with pytest.raises(OSError, match="no such place"):
        list(Prefetch([cannot_start], depth=4))


def test_closing_stops_every_thread_and_closes_its_iterator() -> None:
    counters = [Counter(1 << 30) for _ in range(3)]
    values = Prefetch(counters, depth=2, name="counts-of-this-test")
    next(values)
    values.close()
    assert all(counter.closed.is_set() for counter in counters)
    assert not [thread for thread in threading.enumerate() if thread.name == "counts-of-this-test"]
    assert list(values) == []


def test_at_least_one_core_is_counted() -> None:
    assert own_cores() >= 1


def test_many_short_iterators_end() -> None:
    for _ in range(50):
        assert len(list(Prefetch([partial(iter, [1])] * 5, depth=1))) == 5
