"""The operators both papers are made of.

Shapes: N batch, C channels, H height, W width; images are (N, C, H, W) with values in [-1, 1].
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stages.models.architecture import Upsampling
from stages.models.fast import wide, winograd
from stages.models.fast.products import FixedMatrix, generates, working_dtype
from stages.models.fast.wide import as_matrix, wide_conv, wide_transposed_conv
from stages.models.fast.winograd import Filter

NormKind = Literal["batch", "instance"]

MIN_PAINTED = 2**17
"""Numbers of a sample from which `transposed_conv_to_few` is the faster way: 32 channels of 64x64."""

WINOGRAD = {(3, 1): 3, (4, 2): 2}
"""Taps of the filter that a convolution of a kernel and a stride is to `winograd`."""

Noise = Sequence[torch.Generator]
"""One random source per sample of a batch: a sample's noise does not depend on its neighbours."""


class Conv(nn.Conv2d):
    """A convolution. With `inert_bias` an instance norm follows and subtracts the bias again.

    Published weights have that bias, so it is kept and counted; adding it would change nothing but rounding,
    and its gradient is rounding noise that Adam would blow up to full-size steps. So it is left out.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: int = 0,
        reflect: bool = False,
        bias: bool = True,
        inert_bias: bool = False,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel,
            stride=stride,
            padding=padding,
            padding_mode="reflect" if reflect else "zeros",
            bias=bias or inert_bias,
        )
        self.inert_bias = inert_bias
        self.fixed = False  # see `fix_weights`
        if inert_bias and self.bias is not None:
            self.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H', W')."""
        bias = None if self.inert_bias else self.bias
        stride, padding = self.stride[0], int(self.padding[0])
        reflect = self.padding_mode == "reflect"
        rows = x.shape[0] * (x.shape[2] // stride) * (x.shape[3] // stride)
        fixed, taps = _is_fixed(self, x), WINOGRAD.get((self.kernel_size[0], stride))
        if fixed and taps and winograd.suits(x, self.weight, self.out_channels, taps=taps, stride=stride):
            y = self._filter(x, padding=padding, reflect=reflect)
            return _with_bias(y.contiguous(memory_format=torch.channels_last), bias)
        if wide.suits(x, self.weight, rows):
            matrix = self._matrix if fixed else None
            y = wide_conv(x, self.weight, stride=stride, padding=padding, reflect=reflect, matrix=matrix)
            return _with_bias(y, bias)
        return cast(Tensor, self._conv_forward(x, self.weight, bias))

    @cached_property
    def _filter(self) -> Filter:
        return Filter(self.weight, stride=self.stride[0])

    @cached_property
    def _matrix(self) -> FixedMatrix:
        return FixedMatrix(as_matrix(self.weight).T)


def _is_fixed(layer: Conv | TransposedConv, x: Tensor) -> bool:
    """Whether a layer works with what was made of its weights; see `fix_weights`."""
    return layer.fixed and generates(x) and working_dtype(x) == layer.weight.dtype


def _with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias.view(1, -1, 1, 1)


class TransposedConv(nn.ConvTranspose2d):
    """Doubles H and W: kernel 3 (Wang et al.) or 4 (Isola et al.), stride 2, padding 1."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, *, bias: bool = True, inert_bias: bool = False
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel,
            stride=2,
            padding=1,
            output_padding=kernel % 2,
            bias=bias or inert_bias,
        )
        self.inert_bias = inert_bias
        self.fixed = False  # see `fix_weights`
        if inert_bias and self.bias is not None:
            self.bias.requires_grad_(False)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, 2H, 2W)."""
        assert output_size is None
        bias = None if self.inert_bias else self.bias
        fixed, channels = _is_fixed(self, x), 4 * self.out_channels  # of the four pixels that one becomes
        if fixed and self.kernel_size[0] == 4 and winograd.suits(x, self.weight, channels, taps=2, stride=1):
            return _with_bias(interleaved(self._filter(x, padding=1)), bias)
        if wide.suits(x, self.weight, x.shape[0] * x.shape[2] * x.shape[3]):
            matrix = self._matrix if fixed else None
            return _with_bias(wide_transposed_conv(x, self.weight, matrix=matrix), bias)
        if self._paints(x):
            return transposed_conv_to_few(x, self.weight, bias)
        return F.conv_transpose2d(x, self.weight, bias, 2, 1, self.output_padding)

    @cached_property
    def _filter(self) -> Filter:
        return Filter(over_pixels(self.weight))

    @cached_property
    def _matrix(self) -> FixedMatrix:
        return FixedMatrix(as_matrix(self.weight))

    def _paints(self, x: Tensor) -> bool:
        """Whether it makes a large picture's few channels, on a CPU, and no gradients are asked for."""
        return (
            generates(x)
            and self.kernel_size[0] == 4
            and self.out_channels <= 4
            and x[0].numel() >= MIN_PAINTED  # whatever is batched with it
        )


def transposed_conv_to_few(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A transposed convolution of kernel 4, stride 2, padding 1, as a convolution of kernel 2: the same sums.

    The four pixels that a pixel becomes are made as channels of one: the library computes 16 channels in the
    time of 3.

    (N, C_in, H, W), weights (C_in, C_out, 4, 4) -> (N, C_out, 2H, 2W), channels last.
    """
    kernel = over_pixels(weight).contiguous(memory_format=torch.channels_last)
    return interleaved(F.conv2d(x, kernel, None if bias is None else bias.repeat(4), padding=1))


def over_pixels(weight: Tensor) -> Tensor:
    """Weights of a transposed convolution as a filter: (C_in, C_out, 4, 4) -> (4 * C_out, C_in, 2, 2).

    Of the four pixels that an input pixel becomes each sees 2x2 taps.
    """
    taps = torch.tensor([[3, 1], [2, 0]])  # of an even and an odd row, in the two rows above and below it
    of_rows = weight[:, :, taps]  # (C_in, C_out, parity, row, 4)
    of_pixels = of_rows[..., taps].permute(2, 4, 1, 0, 3, 5)  # (parity, parity, C_out, C_in, row, column)
    return of_pixels.flatten(0, 2)


def interleaved(made: Tensor) -> Tensor:
    """What the filter of `over_pixels` makes, padded by 1: (N, 4 * C_out, H+1, W+1) -> (N, C_out, 2H, 2W)."""
    samples, channels, height, width = made.shape
    height, width, channels = height - 1, width - 1, channels // 4
    made = made.permute(0, 2, 3, 1).view(samples, height + 1, width + 1, 2, 2, channels)  # parities
    y = made.new_empty(samples, height, 2, width, 2, channels)
    for odd_row in range(2):
        for odd_column in range(2):
            part = made[:, odd_row : odd_row + height, odd_column : odd_column + width, odd_row, odd_column]
            y[:, :, odd_row, :, odd_column] = part
    return y.view(samples, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)


class ResizeConv(Conv):
    """Nearest-neighbour doubling, then a 3x3 convolution (Odena et al. 2016, against checkerboards)."""

    def __init__(
        self, in_channels: int, out_channels: int, *, bias: bool = True, inert_bias: bool = False
    ) -> None:
        super().__init__(
            in_channels, out_channels, 3, padding=1, reflect=True, bias=bias, inert_bias=inert_bias
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, 2H, 2W)."""
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def up_conv(
    in_channels: int,
    out_channels: int,
    kernel: int,
    *,
    upsampling: Upsampling,
    bias: bool = True,
    inert_bias: bool = False,
) -> TransposedConv | ResizeConv:
    """The convolution that doubles the resolution."""
    if upsampling == "resize":
        return ResizeConv(in_channels, out_channels, bias=bias, inert_bias=inert_bias)
    return TransposedConv(in_channels, out_channels, kernel, bias=bias, inert_bias=inert_bias)


def fix_weights(network: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Have a network generate faster on CPUs: its weights change no more. `dtype` is what it will work in.

    From its first batch on, a float32 layer of many channels keeps sums of its weights (`winograd`), which
    take 16/9 of the weights' memory for kernel 3, four times for kernel 4; one with too few pixels for that,
    or in bf16, keeps a copy of them, laid out for products (`products`).
    """
    for module in network.modules():
        if isinstance(module, Conv | TransposedConv):
            module.fixed = True
            module.weight.data = module.weight.data.to(dtype)


class InstanceNorm(nn.InstanceNorm2d):
    """Each channel of each sample to mean 0 and variance 1; no parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape and memory format."""
        return _normalised_each(x, None, None, self.eps)


def _normalised_each(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Instance norm, then times `weight` plus `bias`; keeps the memory format.

    torch's instance norm copies channels-last pictures on every device and returns them contiguous; its batch
    norm does not.
    """
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    if torch.compiler.is_compiling() or not channels_last:
        return F.instance_norm(x, weight=weight, bias=bias, eps=eps)
    if x.device.type == "cpu":
        y: Tensor = _ChannelsLastNorm.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call]
        return y
    samples = [
        F.batch_norm(one, None, None, weight, bias, training=True, eps=eps) for one in torch.split(x, 1)
    ]
    return samples[0] if len(samples) == 1 else torch.cat(samples)


class _ChannelsLastNorm(torch.autograd.Function):
    """Batch norm of every picture by itself, with statistics that stay exact on large maps.

    The library's kernel adds up a channel in one float32, and is 1e-2 off at 512x256 where means are far from
    0. Here it does so for each column of the picture (a view), and columns are put together in float64.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        samples, channels, height, width = x.shape
        rows = x.permute(0, 2, 3, 1)
        columns = rows.view(samples, 1, height, 1, width * channels).permute(0, 1, 4, 2, 3)
        found = [torch.batch_norm_update_stats(one, None, None, 0.0) for one in columns]
        means, variances = (
            torch.stack(each).view(samples, width, channels).double() for each in zip(*found, strict=True)
        )
        mean = means.mean(1)
        variance = variances.add_((means - mean[:, None]).square_()).mean(1)
        scale = (variance + eps).rsqrt_() if weight is None else (variance + eps).rsqrt_() * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        exact = torch.promote_types(x.dtype, torch.float32)
        y = torch.empty_like(x)
        factor, summand = (one.to(exact)[:, None, None] for one in (scale, shift))
        torch.addcmul(summand, rows, factor, out=y.permute(0, 2, 3, 1))
        ctx.save_for_backward(x, weight, mean.to(exact), variance.to(exact))
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, means, variances = ctx.saved_tensors
        scales, affine = (variances + ctx.eps).rsqrt(), weight is not None
        parts = [
            torch.ops.aten.native_batch_norm_backward(
                of_y, one, weight, None, None, mean, scale, True, ctx.eps, [True, affine, affine]
            )
            for of_y, one, mean, scale in zip(
                torch.split(gradient, 1), torch.split(x, 1), means, scales, strict=True
            )
        ]
        of_x = [part[0] for part in parts]
        return (
            of_x[0] if len(of_x) == 1 else torch.cat(of_x),
            torch.stack([part[1] for part in parts]).sum(0) if affine else None,
            torch.stack([part[2] for part in parts]).sum(0) if affine else None,
            None,
        )


class BatchNorm(nn.BatchNorm2d):
    """Batch norm whose inference normalises every sample by its own statistics unless told otherwise.

    The paper keeps batch statistics at test time, at batch 1: those are the sample's own. Taking them sample
    by sample makes a picture independent of what it was batched with. `sample_statistics = False` (see
    `use_running_statistics`) takes the running averages instead, the usual evaluation mode.
    """

    sample_statistics: bool = True
    total: Callable[[Tensor], Tensor] | None = None
    """In training on several workers: sums a tensor over all of them, and its gradient too; None: each worker
    normalises by its own pictures."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape."""
        if self.training and self.total is not None:
            return self._by_all_workers(x, self.total)
        if self.training or not self.sample_statistics:
            return super().forward(x)
        return _normalised_each(x, self.weight, self.bias, self.eps)

    def _by_all_workers(self, x: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
        axes, channels = (0, 2, 3), x.shape[1]
        own = x.new_full((1,), x.numel() / channels, dtype=torch.float64)
        wide = x.to(torch.float64)
        sums = total(torch.cat([wide.sum(axes), wide.square().sum(axes), own]))
        count = sums[-1].detach()
        mean = sums[:channels] / count
        variance = (sums[channels:-1] / count - mean.square()).clamp(min=0)
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            unbiased = variance * (count / (count - 1).clamp(min=1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        shape = (1, channels, 1, 1)
        return x * scale.to(x.dtype).view(shape) + shift.to(x.dtype).view(shape)


def use_running_statistics(network: nn.Module, *, running: bool) -> None:
    """Choose what batch norms use at inference: running averages, or each sample's own statistics."""
    for module in network.modules():
        if isinstance(module, BatchNorm):
            module.sample_statistics = not running


def synchronise_norms(network: nn.Module, total: Callable[[Tensor], Tensor]) -> None:
    """Have batch norms in training normalise by the pictures of all workers; see `BatchNorm.total`."""
    for module in network.modules():
        if isinstance(module, BatchNorm):
            module.total = total


def make_norm(kind: NormKind, channels: int) -> BatchNorm | InstanceNorm:
    """A norm layer: batch norm is affine, instance norm is not."""
    return BatchNorm(channels) if kind == "batch" else InstanceNorm(channels)


class Dropout(nn.Module):
    """Dropout 0.5, the noise z of Isola et al.: on in training, and wherever `noise` is given."""

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """(N, C, H, W) -> the same shape. `noise` draws each sample's mask from that sample's generator."""
        if noise is None:
            return F.dropout(x, 0.5, self.training)
        shape = x.shape[1:]
        masks = torch.stack(
            [torch.randint(0, 2, shape, generator=s, dtype=torch.uint8, device=s.device) for s in noise]
        )
        return x * masks.to(x.device, x.dtype) * 2


def noise_sources(seeds: Sequence[int]) -> list[torch.Generator]:
    """One random source per sample, always on the CPU: the same noise on every device."""
    return [torch.Generator().manual_seed(seed & (2**63 - 1)) for seed in seeds]


def initialise(network: nn.Module, *, seed: int, role: str) -> None:
    """Convolutions N(0, 0.02), norms N(1, 0.02), biases 0 (both papers), from (seed, role, layer name)."""
    source = torch.Generator()
    for name, module in network.named_modules():
        if not isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d) or module.weight.is_meta:
            continue
        digest = hashlib.blake2b(f"{seed}/{role}/{name}".encode(), digest_size=8).digest()
        source.manual_seed(int.from_bytes(digest, "little") >> 1)
        mean = 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0
        with torch.no_grad():
            module.weight.normal_(mean, 0.02, generator=source)
            if module.bias is not None:
                module.bias.zero_()


def half_resolution(x: Tensor) -> Tensor:
    """Average pooling 3x3, stride 2, padding not counted: (N, C, H, W) -> (N, C, ceil(H/2), ceil(W/2))."""
    return F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)
