"""Means over the workers of a training phase: of gradients, which every worker then applies, and of losses.

Not `DistributedDataParallel`: the discriminator runs three times a step and the two networks are updated one
after the other, which its hooks allow only with several backward passes' worth of communication. Gradients
are exchanged in gradient buckets while the backward pass computes the next ones; those of pix2pixHD's
discriminator are exchanged during the generator's backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Weight = TypeVar("Weight", bound=Tensor)

BUCKET_BYTES = 32 << 20
CPU_BUCKET_BYTES = 4 << 20  # over gloo: what was packed is still in the cache when it is sent


def buckets(tensors: Sequence[Weight], size: int) -> Iterator[list[Weight]]:
    """Tensors in order, in groups of one dtype and about `size` bytes."""
    group: list[Weight] = []
    total = 0
    for tensor in tensors:
        length = tensor.numel() * tensor.element_size()
        if group and (total + length > size or tensor.dtype != group[0].dtype):
            yield group
            group, total = [], 0
        group.append(tensor)
        total += length
    if group:
        yield group


class GradientAverager:
    """Averages gradients over the workers, as `stages.models.step.Average`; on request keeps their norms."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.measure = False
        """Whether to keep the norms of the averaged gradients of the next step."""
        self._norms: list[Tensor] = []

    def __call__(
        self, parameters: Sequence[nn.Parameter], *, during_backward: bool
    ) -> Iterable[Sequence[nn.Parameter]]:
        """Start to average; iterating the result yields parameters whose gradients are averaged."""
        averaged: Iterable[Sequence[nn.Parameter]] = [parameters]
        if self.workers > 1:
            averaged = Exchange(parameters, during_backward=during_backward)
        return self._measured(averaged) if self.measure else averaged

    def _measured(self, averaged: Iterable[Sequence[nn.Parameter]]) -> Iterator[Sequence[nn.Parameter]]:
        norms: list[Tensor] = []
        for parameters in averaged:
            norms += torch._foreach_norm([p.grad for p in parameters if p.grad is not None])
            yield parameters
        self._norms.append(torch.stack(norms).norm())

    def take_norms(self) -> dict[str, Tensor]:
        """The norms of the last measured step, by curve; {} if there are none since the last call."""
        names = ("discriminator", "generator")[-len(self._norms) :] if self._norms else ()
        values = {f"gradient_norm/{n}": v for n, v in zip(names, self._norms, strict=True)}
        self._norms.clear()
        return values


class Exchange:
    """The means of one network's gradients over all workers, on their way from construction on.

    Gradient buckets are sent in one order on every worker: last parameters first, as a backward pass
    completes those first. `during_backward`: each is sent as soon as its last gradient is complete; else all
    are sent now. A missing gradient counts as zeros. Iterating after the backward pass sends the rest, waits
    bucket by bucket, and yields the parameters whose gradients are averaged. All workers must iterate, over
    parameters of equal shapes.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, during_backward: bool) -> None:
        size = CPU_BUCKET_BYTES if parameters and parameters[0].device.type == "cpu" else BUCKET_BYTES
        self.groups = list(buckets(parameters[::-1], size))
        self.incomplete = [{id(parameter) for parameter in group} for group in self.groups]
        self.bucket_of = {id(p): index for index, group in enumerate(self.groups) for p in group}
        self.sent: list[tuple[Tensor, dist.Work]] = []
        self.hooks = [
            parameter.register_post_accumulate_grad_hook(self._complete)  # type: ignore[no-untyped-call]
            for parameter in parameters
            if during_backward
        ]
        if not during_backward:
            self._send_all()

    def __iter__(self) -> Iterator[list[nn.Parameter]]:
        for hook in self.hooks:
            hook.remove()
        self._send_all()
        return self._averaged()

    def _complete(self, parameter: Tensor) -> None:
        """Note that a gradient is complete; send the buckets that are next and complete."""
        self.incomplete[self.bucket_of[id(parameter)]].discard(id(parameter))
        while len(self.sent) < len(self.groups) and not self.incomplete[len(self.sent)]:
            group = self.groups[len(self.sent)]
            flat = torch.cat([gradient.reshape(-1) for gradient in _gradients(group)])
            work = dist.all_reduce(flat, async_op=True)
            assert work is not None
            self.sent.append((flat, work))

    def _send_all(self) -> None:
        for parameter in (p for group in self.groups for p in group):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self._complete(parameter)

    def _averaged(self) -> Iterator[list[nn.Parameter]]:
        world = dist.get_world_size()
        for group, (flat, work) in zip(self.groups, self.sent, strict=True):
            work.wait()
            means = torch.split(flat.div_(world), [parameter.numel() for parameter in group])
            for parameter, mean in zip(group, means, strict=True):
                _take(parameter, mean)
            yield group


def _take(parameter: nn.Parameter, mean: Tensor) -> None:
    """Make a packed mean the gradient: a view of it where the weight's layout is that of packing."""
    assert parameter.grad is not None
    gradient = _pixels_last(parameter.grad)
    if gradient.is_contiguous():
        parameter.grad = mean.as_strided(parameter.shape, parameter.grad.stride())
    else:
        gradient.copy_(mean.view_as(gradient))


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [_pixels_last(parameter.grad) for parameter in parameters if parameter.grad is not None]


def _pixels_last(tensor: Tensor) -> Tensor:
    """A view in the memory order of channels-last weights, so that packing is a plain copy.

    All workers use that order, whatever their layout, so that they send the same.
    """
    return tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, on every worker. For small plain values: positions, names."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def any_worker(flag: bool, device: torch.device) -> bool:
    """Whether any worker says so, the same on all. Waits for the device."""
    return bool(total(torch.tensor(float(flag), device=device)).item())


def total_with_gradient(tensor: Tensor) -> Tensor:
    """The sum over all workers, and of their gradients. Every worker runs it and its backward pass."""
    summed: Tensor = _Total.apply(tensor)  # type: ignore[no-untyped-call]
    return summed


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:  # noqa: ARG004
        return total(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        return total(gradient.contiguous())


def total(tensor: Tensor) -> Tensor:
    """The sum over all workers, as a new tensor."""
    summed = tensor.clone()
    dist.all_reduce(summed)
    return summed
