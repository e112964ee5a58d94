"""Instance norm of channels-last images that keeps their layout and stays exact on large maps.

torch's instance norm copies channels-last images on every device and returns them contiguous; its batch norm
does not, so each large sample is one batch here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stages.models.layers import BatchNorm

LARGE = 2**20
"""Numbers of a sample from which, on a GPU, its bytes take longer than the launches of its own kernels: by
arithmetic (3 launches of 3 us; 40 more bytes a number at 3 TB/s), not measured. Twice as many without a
backward pass: a launch; 4 more bytes a number in bf16, as the samples' maps need not be joined."""


class ChannelsLastInstanceNorm(nn.InstanceNorm2d):
    """`nn.InstanceNorm2d` without parameters, in the layout of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape and memory format."""
        return instance_norm(x, None, None, self.eps)


class ChannelsLastBatchNorm(BatchNorm):
    """`BatchNorm` in the layout of its input, in evaluation mode too."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape and memory format."""
        return super().forward(x) if self.training else instance_norm(x, self.weight, self.bias, self.eps)


def instance_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Each channel of each sample to mean 0 and variance 1, then times `weight` (C,) plus `bias` (C,)."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    if torch.compiler.is_compiling() or not channels_last:
        return F.instance_norm(x, weight=weight, bias=bias, eps=eps)
    if x.device.type == "cpu":
        y: Tensor = _InstanceNorm.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call]
        return y
    if x.shape[0] > 1 and x[0].numel() < (LARGE if x.requires_grad else 2 * LARGE):
        together: Tensor = _SmallInstanceNorm.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call]
        return together
    samples = [x] if x.shape[0] == 1 else torch.split(x, 1)  # a split's gradient is a copy, even of one
    norms = [F.batch_norm(sample, None, None, weight, bias, training=True, eps=eps) for sample in samples]
    return norms[0] if len(norms) == 1 else torch.cat(norms)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (N, C), float64, of each channel of each sample (N, C, H, W).

    On a CPU torch's batch norm kernel sums each column of the image (a view), and columns are combined in
    float64: it sums a channel in one float32, and is 1e-2 off at 512x256 where means are far from 0.
    """
    samples, channels, height, width = x.shape
    if x.device.type != "cpu":
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(exact, (2, 3), correction=0)
        return mean.double(), variance.double()
    columns = x.permute(0, 2, 3, 1).reshape(samples, 1, height, 1, width * channels).permute(0, 1, 4, 2, 3)
    statistics = [torch.batch_norm_update_stats(sample, None, None, 0.0) for sample in columns]
    means, variances = (
        torch.stack(each).view(samples, width, channels).double() for each in zip(*statistics, strict=True)
    )
    mean = means.mean(1)
    return mean, variances.add_((means - mean[:, None]).square_()).mean(1)


class _SmallInstanceNorm(torch.autograd.Function):
    """All samples in the launches of one, for GPUs: statistics and sums in float32 or better.

    It moves about three times the bytes of torch's fused batch norm, so it is for samples that take less time
    than a launch.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        variance, mean = torch.var_mean(x.to(exact), (2, 3), correction=0, keepdim=True)  # (N, C, 1, 1)
        rate = (variance + eps).rsqrt_()
        scale = rate if weight is None else rate * weight.view(1, -1, 1, 1)
        shift = -mean * scale if bias is None else bias.view(1, -1, 1, 1) - mean * scale
        ctx.save_for_backward(x, weight, mean, rate)
        return torch.addcmul(shift, x, scale, out=torch.empty_like(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rate = ctx.saved_tensors
        pixels = x.shape[2] * x.shape[3]
        normalised = torch.addcmul(-mean * rate, x, rate)
        of_bias = gradient.sum((2, 3), keepdim=True, dtype=normalised.dtype)  # (N, C, 1, 1), as the next
        of_weight = normalised.mul_(gradient).sum((2, 3), keepdim=True)
        scale = rate if weight is None else rate * weight.view(1, -1, 1, 1)
        slope = of_weight * rate * scale / -pixels
        rest = torch.addcmul(-mean * slope - of_bias * scale / pixels, x, slope)
        return (
            torch.addcmul(rest, gradient, scale, out=torch.empty_like(x)),
            None if weight is None else of_weight.sum((0, 2, 3)),
            None if weight is None else of_bias.sum((0, 2, 3)),
            None,
        )


class _InstanceNorm(torch.autograd.Function):
    """Instance norm of channels-last images on CPUs, by `moments`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        rows = x.permute(0, 2, 3, 1)
        mean, variance = moments(x)
        scale = (variance + eps).rsqrt_() if weight is None else (variance + eps).rsqrt_() * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        exact = torch.promote_types(x.dtype, torch.float32)
        y = torch.empty_like(x)
        factor, summand = (each.to(exact)[:, None, None] for each in (scale, shift))
        torch.addcmul(summand, rows, factor, out=y.permute(0, 2, 3, 1))
        ctx.save_for_backward(x, weight, mean.to(exact), variance.to(exact))
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, means, variances = ctx.saved_tensors
        scales, affine = (variances + ctx.eps).rsqrt(), weight is not None
        gradients = [
            torch.ops.aten.native_batch_norm_backward(
                of_y, sample, weight, None, None, mean, scale, True, ctx.eps, [True, affine, affine]
            )
            for of_y, sample, mean, scale in zip(
                torch.split(gradient, 1), torch.split(x, 1), means, scales, strict=True
            )
        ]
        of_x = [each[0] for each in gradients]
        return (
            of_x[0] if len(of_x) == 1 else torch.cat(of_x),
            torch.stack([each[1] for each in gradients]).sum(0) if affine else None,
            torch.stack([each[2] for each in gradients]).sum(0) if affine else None,
            None,
        )
