"""Means over the workers of a training phase: of gradients, which all apply alike, and of losses.

By hand rather than by `DistributedDataParallel`: the discriminator is used three times a step and the two
networks are stepped one after the other, which its hooks do not allow for without several backward passes'
worth of communication. Gradients travel in buckets, while the backward pass makes the next ones; those of the
discriminator travel during the generator's, the generator's last ones while the next step judges real images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Weight = TypeVar("Weight", bound=Tensor)

BUCKET_BYTES = 32 << 20
CPU_BUCKET_BYTES = 4 << 20  # over gloo: what was packed is still in the cache when it is sent


def buckets(tensors: Sequence[Weight], size: int) -> Iterator[list[Weight]]:
    """Tensors of one dtype, in order, in groups of about `size` bytes."""
    group: list[Weight] = []
    held = 0
    for tensor in tensors:
        bytes_ = tensor.numel() * tensor.element_size()
        if group and (held + bytes_ > size or tensor.dtype != group[0].dtype):
            yield group
            group, held = [], 0
        group.append(tensor)
        held += bytes_
    if group:
        yield group


def send(parameters: Sequence[nn.Parameter], *, coming: bool) -> Callable[[], Iterator[list[nn.Parameter]]]:
    """Begin to replace gradients by their mean over all workers.

    They travel at once or, where a backward pass is `coming`, each as soon as that has added its part. The
    result is called when all gradients are made: where there is none then, this worker's share is zeros. What
    that returns waits, bucket by bucket, and gives the parameters whose means are there. Every worker passes
    equal shapes and waits.
    """
    return _Exchange(parameters, coming=coming).arrive


class _Exchange:
    """Buckets go in one order, last parameters first (a backward pass makes those first), on every worker."""

    def __init__(self, parameters: Sequence[nn.Parameter], *, coming: bool) -> None:
        size = CPU_BUCKET_BYTES if parameters and parameters[0].device.type == "cpu" else BUCKET_BYTES
        self.groups = list(buckets(parameters[::-1], size))
        self.missing = [{id(p) for p in group if coming or p.grad is None} for group in self.groups]
        self.missing_beside = {
            id(p): missing for group, missing in zip(self.groups, self.missing, strict=True) for p in group
        }
        self.hooks = [
            p.register_post_accumulate_grad_hook(self._made)  # type: ignore[no-untyped-call]
            for p in parameters
            if coming
        ]
        self.travelling: list[tuple[Tensor, dist.Work]] = []
        self._send()

    def _made(self, parameter: Tensor) -> None:
        self.missing_beside[id(parameter)].discard(id(parameter))
        self._send()

    def _send(self) -> None:
        """Those buckets that are next and complete."""
        while len(self.travelling) < len(self.groups) and not self.missing[len(self.travelling)]:
            group = self.groups[len(self.travelling)]
            flat = torch.cat([gradient.reshape(-1) for gradient in _gradients(group)])
            work = dist.all_reduce(flat, async_op=True)
            assert work is not None
            self.travelling.append((flat, work))

    def arrive(self) -> Iterator[list[nn.Parameter]]:
        """Send what is not yet sent, now; the result waits."""
        for hook in self.hooks:
            hook.remove()
        for parameter in (p for group in self.groups for p in group):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self._made(parameter)
        return self._arriving()

    def _arriving(self) -> Iterator[list[nn.Parameter]]:
        world = dist.get_world_size()
        for group, (flat, work) in zip(self.groups, self.travelling, strict=True):
            work.wait()
            means = torch.split(flat.div_(world), [parameter.numel() for parameter in group])
            for parameter, mean in zip(group, means, strict=True):
                _take(parameter, mean)
            yield group


def _take(parameter: nn.Parameter, mean: Tensor) -> None:
    """Make a packed mean the gradient: as it lies, where the weight's layout is that of packing."""
    assert parameter.grad is not None
    gradient = _pixels_last(parameter.grad)
    if gradient.is_contiguous():
        parameter.grad = mean.as_strided(parameter.shape, parameter.grad.stride())
    else:
        gradient.copy_(mean.view_as(gradient))


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [_pixels_last(parameter.grad) for parameter in parameters if parameter.grad is not None]


def _pixels_last(tensor: Tensor) -> Tensor:
    """A view in the order in which channels-last weights lie in memory: packing is a plain copy then.

    Always that order, whatever a worker's layout, so that all workers send the same.
    """
    return tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, on every worker. For small plain values: positions, names."""
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def total_with_gradient(tensor: Tensor) -> Tensor:
    """The sum over all workers; its gradient is the sum of theirs. Every worker runs it and its backward."""
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
