"""The work of `stages.parallel.cluster`, done in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch

from stages import ingest, pair, shard
from stages.shards import suspects


@contextmanager
def workers_here(stage: ModuleType) -> Iterator[None]:
    """A stage's workers run in this process, where starting one costs nothing: for tests of what they do.

    That the work is dealt out to processes, and that a killed run resumes, is tested with Ray.
    """
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "on_actors", _in_turn)
        yield
    torch.set_num_threads(threads)


def _in_turn(worker: type, job: Any, units: Sequence[int], **_: Any) -> Iterator[tuple[int, Any]]:
    instance = worker(job)
    for unit in units:
        yield unit, instance(unit)


@contextmanager
def tasks_here() -> Iterator[None]:
    """The tasks of ingest, pair and shard run in this process, one after the other, and need no Ray."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (ingest, pair, shard, suspects):
            patch.setattr(module, "each", _each_in_turn)
        yield


def _each_in_turn(task: Callable[[Any], Any], items: Sequence[Any], **_: Any) -> Iterator[Any]:
    return map(task, items)
