"""Adam (Kingma and Ba 2015) in one pass over the memory, for all weights at once or for each as it comes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Adam(torch.optim.Adam):
    """torch's fused Adam that can also step inside the backward pass.

    There each weight is updated as soon as its gradient is there, and the gradient freed: never are there
    gradients of all weights at once (730 MB for G1), and the gradient is read while it is still in the cache.
    The numbers are those of `step`, bit for bit.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(parameters, lr=lr, betas=betas, fused=True)

    @contextmanager
    def stepping_in_backward(self) -> Iterator[None]:
        """Around one backward pass that reaches each weight once. Gradients are None afterwards."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        hooks = [p.register_post_accumulate_grad_hook(self._update) for p in parameters]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _update(self, parameter: Tensor) -> None:
        group, state = self.param_groups[0], self.state[parameter]
        assert len(self.param_groups) == 1
        assert parameter.grad is not None
        if not state:  # as torch's own
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["step"] += 1
        torch._fused_adam_(
            [parameter],
            [parameter.grad],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            amsgrad=False,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )
        parameter.grad = None
