"""The way from the papers' plain modules to faster ones. Weights that never change have another: `frozen`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stages.models.fast.norms import ChannelsLastBatchNorm, ChannelsLastInstanceNorm
from stages.models.fast.wide import WideConv, WideResizeConv, WideTransposedConv, unpad
from stages.models.inputs import reflected
from stages.models.layers import BatchNorm, Conv, ResizeConv, TransposedConv, replace_modules

Network = TypeVar("Network", bound=nn.Module)

Replacements = dict[type[nn.Module], type[nn.Module]]

# -- reflection padding that stays channels last, for GPUs ---------------------
# CUDA's reflection padding copies its input to channels first, returns that, and adds gradients with atomics,
# in another order each time. Here pixels are gathered whole, and gradients added in one order.


class ReflectingConv(Conv):
    """A convolution whose reflection padding keeps the layout."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H', W')."""
        if self.padding_mode != "reflect" or torch.compiler.is_compiling():
            return super().forward(x)
        padded: Tensor = _Reflect.apply(x, int(self.padding[0]))  # type: ignore[no-untyped-call]
        return F.conv2d(padded, self.weight, None if self.inert_bias else self.bias, self.stride)


class ReflectingResizeConv(ResizeConv, ReflectingConv):
    """Nearest-neighbour doubling, then a reflecting convolution."""


@lru_cache(64)
def _mirrored(side: int, padding: int, device: torch.device) -> Tensor:
    """Where each of `side + 2 * padding` padded pixels comes from."""
    return reflected(torch.arange(-padding, side + padding, device=device), side)


class _Reflect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, padding: int) -> Tensor:
        ctx.padding = padding
        rows, columns = (_mirrored(side, padding, x.device) for side in x.shape[2:])
        return x.permute(0, 2, 3, 1)[:, rows[:, None], columns].permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """A view: the next operator writes a dense map anyway."""
        padded = gradient.clone(memory_format=torch.channels_last)
        return unpad(padded, ctx.padding, reflect=True), None


# -- one module for another ----------------------------------------------------

NORMS: Replacements = {nn.InstanceNorm2d: ChannelsLastInstanceNorm, BatchNorm: ChannelsLastBatchNorm}
ON_CPUS: Replacements = {Conv: WideConv, ResizeConv: WideResizeConv, TransposedConv: WideTransposedConv}
ON_GPUS: Replacements = {Conv: ReflectingConv, ResizeConv: ReflectingResizeConv}


def accelerate(network: Network, *, device: torch.device | str) -> Network:
    """A copy of a network to train in faster modules, under the same names, with the very same parameters.

    They become channels last: the faster layout on CPUs and GPUs alike (benchmarks/README.md).
    """
    return faster_copy(network, ON_CPUS if torch.device(device).type == "cpu" else ON_GPUS, channels_last)


def faster_copy(
    network: Network, convolutions: Replacements, convert: Callable[[nn.Parameter], nn.Parameter]
) -> Network:
    """A copy with converted parameters, the same buffers, and modules replaced by these and by `NORMS`."""
    tensors = {id(buffer): buffer for buffer in network.buffers()}
    tensors |= {id(parameter): convert(parameter) for parameter in network.parameters()}
    kinds = NORMS | convolutions

    def faster(module: nn.Module) -> nn.Module | None:
        kind = kinds.get(type(module))
        if kind is None:
            return None
        other = kind.__new__(kind)  # a subclass with the same settings
        other.__dict__.update(module.__dict__)
        return other

    return cast(Network, replace_modules(copy.deepcopy(network, tensors), faster))


def channels_last(parameter: nn.Parameter) -> nn.Parameter:
    """The same parameter, whose memory is channels last from now on."""
    if parameter.ndim == 4:
        parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return parameter
