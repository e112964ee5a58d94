"""The work of `stages.parallel.cluster.on_actors`, done in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch


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


def _in_turn(worker: type, job: Any, units: Sequence[int], **_: Any) -> Iterator[dict[str, Any]]:
    instance = worker(job=job)
    for unit in units:
        yield {name: values[0] for name, values in instance({"unit": [unit]}).items()}
