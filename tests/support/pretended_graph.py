"""A CUDA graph that a CPU can pretend: records operators with their memory, and repeats them there.

As a real one, it knows nothing of Python: a number that was not in a tensor stays as it was recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")


class Recorder(TorchDispatchMode):
    """The operators that ran in this context."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operators.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Run the operators again, in the memory of the recording."""
        for func, args, kwargs, result in self.operators:
            again = func(*args, **kwargs)
            for old, new in zip(pytree.tree_leaves(result), pytree.tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class PretendedGraphs:
    """In place of `stages.training.graph.CudaGraphs`. Recording changes no `state`, nor random numbers."""

    def __init__(self, state: Callable[[], Iterable[Tensor]]) -> None:
        self.state, self.recordings, self.replays = state, 0, 0

    def __call__(self, function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        random = torch.get_rng_state()
        before = [(tensor, tensor.detach().clone()) for tensor in self.state()]
        with Recorder() as recorder:
            result = function()
        with torch.no_grad():
            for tensor, values in before:
                tensor.copy_(values)
        torch.set_rng_state(random)
        self.recordings += 1

        def replay() -> None:
            self.replays += 1
            recorder.replay()

        return result, replay
