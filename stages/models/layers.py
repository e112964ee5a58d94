"""The operators both papers are made of.

Shapes: N batch, C channels, H height, W width; images are (N, C, H, W) with values in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import ParametrizationList

from stages import seeding
from stages.models.architecture import Upsampling
from stages.models.copies import to_device

NormKind = Literal["batch", "instance"]

Bias = bool | Literal["inert"]
"""Whether a convolution has a bias. Inert: an instance norm follows, which would subtract it again.

NVIDIA's weights have an inert bias, so it is kept and saved. It is not added: that would change nothing but
rounding, and its gradient is rounding noise that Adam would scale up to full-size steps.
"""

Noise = Sequence[torch.Generator]
"""One random source per sample of a batch: a sample's noise does not depend on its neighbours."""


class Conv(nn.Conv2d):
    """A convolution, padded with zeros or by reflection."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: int = 0,
        reflect: bool = False,
        bias: Bias = True,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel,
            stride=stride,
            padding=padding,
            padding_mode="reflect" if reflect else "zeros",
            bias=bool(bias),
        )
        self.inert_bias = bias == "inert"
        if self.inert_bias and self.bias is not None:
            self.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H', W')."""
        y: Tensor = self._conv_forward(x, self.weight, None if self.inert_bias else self.bias)
        return y


class TransposedConv(nn.ConvTranspose2d):
    """Doubles H and W: kernel 3 (Wang et al.) or 4 (Isola et al.), stride 2, padding 1."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *, bias: Bias = True) -> None:
        super().__init__(
            in_channels, out_channels, kernel, stride=2, padding=1, output_padding=kernel % 2, bias=bool(bias)
        )
        self.inert_bias = bias == "inert"
        if self.inert_bias and self.bias is not None:
            self.bias.requires_grad_(False)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, 2H, 2W)."""
        assert output_size is None
        bias = None if self.inert_bias else self.bias
        return F.conv_transpose2d(x, self.weight, bias, 2, 1, self.output_padding)


class ResizeConv(Conv):
    """Nearest-neighbour doubling, then a 3x3 convolution (Odena et al. 2016, against checkerboards)."""

    def __init__(self, in_channels: int, out_channels: int, *, bias: Bias = True) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, reflect=True, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, 2H, 2W)."""
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def up_conv(
    in_channels: int, out_channels: int, kernel: int, *, upsampling: Upsampling, bias: Bias = True
) -> TransposedConv | ResizeConv:
    """The convolution that doubles the resolution."""
    if upsampling == "resize":
        return ResizeConv(in_channels, out_channels, bias=bias)
    return TransposedConv(in_channels, out_channels, kernel, bias=bias)


class BatchNorm(nn.BatchNorm2d):
    """Batch norm that normalises each sample by its own statistics in evaluation mode.

    Isola et al. (section 3.3) keep batch statistics at test time, at batch size 1: those are the sample's
    own. Taking them sample by sample makes an image independent of the batch it is in.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape."""
        if self.training:
            return super().forward(x)
        return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)


class SynchronisedBatchNorm(BatchNorm):
    """Batch norm that normalises by the samples of all workers in training mode.

    total   sums a tensor over all workers, and its gradient too
    """

    def __init__(self, channels: int, total: Callable[[Tensor], Tensor]) -> None:
        super().__init__(channels)
        self.total = total

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape."""
        if not self.training:
            return super().forward(x)
        channels = x.shape[1]
        pixels = x.new_full((1,), x.numel() / channels, dtype=torch.float64)
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        # sums over all workers are in float64, statistics of one worker's images are not: no copy of them
        own_variance, own_mean = (v.double() for v in torch.var_mean(exact, (0, 2, 3), correction=0))
        squares = own_variance + own_mean.square()
        sums = self.total(torch.cat([own_mean * pixels, squares * pixels, pixels]))
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
        scale, shift = (each.to(exact.dtype).view(1, channels, 1, 1) for each in (scale, shift))
        return (exact * scale + shift).to(x.dtype)  # bf16 would cancel in the sum


def synchronise_batch_norms(network: nn.Module, total: Callable[[Tensor], Tensor]) -> None:
    """Replace the batch norms inside a network by `SynchronisedBatchNorm`s with the same parameters."""

    def synchronised(module: nn.Module) -> nn.Module | None:
        if not isinstance(module, BatchNorm):
            return None
        norm = SynchronisedBatchNorm(module.num_features, total)
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            setattr(norm, name, tensor)
        return norm.train(module.training)

    replace_modules(network, synchronised)


def advance_spectral_norms(network: nn.Module) -> None:
    """One power iteration of every spectral norm, for one step (Miyato et al. 2018, algorithm 1).

    An iteration for each pass, as torch's own, would make the vectors depend on a worker's rows and
    micro-batches, and the passes of a step would see different weights.
    """
    for module in network.modules():
        if isinstance(module, ParametrizationList):
            module.train()
            with torch.no_grad():
                module()
            module.eval()


def replace_modules(network: nn.Module, replacement: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """Replace, in place, every module for which `replacement` returns another; return the network."""
    other = replacement(network)
    if other is not None:
        return other
    for name, child in network.named_children():
        setattr(network, name, replace_modules(child, replacement))
    return network


def make_norm(kind: NormKind, channels: int) -> BatchNorm | nn.InstanceNorm2d:
    """A norm layer: batch norm is affine, instance norm has no parameters."""
    return BatchNorm(channels) if kind == "batch" else nn.InstanceNorm2d(channels)


class Dropout(nn.Module):
    """Dropout 0.5, the noise z of Isola et al.: on in training mode, and wherever `noise` is passed."""

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """(N, C, H, W) -> the same shape. `noise` draws each sample's mask from that sample's generator."""
        if noise is None:
            return F.dropout(x, 0.5, self.training)
        return dropped(x, drawn_masks(x.shape[1:], noise))


def drawn_masks(shape: Sequence[int], noise: Noise) -> Tensor:
    """Dropout masks (N, *shape) of 0 and 1, on the CPU: each sample's from its own source."""
    return torch.stack([torch.randint(0, 2, shape, generator=source, dtype=torch.uint8) for source in noise])


def dropped(x: Tensor, masks: Tensor) -> Tensor:
    """What is left of `x` under masks of the host, doubled."""
    return x * to_device(masks, x.device).to(x.dtype) * 2


def noise_sources(seeds: Sequence[int]) -> list[torch.Generator]:
    """One random source per sample, always on the CPU: the same noise on every device."""
    return [torch.Generator().manual_seed(seed & (2**63 - 1)) for seed in seeds]


def initialise(network: nn.Module, *, seed: int, role: str) -> None:
    """Convolutions N(0, 0.02), norms N(1, 0.02), biases 0 (both papers), from (seed, role, layer name)."""
    source = torch.Generator()
    for name, module in network.named_modules():
        if not isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d) or module.weight.is_meta:
            continue
        source.manual_seed(seeding.number(f"{seed}/{role}/{name}"))
        mean = 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0
        with torch.no_grad():
            module.weight.normal_(mean, 0.02, generator=source)
            if module.bias is not None:
                module.bias.zero_()


def half_resolution(x: Tensor) -> Tensor:
    """Average pooling 3x3, stride 2, padding not counted: (N, C, H, W) -> (N, C, ceil(H/2), ceil(W/2))."""
    return F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)


def instance_mean(features: Tensor, instance: Tensor) -> Tensor:
    """Instance-wise average pooling: mean of features (N, C, H, W) over each instance, broadcast back.

    instance   (N, 1, H, W), any integers

    Ids are ranked first, so their size does not matter: Cityscapes has 33 000 and more.
    """
    segments = instance_segments(instance)
    # At most one segment per pixel: a bound that needs no look at the device's data.
    means = segment_means(features, segments, segments.numel()).to(features.dtype)
    return spread(means, segments.view(len(features), *features.shape[2:]))


def segment_means(features: Tensor, segments: Tensor, count: int) -> Tensor:
    """(count, C): mean of features (N, C, H, W) over the pixels of each segment, 0 for one without pixels.

    segments   N*H*W numbers in [0, count), of any shape
    """
    # A float32 sum of two million pixels, added one by one, is off by 2 %.
    pixels = features.permute(0, 2, 3, 1).reshape(-1, features.shape[1]).double()
    index = segments.reshape(-1)
    sums = pixels.new_zeros(count, pixels.shape[1]).index_add_(0, index, pixels)
    counts = pixels.new_zeros(count).index_add_(0, index, torch.ones_like(pixels[:, 0])).clamp(min=1)
    return (sums / counts.unsqueeze(1)).to(torch.promote_types(features.dtype, torch.float32))


def spread(vectors: Tensor, segments: Tensor) -> Tensor:
    """(N, F, H, W): every pixel carries the vector (M, F) of its segment (N, H, W)."""
    return vectors[segments].permute(0, 3, 1, 2)


def instance_segments(instance: Tensor) -> Tensor:
    """Ids (N, 1, H, W) -> (N, H*W) int64 numbers, equal for pixels of one instance of one sample, else not.

    Numbers are in [0, N*H*W). Sorted ids change value at a segment's first pixel; the count of changes so far
    is its number.
    """
    samples = instance.shape[0]
    flat = instance.reshape(samples, -1).to(torch.int64)
    values, order = flat.sort(dim=1)
    starts = F.pad((values[:, 1:] != values[:, :-1]).to(torch.int64), (1, 0))
    rank = starts.cumsum(1) + torch.arange(samples, device=flat.device).unsqueeze(1) * flat.shape[1]
    return torch.empty_like(flat).scatter_(1, order, rank)
