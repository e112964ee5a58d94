"""Adam (Kingma and Ba 2015) that updates all weights at once, or each when its gradient is complete."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Adam(torch.optim.Adam):
    """torch's fused Adam that can also update weights during the backward pass.

    in_backward   a gradient is freed with its update: the gradients of all weights (730 MB for G1) never
                  exist at once, and each is read while it is still in a CPU's cache. A GPU is faster with one
                  launch for all weights. The numbers are those of `step`, bit for bit

    The learning rate is in the weights' device's memory: a CUDA graph of an update serves all rates.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, lr: float, betas: tuple[float, float], in_backward: bool
    ) -> None:
        weights = list(parameters)
        super().__init__(weights, lr=lr, betas=betas, fused=not weights[0].is_meta)
        self.in_backward = in_backward
        self.rate = torch.tensor(lr, dtype=torch.float64, device="cpu")  # as the fused kernels read it
        if weights[0].is_cuda:
            self.rate = self.rate.to(weights[0].device, torch.float32)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state. Moments get the layout of their weights: fused kernels pair elements by address.

        Files hold tensors row by row; weights may be channels last.
        """
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            for name, value in state.items():
                if value.shape == parameter.shape:
                    state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        self.set_rate(self.param_groups[0]["lr"])

    def set_rate(self, rate: float) -> None:
        """Set the learning rate from the next update on."""
        self.param_groups[0]["lr"] = rate
        self.rate.fill_(rate)

    @property
    def weights(self) -> list[nn.Parameter]:
        """All that it updates."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Around one backward pass that reaches each weight once. Gradients are None afterwards."""
        if not self.in_backward:
            yield
            self.update(self.weights)
            return
        hooks = [
            weight.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda weight: self.update([weight])
            )
            for weight in self.weights
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def update(self, parameters: Sequence[Tensor]) -> None:
        """Update some weights and free their gradients; weights without a gradient stay. Once a step each."""
        (group,) = groups = self.param_groups
        # a GPU's graph records the update only if it is said to be capturable; a fused one always is
        some = {"params": parameters, "lr": self.rate, "capturable": self.rate.is_cuda}
        self.param_groups = [group | some]
        try:
            self.step()
        finally:
            self.param_groups = groups
        for parameter in parameters:
            parameter.grad = None
