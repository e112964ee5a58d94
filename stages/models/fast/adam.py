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
        super().__init__(parameters, lr=lr, betas=betas, fused=True)
        self.in_backward = in_backward
        device = self.weights[0].device
        dtype = torch.float64 if device.type == "cpu" else torch.float32  # as the fused kernels read it
        self.rate = torch.full((), lr, dtype=dtype, device=device)

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

    @torch.no_grad()
    def update(self, parameters: Sequence[Tensor]) -> None:
        """Update some weights and free their gradients; weights without a gradient stay. Once a step each."""
        (group,) = self.param_groups
        pairs = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
        if not pairs:
            return
        weights, gradients = zip(*pairs, strict=True)
        states = [self._state_of(weight) for weight in weights]
        torch._foreach_add_([state["step"] for state in states], 1)
        torch._fused_adam_(
            weights,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            lr=self.rate,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )
        for weight in weights:
            weight.grad = None

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:  # the state that torch.optim.Adam creates
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state
