"""Networks with frozen weights, for inference: on CPUs the same sums, from weights that are prepared once.

A layer prepares its weights at the first batch that needs it.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.models.fast import wide, winograd
from stages.models.fast.accelerate import ON_GPUS, Network, Replacements, channels_last, faster_copy
from stages.models.fast.wide import PackedMatrix, WideConv, WideTransposedConv, add_bias
from stages.models.layers import Conv, ResizeConv, TransposedConv

MIN_UPSAMPLED = 2**17
"""Numbers of a sample from which `transposed_conv_to_few` is faster: 32 channels of 64x64."""


class FrozenConv(WideConv):
    """A convolution by Winograd's sums or a prepacked matrix, where the layer is wide enough for one."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H', W'), channels last."""
        if not _prepared(x, self.weight):
            return super().forward(x)
        padding, reflect = int(self.padding[0]), self.padding_mode == "reflect"
        if self.kernel_size[0] == 3 and self.stride[0] == 1 and winograd.suits(x, self.weight):
            y = self._filter(x, padding=padding, reflect=reflect)
            y = y.contiguous(memory_format=torch.channels_last)
        elif wide.suits(x, self.weight, self.output_rows(x)):
            y = self._product(x, padding, reflect)
        else:
            return super().forward(x)
        return add_bias(y, None if self.inert_bias else self.bias)

    @wide.without_autocast
    def _product(self, x: Tensor, padding: int, reflect: bool) -> Tensor:
        padded = wide.pad(x.to(self._matrix.dtype), padding, reflect)
        patches, height, width = wide.patches_of(padded, self.kernel_size[0], self.stride[0])
        return self._matrix.product(patches).view(len(x), height, width, -1).permute(0, 3, 1, 2)

    @cached_property
    def _filter(self) -> winograd.Filter:
        return winograd.Filter(self.weight)

    @cached_property
    def _matrix(self) -> PackedMatrix:
        return PackedMatrix(wide.as_matrix(self.weight).T)


class FrozenResizeConv(ResizeConv, FrozenConv):
    """Nearest-neighbour doubling, then a frozen convolution."""


class FrozenTransposedConv(WideTransposedConv):
    """A transposed convolution by a prepacked matrix, or to few channels by a convolution."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, 2H, 2W), channels last."""
        bias = None if self.inert_bias else self.bias
        if wide.suits(x, self.weight, self.input_rows(x)):
            if not _prepared(x, self.weight):
                return super().forward(x, output_size)
            products = self._matrix.product(wide.rows_of(x.to(self._matrix.dtype)))
            return add_bias(wide.doubled(products, x.shape, self.kernel_size[0]), bias)
        to_few = self.kernel_size[0] == 4 and self.out_channels <= 4
        if to_few and not torch.is_grad_enabled() and x[0].numel() >= MIN_UPSAMPLED:
            return transposed_conv_to_few(x, self.weight, bias)
        return super().forward(x, output_size)

    @cached_property
    def _matrix(self) -> PackedMatrix:
        return PackedMatrix(wide.as_matrix(self.weight))


FROZEN: Replacements = {Conv: FrozenConv, ResizeConv: FrozenResizeConv, TransposedConv: FrozenTransposedConv}


def freeze(network: Network, *, device: torch.device | str, dtype: torch.dtype) -> Network:
    """A copy of the network in faster modules, under the same names, whose weights never change again.

    It shares the weights' memory; those of convolutions are in `dtype`, in which the network will be run. On
    CPUs, wide layers keep a second, prepacked copy from their first batch on.
    """

    def frozen(parameter: nn.Parameter) -> nn.Parameter:
        value = channels_last(parameter).detach()
        return nn.Parameter(value.to(dtype) if value.ndim == 4 else value, requires_grad=False)

    return faster_copy(network, FROZEN if torch.device(device).type == "cpu" else ON_GPUS, frozen)


def _prepared(x: Tensor, weight: Tensor) -> bool:
    """Whether to use what was prepared: no gradients, and the layer computes in the weights' dtype."""
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    return not torch.is_grad_enabled() and dtype == weight.dtype


def transposed_conv_to_few(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A transposed convolution of kernel 4, stride 2, padding 1, as a convolution of kernel 2: the same sums.

    Each input pixel becomes four output pixels, computed as channels of one: oneDNN computes 16 channels in
    the time of 3.

    (N, C_in, H, W), weights (C_in, C_out, 4, 4) -> (N, C_out, 2H, 2W), channels last.
    """
    taps = torch.tensor([[3, 1], [2, 0]])  # of an even and an odd row, in the two rows above and below it
    of_rows = weight[:, :, taps]  # (C_in, C_out, parity, row, 4)
    kernel = of_rows[..., taps].permute(2, 4, 1, 0, 3, 5).flatten(0, 2)  # (4 * C_out, C_in, 2, 2)
    kernel = kernel.contiguous(memory_format=torch.channels_last)
    pixels = F.conv2d(x, kernel, None if bias is None else bias.repeat(4), padding=1)
    samples, channels = len(x), weight.shape[1]
    height, width = x.shape[2:]
    pixels = pixels.permute(0, 2, 3, 1).view(samples, height + 1, width + 1, 2, 2, channels)
    y = pixels.new_empty(samples, height, 2, width, 2, channels)
    for row in range(2):
        for column in range(2):
            y[:, :, row, :, column] = pixels[:, row : row + height, column : column + width, row, column]
    return y.view(samples, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)
