"""Pix2Pix: the U-Net and the PatchGAN of Isola et al. 2017 (arXiv:1611.07004), section 6.1.

    Ck    convolution 4x4, norm, (Leaky)ReLU, k filters; CDk has dropout 0.5 as well
    U-Net-256    C64-C128-C256-C512-C512-C512-C512-C512, and mirrored back up; tanh
    PatchGAN-70  C64-C128-C256-C512, then a convolution to one channel of patch predictions

Weight names: `encoder.L.conv`, `encoder.L.norm`, `decoder.L.conv`, `decoder.L.norm`; L = 0: full resolution.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.models.architecture import Upsampling
from stages.models.layers import Bias, Conv, Dropout, Noise, NormKind, make_norm, up_conv

DropoutPlacement = Literal["paper", "common", "none"]


class Down(nn.Module):
    """LeakyReLU, convolution 4x4 stride 2, norm: halves the resolution. Level 0 is only the conv."""

    def __init__(
        self, in_channels: int, out_channels: int, *, activate: bool, norm: NormKind, normed: bool
    ) -> None:
        super().__init__()
        self.activate = activate
        bias: Bias = norm == "instance" and ("inert" if normed else True)
        self.conv = Conv(in_channels, out_channels, 4, stride=2, padding=1, bias=bias)
        self.norm = make_norm(norm, out_channels) if normed else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H/2, W/2). Activates `x` in place."""
        x = self.conv(F.leaky_relu(x, 0.2, inplace=True) if self.activate else x)
        return x if self.norm is None else self.norm(x)


class Up(nn.Module):
    """ReLU, transposed convolution 4x4 stride 2, norm, maybe dropout: doubles the resolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        norm: NormKind,
        normed: bool,
        dropout: bool,
        upsampling: Upsampling,
    ) -> None:
        super().__init__()
        bias: Bias = not normed or ("inert" if norm == "instance" else False)
        self.conv = up_conv(in_channels, out_channels, 4, upsampling=upsampling, bias=bias)
        self.norm = make_norm(norm, out_channels) if normed else None
        self.dropout = Dropout() if dropout else None

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, 2H, 2W). Activates `x` in place."""
        x = self.conv(F.relu(x, inplace=True))
        if self.norm is not None:
            x = self.norm(x)
        return x if self.dropout is None else self.dropout(x, noise)


class UNet(nn.Module):
    """U-Net generator; without skips it is the paper's encoder-decoder. Sides: multiples of 2**levels."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        levels: int = 8,
        width: int = 64,
        norm: NormKind = "batch",
        dropout: DropoutPlacement = "paper",
        skips: bool = True,
        upsampling: Upsampling = "transpose",
    ) -> None:
        super().__init__()
        self.skips = skips
        widths = [width * 2 ** min(level, 3) for level in range(levels)]
        self.encoder = nn.ModuleList(
            Down(
                in_channels if level == 0 else widths[level - 1],
                widths[level],
                activate=level > 0,
                norm=norm,
                normed=0 < level < levels - 1,
            )
            for level in range(levels)
        )
        wide = list(range(levels - 1, 3, -1))  # the levels with a 512-wide output, from the bottleneck
        noisy = {"paper": wide[:3], "common": wide[1:], "none": []}[dropout]
        self.decoder = nn.ModuleList(
            Up(
                widths[level] * (2 if skips and level < levels - 1 else 1),
                out_channels if level == 0 else widths[level - 1],
                norm=norm,
                normed=level > 0,
                dropout=level in noisy,
                upsampling=upsampling,
            )
            for level in range(levels)
        )

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H, W) in [-1, 1].

        `noise`: one random source per sample for the dropout masks, in any mode; None: dropout in training
        mode only.
        """
        skips = []
        for down in self.encoder:
            x = down(x)  # (N, width * 2**min(level, 3), H / 2**(level+1), ...)
            # The next level applies LeakyReLU to it in place; the way up applies ReLU, which undoes that.
            skips.append(x)
        x = skips.pop()
        for level in reversed(range(len(self.decoder))):
            x = self.decoder[level](x, noise)
            if self.skips and level > 0:
                x = torch.cat([skips.pop(), x], 1)
        return torch.tanh(x)


class PatchDiscriminator(nn.Module):
    """PatchGAN: classifies overlapping patches. Returns every layer's features, the patch predictions last.

    Channels double per layer up to `most_channels`. Padding is 1 in pix2pix and 2 in pix2pixHD. Weight names:
    `blocks.I.conv`, `blocks.I.norm`.

    most_channels   None: 8 times the width, as in pix2pix's code
    """

    def __init__(
        self,
        in_channels: int,
        *,
        width: int = 64,
        layers: int = 3,
        norm: NormKind = "batch",
        padding: int = 1,
        most_channels: int | None = None,
    ) -> None:
        super().__init__()
        most = 8 * width if most_channels is None else most_channels
        widths = [in_channels, width, *(min(width * 2**layer, most) for layer in range(1, layers + 1)), 1]
        self.blocks = nn.ModuleList(
            DiscriminatorBlock(
                widths[index],
                widths[index + 1],
                kernel=4,
                stride=2 if index < layers else 1,
                padding=padding,
                norm=norm if 0 < index <= layers else None,
                bias=norm == "instance" or index in (0, layers + 1),
                activate=index <= layers,
            )
            for index in range(layers + 2)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, C_in, H, W) -> layers + 2 feature maps, the last one (N, 1, h, w) logits."""
        return _feature_maps(self.blocks, x)


class PixelDiscriminator(nn.Module):
    """PixelGAN: 1x1 convolutions 64-128-1, so every pixel is classified by its own value."""

    def __init__(self, in_channels: int, *, width: int = 64, norm: NormKind = "batch") -> None:
        super().__init__()
        affine = norm == "batch"
        self.blocks = nn.ModuleList(
            [
                DiscriminatorBlock(in_channels, width, kernel=1, norm=None, bias=True),
                DiscriminatorBlock(width, 2 * width, kernel=1, norm=norm, bias=not affine),
                DiscriminatorBlock(2 * width, 1, kernel=1, norm=None, bias=not affine, activate=False),
            ]
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, C_in, H, W) -> three feature maps, the last one (N, 1, H, W) logits."""
        return _feature_maps(self.blocks, x)


def _feature_maps(blocks: nn.ModuleList, x: Tensor) -> list[Tensor]:
    features = []
    for block in blocks:
        x = block(x)
        features.append(x)
    return features


class DiscriminatorBlock(nn.Module):
    """Convolution, maybe norm, maybe LeakyReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: int,
        norm: NormKind | None,
        bias: bool,
        stride: int = 1,
        padding: int = 0,
        activate: bool = True,
    ) -> None:
        super().__init__()
        self.conv = Conv(
            in_channels,
            out_channels,
            kernel,
            stride=stride,
            padding=padding,
            bias="inert" if norm == "instance" else bias,
        )
        self.norm = None if norm is None else make_norm(norm, out_channels)
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H', W')."""
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        return F.leaky_relu(x, 0.2, inplace=True) if self.activate else x
