"""Pix2PixHD: the networks of Wang et al. 2018 (arXiv:1711.11585), section 3.

    G1, global generator     conv7-64, d128, d256, d512, d1024, 9 x R1024, u512, u256, u128, u64, conv7-3
    G2, local enhancer       conv7-32, d64, (+ G1's last features), 3 x R64, u32, conv7-3
    G3 and beyond            nest the same way, each at twice the resolution and half the width
    D                        identical PatchGANs on an image pyramid
    E, feature encoder       conv7-16, d32 ... d256, u128 ... u16, conv7-3, then the mean over each instance

dk: conv3 stride 2; uk: transposed conv3 stride 2; Rk: residual block; each with instance norm and ReLU.
Weight names: `coarse.{stem,down.I,blocks.I,up.I}`, `enhancers.N.{stem,down,blocks.I,up}` (0 = innermost),
`head` (the outermost part's last convolution), `scales.K.blocks.I` (0 = full resolution).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from stages.models.architecture import Upsampling
from stages.models.inputs import padded_size, reflect_to
from stages.models.layers import Conv, Noise, half_resolution, instance_mean, up_conv
from stages.models.pix2pix import PatchDiscriminator


class ConvNormReLU(nn.Module):
    """Convolution, instance norm, ReLU."""

    def __init__(self, conv: nn.Module, channels: int) -> None:
        super().__init__()
        self.conv = conv
        self.norm = nn.InstanceNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H', W')."""
        return F.relu(self.norm(self.conv(x)), inplace=True)


def stem(in_channels: int, width: int) -> ConvNormReLU:
    """conv7-k: reflection padding, 7x7 convolution, instance norm, ReLU."""
    conv = Conv(in_channels, width, 7, padding=3, reflect=True, bias="inert")
    return ConvNormReLU(conv, width)


def down(in_channels: int) -> ConvNormReLU:
    """dk: halves the resolution and doubles the channels."""
    conv = Conv(in_channels, 2 * in_channels, 3, stride=2, padding=1, bias="inert")
    return ConvNormReLU(conv, 2 * in_channels)


def up(in_channels: int, upsampling: Upsampling) -> ConvNormReLU:
    """uk: doubles the resolution and halves the channels."""
    conv = up_conv(in_channels, in_channels // 2, 3, upsampling=upsampling, bias="inert")
    return ConvNormReLU(conv, in_channels // 2)


class ResidualBlock(nn.Module):
    """Rk: x + IN(conv(ReLU(IN(conv(x))))), reflection padding; nothing after the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = Conv(channels, channels, 3, padding=1, reflect=True, bias="inert")
        self.norm1 = nn.InstanceNorm2d(channels)
        self.conv2 = Conv(channels, channels, 3, padding=1, reflect=True, bias="inert")
        self.norm2 = nn.InstanceNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape."""
        y: Tensor = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(y))
        y += x
        return y


class Head(nn.Module):
    """conv7 to the image's channels, tanh."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = Conv(in_channels, out_channels, 7, padding=3, reflect=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C_out, H, W) in [-1, 1]."""
        return torch.tanh(self.conv(x))


class GlobalGenerator(nn.Module):
    """G1 without its last convolution: everything up to its last feature map."""

    def __init__(
        self,
        in_channels: int,
        *,
        width: int = 64,
        downsamplings: int = 4,
        blocks: int = 9,
        upsampling: Upsampling = "transpose",
    ) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(downsamplings + 1)]
        self.stem = stem(in_channels, width)
        self.down = nn.ModuleList(down(channels) for channels in widths[:-1])
        self.blocks = nn.ModuleList(ResidualBlock(widths[-1]) for _ in range(blocks))
        self.up = nn.ModuleList(up(channels, upsampling) for channels in reversed(widths[1:]))

    def layers(self) -> list[nn.Module]:
        """All layers, from the input to the last feature map."""
        return [self.stem, *self.down, *self.blocks, *self.up]

    def forward(self, x: Tensor, run: Runner) -> Tensor:
        """(N, C_in, H, W) -> (N, width, H, W)."""
        for layer in self.layers():
            x = run(layer, x)
        return x


class LocalEnhancer(nn.Module):
    """G2 and beyond, without the last convolution."""

    def __init__(self, in_channels: int, *, width: int, blocks: int, upsampling: Upsampling) -> None:
        super().__init__()
        self.stem = stem(in_channels, width)
        self.down = down(width)
        self.blocks = nn.ModuleList(ResidualBlock(2 * width) for _ in range(blocks))
        self.up = up(2 * width, upsampling)

    def forward(self, x: Tensor, coarse: Tensor, run: Runner) -> Tensor:
        """Input (N, C_in, H, W) and coarse features (N, 2 width, H/2, W/2) -> (N, width, H, W)."""
        x = run(self.down, run(self.stem, x)) + coarse
        for block in self.blocks:
            x = run(block, x)
        return run(self.up, x)


Runner = Callable[[nn.Module, Tensor], Tensor]
"""Runs a layer: plainly, or keeping only its input and computing it again in the backward pass."""


def _plain(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)  # type: ignore[no-any-return]


def _checkpointed(layer: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]


class CoarseToFineGenerator(nn.Module):
    """G1 inside any number of local enhancers. Sides: multiples of 2**(downsamplings + enhancers).

    checkpointing   keep only the layers' inputs for the backward pass and compute the rest again: less
                    memory, more time, the same result
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        global_width: int = 64,
        downsamplings: int = 4,
        blocks: int = 9,
        enhancers: int = 0,
        enhancer_blocks: int = 3,
        upsampling: Upsampling = "transpose",
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.enhancer_blocks = enhancer_blocks
        self.coarse = GlobalGenerator(
            in_channels,
            width=global_width,
            downsamplings=downsamplings,
            blocks=blocks,
            upsampling=upsampling,
        )
        self.enhancers = nn.ModuleList(
            LocalEnhancer(
                in_channels, width=global_width // 2**n, blocks=enhancer_blocks, upsampling=upsampling
            )
            for n in range(1, enhancers + 1)
        )
        self.head = Head(global_width // 2**enhancers, out_channels)

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:  # noqa: ARG002 - the U-Net's signature
        """(N, C_in, H, W) -> (N, C_out, H, W) in [-1, 1]. There is no noise in this generator."""
        run: Runner = _checkpointed if self.checkpointing and torch.is_grad_enabled() else _plain
        pyramid = [x]  # full resolution first
        for _ in self.enhancers:
            pyramid.append(half_resolution(pyramid[-1]))
        features: Tensor = self.coarse(pyramid.pop(), run)
        for enhancer in self.enhancers:
            features = enhancer(pyramid.pop(), features, run)
        return run(self.head, features)


MOST_CHANNELS = 512
"""Of a discriminator's layer, whatever its width: the published code's `min(2 * nf, 512)`."""


class MultiScaleDiscriminator(nn.Module):
    """Identical PatchGANs; scale k sees its input average-pooled k times (section 3.2)."""

    def __init__(self, in_channels: int, *, scales: int = 3, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.layers = layers
        self.scales = nn.ModuleList(
            PatchDiscriminator(
                in_channels,
                width=width,
                layers=layers,
                norm="instance",
                padding=2,
                most_channels=MOST_CHANNELS,
            )
            for _ in range(scales)
        )

    def forward(self, x: Tensor, conditions: Sequence[Tensor] | None = None) -> list[list[Tensor]]:
        """(N, C_in, H, W) -> per scale, finest first: all feature maps, the patch predictions last.

        With `conditions` (see `pyramid`) x is the image alone and is put behind the condition of each scale:
        pooling works channel by channel, so the condition needs it once, not once for each image judged.
        """
        results = []
        for index, scale in enumerate(self.scales):
            x = half_resolution(x) if index else x
            results.append(scale(x if conditions is None else torch.cat([conditions[index], x], 1)))
        return results

    def pyramid(self, condition: Tensor) -> list[Tensor]:
        """The condition (N, C, H, W) at the resolution of each scale, finest first."""
        levels = [condition]
        for _ in self.scales[1:]:
            levels.append(half_resolution(levels[-1]))
        return levels


class FeatureEncoder(nn.Module):
    """E: style features of an image, averaged over each instance (section 3.4)."""

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        *,
        width: int = 16,
        downsamplings: int = 4,
        upsampling: Upsampling = "transpose",
    ) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(downsamplings + 1)]
        self.stem = stem(in_channels, width)
        self.down = nn.ModuleList(down(channels) for channels in widths[:-1])
        self.up = nn.ModuleList(up(channels, upsampling) for channels in reversed(widths[1:]))
        self.head = Head(width, out_channels)

    def features(self, image: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H, W) in [-1, 1], before pooling. Any size: padded and cropped."""
        height, width = image.shape[2:]
        sides = (padded_size(side, multiple=2 ** len(self.down), minimum=4) for side in (height, width))
        image = reflect_to(image, *sides)
        for layer in (self.stem, *self.down, *self.up, self.head):
            image = layer(image)
        return image[:, :, :height, :width]

    def forward(self, image: Tensor, instance: Tensor) -> Tensor:
        """Image (N, C_in, H, W) and ids (N, 1, H, W) -> (N, C_out, H, W), constant over each instance."""
        return instance_mean(self.features(image), instance)
