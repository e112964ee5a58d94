"""The one way from the papers' plain modules to faster ones, for training and for inference."""

from __future__ import annotations

import copy
from typing import TypeVar, cast

import torch
from torch import nn

from stages.models.fast.frozen import FrozenConv, FrozenResizeConv, FrozenTransposedConv
from stages.models.fast.norms import ChannelsLastBatchNorm, ChannelsLastInstanceNorm
from stages.models.fast.reflect import ReflectingConv, ReflectingResizeConv
from stages.models.fast.wide import WideConv, WideResizeConv, WideTransposedConv
from stages.models.layers import BatchNorm, Conv, ResizeConv, TransposedConv, replace_modules

Network = TypeVar("Network", bound=nn.Module)

Replacements = dict[type[nn.Module], type[nn.Module]]

NORMS: Replacements = {nn.InstanceNorm2d: ChannelsLastInstanceNorm, BatchNorm: ChannelsLastBatchNorm}
TRAINED: Replacements = {Conv: WideConv, ResizeConv: WideResizeConv, TransposedConv: WideTransposedConv}
ON_GPUS: Replacements = {Conv: ReflectingConv, ResizeConv: ReflectingResizeConv}
FROZEN: Replacements = {Conv: FrozenConv, ResizeConv: FrozenResizeConv, TransposedConv: FrozenTransposedConv}


def accelerate(network: Network, *, device: torch.device | str, frozen: torch.dtype | None = None) -> Network:
    """A copy of the network in faster modules, under the same names: for training, or frozen for inference.

    The copy shares the weights' memory. They become channels last: the faster layout on CPUs and GPUs alike
    (benchmarks/README.md). A network to train has the very parameters of the original.

    frozen   the weights never change again: those of convolutions in this dtype, in which the network will be
             run. On CPUs, wide layers keep a second, prepacked copy from their first batch on
    """
    tensors = {id(buffer): buffer for buffer in network.buffers()}
    for parameter in network.parameters():
        tensors[id(parameter)] = _placed(parameter) if frozen is None else _frozen(parameter, frozen)
    convolutions = ON_GPUS
    if torch.device(device).type == "cpu":
        convolutions = TRAINED if frozen is None else FROZEN
    kinds = NORMS | convolutions

    def faster(module: nn.Module) -> nn.Module | None:
        kind = kinds.get(type(module))
        if kind is None:
            return None
        other = kind.__new__(kind)  # a subclass with the same settings
        other.__dict__.update(module.__dict__)
        return other

    return cast(Network, replace_modules(copy.deepcopy(network, tensors), faster))


def _placed(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.ndim == 4:
        parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return parameter


def _frozen(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    value = _placed(parameter).detach()
    return nn.Parameter(value.to(dtype) if value.ndim == 4 else value, requires_grad=False)
