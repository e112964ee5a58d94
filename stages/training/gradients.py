"""Means over the workers of a training phase: of gradients, which every worker then applies, and of losses.

Not `DistributedDataParallel`: the discriminator runs three times a step and the two networks are updated one
after the other, which its hooks allow only with several backward passes' worth of communication. Gradients
are exchanged in gradient buckets while the backward pass computes the next ones; those of pix2pixHD's
discriminator are exchanged during the generator's backward pass.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stages.errors import one_line

Weight = TypeVar("Weight", bound=Tensor)

BUCKET_BYTES = 32 << 20
CPU_BUCKET_BYTES = 4 << 20  # over gloo: what was packed is still in the cache when it is sent
FAILURE = "failure"  # in the workers' store: why one of them failed
STORE_S = 3600.0  # a dozen calls to a store that is away, each tried for five minutes (storage.retry)


def new_group(device: torch.device, timeout_s: float) -> dist.ProcessGroup:
    """A process group of all workers. On GPUs it connects at once: a first step waits for nothing."""
    group = dist.new_group(
        timeout=timedelta(seconds=timeout_s), device_id=device if device.type == "cuda" else None
    )
    assert isinstance(group, dist.ProcessGroup)
    return group


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
    """Averages gradients over the workers, as `stages.models.step.Average`; on request keeps their norms.

    wire    the dtype in which gradients travel; None: their own
    group   the workers; None: all of the default process group
    """

    def __init__(
        self, workers: int, *, wire: torch.dtype | None = None, group: dist.ProcessGroup | None = None
    ) -> None:
        self.workers, self.wire, self.group = workers, wire, group
        self.measure = False
        """Whether to keep the norms of the averaged gradients of the next step."""
        self._exchanges: dict[int, Exchange] = {}
        """By the id of a network's first parameter."""
        self._norms: list[Tensor] = []

    def __call__(
        self, parameters: Sequence[nn.Parameter], *, during_backward: bool
    ) -> Iterable[Sequence[nn.Parameter]]:
        """Start to average; iterating the result yields parameters whose gradients are averaged."""
        averaged: Iterable[Sequence[nn.Parameter]] = [parameters]
        if self.workers > 1:
            network = id(parameters[0])
            if network not in self._exchanges:
                self._exchanges[network] = Exchange(parameters, wire=self.wire, group=self.group)
            averaged = self._exchanges[network].start(during_backward=during_backward)
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
    """The means of one network's gradients over all workers, step after step.

    Gradient buckets are sent in one order on every worker: last parameters first, as a backward pass
    completes those first. A missing gradient counts as zeros. All workers must start and iterate alike, over
    parameters of equal shapes and layouts.

    wire   the dtype in which gradients travel; None: their own
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        wire: torch.dtype | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        size = CPU_BUCKET_BYTES if parameters and parameters[0].device.type == "cpu" else BUCKET_BYTES
        self.buckets = [Bucket(members, wire, group) for members in buckets(parameters[::-1], size)]
        self._bucket_of = {id(p): bucket for bucket in self.buckets for p in bucket.parameters}
        self._sent = len(self.buckets)
        self._sending = False
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._complete)  # type: ignore[no-untyped-call]

    def start(self, *, during_backward: bool) -> Exchange:
        """Send each bucket as soon as its last gradient is complete; or, without a backward pass, all now."""
        for bucket in self.buckets:
            bucket.incomplete = {id(parameter) for parameter in bucket.parameters}
        self._sent, self._sending = 0, True
        if not during_backward:
            self._send_all()
        return self

    def __iter__(self) -> Iterator[list[nn.Parameter]]:
        """After the backward pass: send the rest, wait bucket by bucket; yields the averaged parameters."""
        self._send_all()
        for bucket in self.buckets:
            bucket.receive()
            yield bucket.parameters

    def _complete(self, parameter: Tensor) -> None:
        """Note that a gradient is complete; send the buckets that are next and complete."""
        if not self._sending:  # a backward pass of which nothing is exchanged yet
            return
        self._bucket_of[id(parameter)].incomplete.discard(id(parameter))
        while self._sent < len(self.buckets) and not self.buckets[self._sent].incomplete:
            self.buckets[self._sent].send()
            self._sent += 1

    def _send_all(self) -> None:
        for bucket in self.buckets[self._sent :]:
            bucket.send()
        self._sent, self._sending = len(self.buckets), False


class Bucket:
    """Gradients that one all-reduce averages, side by side in memory that stays from step to step."""

    def __init__(
        self, parameters: list[nn.Parameter], wire: torch.dtype | None, group: dist.ProcessGroup | None
    ) -> None:
        self.parameters, self.group = parameters, group
        self.incomplete: set[int] = set()
        """Ids of the parameters whose gradients a backward pass has not completed."""
        self._lengths = [parameter.numel() for parameter in parameters]
        self._flat = parameters[0].new_empty(sum(self._lengths), dtype=wire)
        self._work: dist.Work | None = None
        # NCCL divides while it adds; gloo, for CPUs and tests, adds only.
        self._divides = dist.get_backend(group) == "nccl"

    def send(self) -> None:
        """Start the all-reduce. The gradients' own memory is freed."""
        with torch.no_grad():
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
            torch._foreach_copy_(self._pieces(self._flat), gradients)
        for parameter in self.parameters:
            parameter.grad = None
        op = dist.ReduceOp.AVG if self._divides else dist.ReduceOp.SUM
        self._work = dist.all_reduce(self._flat, op=op, group=self.group, async_op=True)

    def receive(self) -> None:
        """Wait for the means and make them the gradients, as views."""
        assert self._work is not None
        self._work.wait()
        means = self._flat.to(self.parameters[0].dtype)
        if not self._divides:
            means.div_(dist.get_world_size(self.group))
        for parameter, mean in zip(self.parameters, self._pieces(means), strict=True):
            parameter.grad = mean

    def _pieces(self, flat: Tensor) -> list[Tensor]:
        """The part of each parameter, in its layout: packing is a plain copy."""
        parts = torch.split(flat, self._lengths)
        return [
            part.as_strided(parameter.shape, parameter.stride())
            for parameter, part in zip(self.parameters, parts, strict=True)
        ]


@contextmanager
def failing_together() -> Iterator[None]:
    """If the block fails on this worker, those that wait in `Messages.meet` fail too, and say why."""
    try:
        yield
    except BaseException as error:
        if dist.group.WORLD is not None:
            with suppress(RuntimeError):  # the worker that holds the store is gone
                text = f"worker {dist.get_rank()} failed: {one_line(error, kind=True)}"
                dist.group.WORLD.get_group_store().set(FAILURE, text)
        raise


# -- small values -------------------------------------------------------------


class Messages:
    """Small values between all workers, in a process group of their own: gradients do not delay them."""

    def __init__(self, workers: int, device: torch.device, timeout_s: float) -> None:
        self.workers, self.device = workers, device
        self._meetings = 0
        self.meet()
        self.group = new_group(device, timeout_s) if workers > 1 else None

    def meet(self) -> None:
        """Wait until all workers are here, also for one that a store keeps longer than a step may take.

        Not a collective, which would fail after the time limit of a step: each worker counts itself. The loss
        of a worker ends the wait, as Ray Train then ends the others; so does its `failing_together`.
        """
        if dist.group.WORLD is not None and self.workers > 1:
            self._meetings += 1
            store, until = dist.group.WORLD.get_group_store(), time.monotonic() + STORE_S
            name = f"meeting-{self._meetings}"
            store.add(name, 1)
            while (missing := dist.get_world_size() - store.add(name, 0)) > 0:
                if store.check([FAILURE]):
                    raise RuntimeError(store.get(FAILURE).decode())
                if time.monotonic() > until:
                    raise RuntimeError(f"{missing} workers did not come in {STORE_S:.0f} s")
                time.sleep(0.1)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all workers, as a new tensor."""
        summed = tensor.clone()
        if self.group is not None:
            dist.all_reduce(summed, group=self.group)
        return summed

    def any(self, flag: bool) -> bool:
        """Whether any worker says so. Waits for the device if there are several."""
        return bool(self.sums([float(flag)])[0])

    def sums(self, values: list[float]) -> list[float]:
        """The sum of each value over all workers. Waits for the device if there are several."""
        if self.group is None:
            return values
        summed: list[float] = self.total(torch.tensor(values, device=self.device)).tolist()
        return summed

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every worker. For plain values: positions, names."""
        if self.group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group, device=self.device)
        return values[0]

    def total_with_gradient(self, tensor: Tensor) -> Tensor:
        """The sum over all workers, and of their gradients. All run it and its backward pass."""
        summed: Tensor = _Total.apply(tensor, self)  # type: ignore[no-untyped-call]
        return summed


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, messages: Messages) -> Tensor:
        ctx.messages = messages
        return messages.total(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        messages: Messages = ctx.messages
        return messages.total_with_gradient(gradient.contiguous()), None  # R1 needs the gradient's gradient
