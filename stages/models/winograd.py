"""Convolutions with fewer multiplications, for generating on CPUs: Lavin and Gray 2015 (arXiv:1509.09308).

Two neighbouring outputs of a filter see nearly the same inputs d and can share products. With two taps g

    y0 = d0 g0 + d1 g1 = (d0 - d1) g0 + d1 (g0 + g1)
    y1 = d1 g0 + d2 g1 = d1 (g0 + g1) + (d2 - d1) g1

take 3 products instead of 4; with three taps 4 instead of 6. In two dimensions that is 9 instead of 16, and
16 instead of 36. The sums of weights are made once, when the weights change no more (`Filter`); those of
inputs and of products cost little where channels are many.

A filter lies over cells of `channels` numbers. A convolution of kernel 3 has a pixel a cell; one of kernel 4
and stride 2 is a filter of 2x2 taps over cells of 2x2 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.models.products import FixedMatrix

MIN_CHANNELS = {2: 512, 3: 512}
"""Channels of a cell and of an output together, by taps, from which this is faster (benchmarks/README.md)."""

MIN_TILES = 32
"""Tiles of 2x2 outputs in a batch from which it is: with fewer, reading the weights is all the work."""

BAND = 512
"""Tiles worked on at a time: with fewer, weights are read too often; more do not stay in the cache."""


def suits(x: Tensor, out_channels: int, *, taps: int, stride: int) -> bool:
    """Whether a layer of fixed weights is faster this way."""
    tiles = x.shape[0] * x.shape[2] * x.shape[3] / (2 * stride) ** 2
    return x.shape[1] * stride**2 + out_channels >= MIN_CHANNELS[taps] and tiles >= MIN_TILES


class Filter:
    """A convolution by weights that change no more.

    weight   (C_out, C_in, kernel, kernel): kernel 3 or 2 of stride 1, 4 of stride 2
    """

    def __init__(self, weight: Tensor, *, stride: int = 1) -> None:
        self.stride, self.out_channels = stride, len(weight)
        taps = _over_blocks(weight) if stride == 2 else weight
        by_rows = _tap_sums(taps.permute(2, 3, 1, 0))
        self.sums = [[FixedMatrix(sums) for sums in _tap_sums(row)] for row in by_rows]

    def __call__(self, x: Tensor, *, padding: int, reflect: bool = False) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H', W'), pixels last. No bias.

        Outputs are made two by two: where H' or W' is odd, the result is a view of a larger picture.
        """
        taps, stride = len(self.sums) - 1, self.stride
        if reflect:
            x, padding = F.pad(x, (padding,) * 4, mode="reflect"), 0
        outputs = [(side + 2 * padding) // stride - taps + 1 for side in x.shape[2:]]
        used = [stride * (length + length % 2 + taps - 1) for length in outputs]
        below, right = (reach - side - padding for reach, side in zip(used, x.shape[2:], strict=True))
        pixels = F.pad(x, (padding, right, padding, below)).permute(0, 2, 3, 1).contiguous()
        samples, tall, wide, channels = pixels.shape
        cells = pixels.view(samples, tall // stride, stride, wide // stride, stride * channels)
        y = _filtered(cells, self.sums, self.out_channels)
        return y[:, : outputs[0], : outputs[1]].permute(0, 3, 1, 2)


def _over_blocks(weight: Tensor) -> Tensor:
    """Weights of a stride of 2, as a filter over blocks: (C_out, C_in, 4, 4) -> (C_out, 4 * C_in, 2, 2)."""
    out, channels, _, _ = weight.shape
    blocks = weight.view(out, channels, 2, 2, 2, 2)  # row of blocks, row in a block, the same of columns
    return blocks.permute(0, 3, 5, 1, 2, 4).reshape(out, 4 * channels, 2, 2)


Sums = Sequence[Sequence[FixedMatrix]]
"""What is multiplied with, by row and column of a tile: matrices (channels, C_out)."""


def _filtered(cells: Tensor, sums: Sums, out: int) -> Tensor:
    """Cells (N, H, rows in one, W, rest of it) -> (N, H - taps + 1, W - taps + 1, C_out), both even."""
    taps = len(sums) - 1
    samples, high, wide = len(cells), (cells.shape[1] - taps + 1) // 2, (cells.shape[3] - taps + 1) // 2
    y = cells.new_empty(samples, high, 2, wide, 2, out)
    rows = -(-high // -(-high * wide // BAND))
    together = -(-samples // -(-samples * high * wide // BAND)) if rows == high else 1
    for sample in range(0, samples, together):
        for top in range(0, high, rows):
            band = cells[sample : sample + together, 2 * top : 2 * (top + rows) + taps - 1]
            _filter_band(band, sums, y[sample : sample + together, top : top + rows])
    return y.view(samples, 2 * high, 2 * wide, out)


def _filter_band(cells: Tensor, sums: Sums, out: Tensor) -> None:
    """A few rows of tiles: out is (N, rows of tiles, 2, columns of tiles, 2, C_out)."""
    each = len(sums)  # products of a tile's row, of its column
    samples, high, _, wide, _, _ = out.shape
    inputs = cells.new_empty(each, each, samples, high, wide, cells.shape[2], cells.shape[4])
    by_rows = _input_sums([cells[:, row : row + 2 * high - 1 : 2] for row in range(each)])
    for of_row, made in zip(by_rows, inputs, strict=True):
        columns = [of_row[:, :, :, column : column + 2 * wide - 1 : 2] for column in range(each)]
        _input_sums([column.transpose(2, 3) for column in columns], made)
    inputs = inputs.view(each, each, samples * high * wide, -1)
    upper, lower = [], []
    for column in range(each):
        first, *between, last = (row[column] for row in sums)
        of_first, *of_between, of_last = inputs[:, column]
        middle = [matrix.product(rows) for matrix, rows in zip(between, of_between, strict=True)]
        # The first and the last product are in one output each: they are added where they are multiplied.
        upper.append(first.product(of_first, plus=sum(middle[1:], middle[0])))
        lower.append(last.product(of_last, plus=middle[0] if each == 3 else middle[0].sub_(middle[1])))
    for products, line in zip((upper, lower), out.unbind(2), strict=True):
        m = [product.view(samples, high, wide, -1) for product in products]
        left, right = line.unbind(3)
        torch.add(m[0], m[1], out=left)
        if each == 3:
            torch.add(m[1], m[2], out=right)
        else:
            left.add_(m[2])
            torch.sub(m[1], m[2], out=right).add_(m[3])


def _tap_sums(g: Tensor) -> Tensor:
    """Of 2 or 3 taps, along the first dimension, the 3 or 4 numbers that inputs are multiplied by."""
    if len(g) == 2:
        return torch.stack([g[0], g[0] + g[1], g[1]])
    ends = g[0] + g[2]
    return torch.stack([g[0], (ends + g[1]) / 2, (ends - g[1]) / 2, g[2]])


def _input_sums(d: Sequence[Tensor], out: Tensor | None = None) -> list[Tensor]:
    """What is multiplied, of the 3 or 4 inputs of a tile."""
    outs = [None] * len(d) if out is None else out.unbind(0)
    if len(d) == 3:
        same = d[1] if outs[1] is None else outs[1].copy_(d[1])
        return [torch.sub(d[0], d[1], out=outs[0]), same, torch.sub(d[2], d[1], out=outs[2])]
    return [
        torch.sub(d[0], d[2], out=outs[0]),
        torch.add(d[1], d[2], out=outs[1]),
        torch.sub(d[2], d[1], out=outs[2]),
        torch.sub(d[3], d[1], out=outs[3]),
    ]
