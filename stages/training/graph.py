"""A training step as one CUDA graph: the host launches one, not hundreds of kernels.

A replay repeats the recorded kernels in the memory they were recorded with. What Python decided or counted
stays as it was, so a recorded step depends on tensors alone: its batch is copied into the recorded one, the
learning rate is a tensor, random sources are seeded before the replay, the average of weights follows it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from stages.models.step import Batch, Losses

T = TypeVar("T")

Step = Callable[[Batch, bool], tuple[Losses, Losses]]
"""Updates by a batch; whether to measure -> losses, and what was measured: scalars on the device."""

WARM_UP = 3
"""Steps before the recording, in which cuDNN chooses its kernels and optimizers create their state."""


class CudaGraphs:
    """Records what functions ask of the device. Graphs share their memory, as one runs at a time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, function: Callable[[], T]) -> tuple[T, Callable[[], Any]]:
        """Record a function without running it: its result, and what replays it and writes that result again.

        Other threads may go on allocating and copying.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = function()
        self._pool = graph.pool()
        return result, graph.replay


class GraphedStep:
    """A step that is recorded after some warm-up, then replayed.

    Steps of fewer rows than `rows` (a short last batch) run as they are. The recorded batch's other shapes
    must be those of every batch, and its share 1: this is for one worker.
    """

    def __init__(self, step: Step, *, rows: int, record: CudaGraphs) -> None:
        self.step, self.rows, self.record = step, rows, record
        self._warmed_up = 0
        self._batch: Batch | None = None
        self._replays: dict[bool, Callable[[], tuple[Losses, Losses]]] = {}
        """The recorded step, with and without what is measured."""

    def __call__(self, batch: Batch, measure: bool) -> tuple[Losses, Losses]:
        """As the step itself does it, to the last bit."""
        if batch.source.shape[0] != self.rows:
            return self.step(batch, measure)
        if self._warmed_up < WARM_UP:
            self._warmed_up += 1
            return self.step(batch, measure)
        recorded = self._filled(batch)
        if measure not in self._replays:
            self._replays[measure] = self._recorded(recorded, measure)
        return self._replays[measure]()

    def _filled(self, batch: Batch) -> Batch:
        """The recorded batch, with the images of this one."""
        assert batch.share == 1
        if self._batch is None:
            self._batch = batch.each(torch.clone)
            return self._batch
        for role in ("source", "target", "instance"):
            images, recorded = getattr(batch, role), getattr(self._batch, role)
            if recorded is not None:
                recorded.copy_(images)
        return self._batch

    def _recorded(self, batch: Batch, measure: bool) -> Callable[[], tuple[Losses, Losses]]:
        def run() -> tuple[Losses, Losses, Tensor]:
            losses, measured = self.step(batch, measure)
            scalars = (*losses.values(), *measured.values())
            return losses, measured, torch.stack([value.float() for value in scalars])

        (losses, measured, values), replay = self.record(run)
        of_losses, of_measured = list(losses), list(measured)  # names: the tensors' memory is free again

        def replayed() -> tuple[Losses, Losses]:
            replay()
            scalars = values.clone().unbind()  # the next replay overwrites its own
            count = len(of_losses)
            return (
                dict(zip(of_losses, scalars[:count], strict=True)),
                dict(zip(of_measured, scalars[count:], strict=True)),
            )

        return replayed
