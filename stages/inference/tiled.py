"""A generator on pictures that do not fit in memory: layer by layer, and each layer in bands of rows.

    LayerByLayer(values, height).generate(network, condition)  ->  the generated picture, to read in bands

A norm needs the statistics of its whole map before the next layer can begin. So the output of a layer goes to
a temporary file, band by band, while its statistics are added up; the next layer reads it back normalised. A
band comes with the rows around it that the layer's kernel sees, and what lacks a neighbour is cut off: the
sums are those of the whole picture, and only their rounding differs.

Maps of the picture's own resolution would be the largest files (64 channels: 256 bytes a pixel) and are cheap
to compute: those are computed twice, for the statistics and for the next layer. All others are computed once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from tempfile import SpooledTemporaryFile
from weakref import finalize

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.models.copies import to_device, to_host
from stages.models.fast.norms import moments
from stages.models.layers import (
    BatchNorm,
    Conv,
    Noise,
    ResizeConv,
    TransposedConv,
    drawn_masks,
    dropped,
    half_resolution,
)
from stages.models.pix2pix import Down, UNet, Up
from stages.models.pix2pixhd import CoarseToFineGenerator, ConvNormReLU, LocalEnhancer, ResidualBlock

IN_MEMORY = 1 << 26
"""Bytes up to which a map stays in memory."""

Norm = BatchNorm | nn.InstanceNorm2d


@dataclass(frozen=True, kw_only=True)
class FeatureMap:
    """A map (N, channels, height, width) to read in bands: `read(start, stop)` gives those rows of it."""

    channels: int
    height: int
    width: int
    read: Callable[[int, int], Tensor]
    work: float
    """Values in memory for a row, in the largest of the maps that are computed for it."""


def layer(
    source: FeatureMap,
    module: Callable[[Tensor], Tensor],
    channels: int,
    *,
    scale: float = 1,
    halo: int,
) -> FeatureMap:
    """A layer's output, computed from bands of its input.

    scale   of the resolution: 1/2, 1 or 2
    halo    rows of the input beside a band that its output depends on; even where the scale is 1/2
    """

    def read(start: int, stop: int) -> Tensor:
        first = max(0, math.floor(start / scale) - halo)
        last = min(source.height, math.ceil(stop / scale) + halo)
        begin = start - int(first * scale)
        return module(source.read(first, last))[:, :, begin : begin + stop - start]

    width, height = int(source.width * scale), int(source.height * scale)
    work = max(channels * width, source.work / scale)
    return FeatureMap(channels=channels, height=height, width=width, read=read, work=work)


def pixelwise(function: Callable[..., Tensor], first: FeatureMap, *others: FeatureMap) -> FeatureMap:
    """A function of each pixel of maps of one size. `first` has the channels of the result."""

    def read(start: int, stop: int) -> Tensor:
        return function(*(one.read(start, stop) for one in (first, *others)))

    return replace(first, read=read, work=sum(one.work for one in (first, *others)))


def convolved(source: FeatureMap, conv: nn.Module) -> FeatureMap:
    """The output of a network's convolution."""
    assert isinstance(conv, Conv | TransposedConv)
    if isinstance(conv, TransposedConv | ResizeConv):
        return layer(source, conv, conv.out_channels, scale=2, halo=1)
    if conv.stride[0] == 2:
        return layer(source, conv, conv.out_channels, scale=1 / 2, halo=2)
    return layer(source, conv, conv.out_channels, halo=conv.kernel_size[0] // 2)


class MapStatistics:
    """Mean and variance of each channel of each sample, of bands that come one by one. Adds in float64."""

    def __init__(self) -> None:
        self.pixels = 0
        self.mean = self.squares = torch.zeros(())  # until the first band: then where that is

    def add(self, band: Tensor) -> None:
        """Add a band (N, C, h, W)."""
        mean, variance = moments(band)
        pixels = band.shape[2] * band.shape[3]
        share = pixels / (self.pixels + pixels)
        if self.pixels == 0:
            self.mean = self.squares = torch.zeros_like(mean)
        apart = mean - self.mean
        self.squares = self.squares + pixels * (variance + (1 - share) * apart.square())
        self.mean = self.mean + share * apart
        self.pixels += pixels

    def normalise(self, norm: Norm) -> Callable[[Tensor], Tensor]:
        """The norm with these statistics, as a function of bands."""
        scale = (self.squares / self.pixels + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight
        shift = -self.mean * scale if norm.bias is None else norm.bias - self.mean * scale
        factor, summand = (each.float()[:, :, None, None] for each in (scale, shift))
        return lambda band: torch.addcmul(summand, band, factor)


@dataclass(frozen=True)
class LayerByLayer:
    """How a picture is computed.

    values   in the largest map of a band, about
    height   the picture's: maps of this height are not stored
    """

    values: int
    height: int

    def bands(self, source: FeatureMap, height: int | None = None) -> Iterator[tuple[int, int]]:
        """First and last row of each band of a map, or of its first rows."""
        rows = max(1, int(self.values / source.work))
        end = source.height if height is None else height
        for start in range(0, end, rows):
            yield start, min(start + rows, end)

    def generate(self, network: nn.Module, condition: FeatureMap, noise: Noise | None = None) -> FeatureMap:
        """The picture (N, C, H, W) in [-1, 1] that a generator makes of a condition."""
        if isinstance(network, UNet):
            return self._unet(network, condition, noise)
        assert isinstance(network, CoarseToFineGenerator)
        return self._coarse_to_fine(network, condition)

    # -- the networks of the papers ----------------------------------------------------------------------

    def _unet(self, network: UNet, x: FeatureMap, noise: Noise | None) -> FeatureMap:
        skips = []
        for down in network.encoder:
            assert isinstance(down, Down)
            x = pixelwise(partial(F.leaky_relu, negative_slope=0.2), x) if down.activate else x
            x = self._normalised(convolved(x, down.conv), down.norm)
            skips.append(x)
        x = skips.pop()
        for level in reversed(range(len(network.decoder))):
            up = network.decoder[level]
            assert isinstance(up, Up)
            x = self._normalised(convolved(pixelwise(F.relu, x), up.conv), up.norm)
            if up.dropout is not None and noise is not None:
                x = pixelwise(dropped, x, _masks(x, noise))
            if network.skips and level > 0:
                skip = skips.pop()
                joined = pixelwise(lambda *maps: torch.cat(maps, 1), skip, x)
                x = replace(joined, channels=skip.channels + x.channels)
        return pixelwise(torch.tanh, x)

    def _coarse_to_fine(self, network: CoarseToFineGenerator, x: FeatureMap) -> FeatureMap:
        pyramid = [x]
        for _ in network.enhancers:
            pyramid.append(self._kept(layer(pyramid[-1], half_resolution, x.channels, scale=1 / 2, halo=2)))
        x = pyramid.pop()
        for part in network.coarse.layers():
            x = self._residual(part, x) if isinstance(part, ResidualBlock) else self._normed_relu(part, x)
        for enhancer in network.enhancers:
            assert isinstance(enhancer, LocalEnhancer)
            fine = self._normed_relu(enhancer.down, self._normed_relu(enhancer.stem, pyramid.pop()))
            x = self._kept(pixelwise(torch.add, fine, x))
            for block in enhancer.blocks:
                assert isinstance(block, ResidualBlock)
                x = self._residual(block, x)
            x = self._normed_relu(enhancer.up, x)
        return pixelwise(torch.tanh, convolved(x, network.head.conv))

    def _normed_relu(self, part: nn.Module, x: FeatureMap) -> FeatureMap:
        assert isinstance(part, ConvNormReLU)
        return pixelwise(F.relu, self._normalised(convolved(x, part.conv), part.norm))

    def _residual(self, block: ResidualBlock, x: FeatureMap) -> FeatureMap:
        y = pixelwise(F.relu, self._normalised(convolved(x, block.conv1), block.norm1))
        y = self._normalised(convolved(y, block.conv2), block.norm2)
        return self._kept(pixelwise(torch.add, y, x))

    # -- what is stored ----------------------------------------------------------------------------------

    def _normalised(self, source: FeatureMap, norm: Norm | None) -> FeatureMap:
        """A map with its norm, if it has one: stored, or measured and computed again."""
        if norm is None:
            return self._kept(source)
        measured = MapStatistics()
        if source.height < self.height:
            source = self._stored(source, measured)
        else:
            for start, stop in self.bands(source):
                measured.add(source.read(start, stop))
        return pixelwise(measured.normalise(norm), source)

    def _kept(self, source: FeatureMap) -> FeatureMap:
        """A map in a file, or the same map where it has the picture's resolution."""
        return self._stored(source) if source.height < self.height else source

    def _stored(self, source: FeatureMap, measured: MapStatistics | None = None) -> FeatureMap:
        """A map in a temporary file, which is gone when the map is."""
        with ExitStack() as opened:
            file = opened.enter_context(SpooledTemporaryFile(max_size=IN_MEMORY))
            copies: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
            for start, stop in self.bands(source):
                band = source.read(start, stop)
                if measured is not None:
                    measured.add(band)
                copies.append(to_host(band.permute(2, 0, 3, 1).float().contiguous()))
                if len(copies) > 1:  # a GPU computes this band while the one before is written
                    _write(file, *copies.popleft())
            _write(file, *copies.pop())
            close = opened.pop_all().close
        shape, device = (len(band), source.width, source.channels), band.device

        def read(start: int, stop: int) -> Tensor:
            values = np.empty((stop - start, *shape), np.float32)
            file.seek(start * values[0].nbytes)
            file.readinto(values.data)
            rows = to_device(torch.from_numpy(values), device).permute(1, 3, 0, 2)
            return rows.contiguous(memory_format=torch.channels_last)

        finalize(read, close)
        return replace(source, read=read, work=source.channels * source.width)


def _write(file: SpooledTemporaryFile[bytes], values: Tensor, arrived: torch.cuda.Event | None) -> None:
    if arrived is not None:
        arrived.synchronize()
    file.write(values.numpy().data)


def _masks(x: FeatureMap, noise: Noise) -> FeatureMap:
    """The masks of a dropout layer, drawn as the layer draws them: whole, a byte a value."""
    drawn = drawn_masks((x.channels, x.height, x.width), noise)
    return replace(x, read=lambda start, stop: drawn[:, :, start:stop], work=0)
