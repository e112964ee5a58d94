"""Means over the workers of a training phase: of gradients, which all apply alike, and of losses.

By hand rather than by `DistributedDataParallel`: the discriminator is used three times a step and the two
networks are stepped one after the other, which its hooks do not allow for without several backward passes'
worth of communication. Gradients travel in buckets, the next one being packed while the last is on its way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 32 << 20
CPU_BUCKET_BYTES = 4 << 20  # over gloo: what was packed is still in the cache when it is sent


def buckets(tensors: Sequence[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Tensors of one dtype, in order, in groups of about `size` bytes."""
    group: list[Tensor] = []
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


def average(tensors: Sequence[Tensor]) -> None:
    """Replace tensors, in place, by their mean over all workers. Every worker passes equal shapes."""
    world = dist.get_world_size()
    size = CPU_BUCKET_BYTES if tensors and tensors[0].device.type == "cpu" else BUCKET_BYTES
    travelling = []
    for group in buckets([_pixels_last(tensor) for tensor in tensors], size):
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        travelling.append((group, flat, dist.all_reduce(flat, async_op=True)))
    for group, flat, work in travelling:
        assert work is not None
        work.wait()
        means = torch.split(flat.div_(world), [tensor.numel() for tensor in group])
        for tensor, mean in zip(group, means, strict=True):
            tensor.copy_(mean.view_as(tensor))


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
