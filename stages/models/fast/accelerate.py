"""The way from the papers' plain modules to faster ones. Weights that never change have another: `frozen`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import nn

from stages.models.fast.norms import ChannelsLastBatchNorm, ChannelsLastInstanceNorm
from stages.models.fast.reflect import ReflectingConv, ReflectingResizeConv
from stages.models.fast.wide import WideConv, WideResizeConv, WideTransposedConv
from stages.models.layers import BatchNorm, Conv, ResizeConv, TransposedConv, replace_modules

Network = TypeVar("Network", bound=nn.Module)

Replacements = dict[type[nn.Module], type[nn.Module]]

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
