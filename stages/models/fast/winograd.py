"""Convolutions with fewer multiplications, for generating on CPUs: Lavin and Gray 2015 (arXiv:1509.09308).

Neighbouring outputs of a filter see nearly the same inputs and can share products. Of four inputs d and a
filter of two taps g come three outputs, of one of three taps two, with four products m instead of six:

    sums of inputs   d0 - d2     d1 + d2              d2 - d1              d3 - d1
    of two taps      g0          (g0 + g1) / 2        (g0 - g1) / 2        g1
    of three         g0          (g0 + g1 + g2) / 2   (g0 - g1 + g2) / 2   g2
    outputs          m0 + m1 + m2,   m1 - m2,   m1 + m2 + m3      of two taps
                     m0 + m1 + m2,   m1 - m2 + m3                 of three

In two dimensions that is 16 products instead of 36. The sums of weights are made once, when the weights
change no more (`Filter`); those of inputs and of products cost little where channels are many.

A filter lies over cells of `channels` numbers. A convolution of kernel 3 has a pixel a cell; one of kernel 4
and stride 2 is a filter of 2x2 taps over cells of 2x2 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.models.fast.products import FixedMatrix

EACH = 4
"""Inputs, and products, of a tile in each dimension."""

MIN_CHANNELS = {2: 384, 3: 512}
"""Channels of a cell and of an output together, by taps, from which this is faster (benchmarks/README.md)."""

MIN_OUTPUTS = 128
"""Outputs of a batch from which it is: with fewer, reading the weights is all the work."""

BAND = 512
"""Tiles worked on at a time: with fewer, weights are read too often; more do not stay in the cache."""


def suits(x: Tensor, weight: Tensor, out_channels: int, *, taps: int, stride: int) -> bool:
    """Whether a layer of fixed weights is faster this way, and exact enough: sums of bf16 are not."""
    outputs = x.shape[0] * x.shape[2] * x.shape[3] / stride**2
    return (
        weight.dtype == torch.float32
        and x.shape[1] * stride**2 + out_channels >= MIN_CHANNELS[taps]
        and outputs >= MIN_OUTPUTS
    )


class Filter:
    """A convolution by weights that change no more.

    weight   (C_out, C_in, kernel, kernel): kernel 3 or 2 of stride 1, 4 of stride 2
    """

    def __init__(self, weight: Tensor, *, stride: int = 1) -> None:
        kernel = _over_blocks(weight) if stride == 2 else weight
        self.stride, self.taps, self.out_channels = stride, kernel.shape[2], len(weight)
        by_rows = _tap_sums(kernel.permute(2, 3, 1, 0))
        self.sums = [[FixedMatrix(sums) for sums in _tap_sums(row)] for row in by_rows]

    def __call__(self, x: Tensor, *, padding: int, reflect: bool = False) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H', W'), pixels last. No bias.

        Where tiles of outputs reach beyond H' or W', the result is a view of a larger picture.
        """
        stride, taps = self.stride, self.taps
        side = EACH + 1 - taps
        if reflect:
            x, padding = F.pad(x, (padding,) * 4, mode="reflect"), 0
        outputs = [(length + 2 * padding) // stride - taps + 1 for length in x.shape[2:]]
        used = [stride * (-(-length // side) * side + taps - 1) for length in outputs]
        below, right = (reach - length - padding for reach, length in zip(used, x.shape[2:], strict=True))
        pixels = F.pad(x, (padding, right, padding, below)).permute(0, 2, 3, 1).contiguous()
        samples, tall, wide, channels = pixels.shape
        cells = pixels.view(samples, tall // stride, stride, wide // stride, stride * channels)
        y = _filtered(cells, self.sums, side, self.out_channels)
        return y[:, : outputs[0], : outputs[1]].permute(0, 3, 1, 2)


def _over_blocks(weight: Tensor) -> Tensor:
    """Weights of a stride of 2, as a filter over blocks: (C_out, C_in, 4, 4) -> (C_out, 4 * C_in, 2, 2)."""
    out, channels, _, _ = weight.shape
    blocks = weight.view(out, channels, 2, 2, 2, 2)  # row of blocks, row in a block, the same of columns
    return blocks.permute(0, 3, 5, 1, 2, 4).reshape(out, 4 * channels, 2, 2)


Sums = Sequence[Sequence[FixedMatrix]]
"""What is multiplied with, by row and column of a tile: matrices (channels, C_out)."""


def _filtered(cells: Tensor, sums: Sums, side: int, out: int) -> Tensor:
    """Cells (N, H, rows in one, W, rest of it) -> (N, H', W', C_out), in tiles of `side` by `side`."""
    over = EACH - side  # cells that a tile shares with the next
    samples, high, wide = len(cells), (cells.shape[1] - over) // side, (cells.shape[3] - over) // side
    y = cells.new_empty(samples, high, side, wide, side, out)
    rows = -(-high // -(-high * wide // BAND))
    together = -(-samples // -(-samples * high * wide // BAND)) if rows == high else 1
    for sample in range(0, samples, together):
        for top in range(0, high, rows):
            band = cells[sample : sample + together, side * top : side * (top + rows) + over]
            _filter_band(band, sums, y[sample : sample + together, top : top + rows])
    return y.view(samples, side * high, side * wide, out)


def _filter_band(cells: Tensor, sums: Sums, out: Tensor) -> None:
    """A few rows of tiles: out is (N, rows of tiles, side, columns of tiles, side, C_out)."""
    samples, high, side, wide, _, _ = out.shape
    inputs = cells.new_empty(EACH, EACH, samples, high, wide, cells.shape[2], cells.shape[4])
    by_rows = _input_sums([cells[:, row : row + side * (high - 1) + 1 : side] for row in range(EACH)])
    for of_row, made in zip(by_rows, inputs, strict=True):
        columns = [of_row[:, :, :, column : column + side * (wide - 1) + 1 : side] for column in range(EACH)]
        _input_sums([column.transpose(2, 3) for column in columns], made)
    inputs = inputs.view(EACH, EACH, samples * high * wide, -1)
    lines: list[list[Tensor]] = []  # outputs of a tile's column, by column
    for column in range(EACH):
        m = [row[column] for row in sums]
        d = inputs[:, column]
        # The first and the last product are in one output each: they are added where they are multiplied.
        second, third = m[1].product(d[1]), m[2].product(d[2])
        both, apart = second + third, second.sub_(third)
        first = m[0].product(d[0], plus=both)
        if side == 2:
            lines.append([first, m[3].product(d[3], plus=apart)])
        else:
            lines.append([first, apart, m[3].product(d[3], plus=both)])
    for row, of_columns in enumerate(zip(*lines, strict=True)):
        m0, m1, m2, m3 = (products.view(samples, high, wide, -1) for products in of_columns)
        y = out[:, :, row].unbind(3)
        torch.add(m0, m1, out=y[0]).add_(m2)
        if side == 2:
            torch.sub(m1, m2, out=y[1]).add_(m3)
        else:
            torch.sub(m1, m2, out=y[1])
            torch.add(m1, m2, out=y[2]).add_(m3)


def _tap_sums(g: Tensor) -> Tensor:
    """Of 2 or 3 taps, along the first dimension, the 4 numbers that inputs are multiplied by."""
    ends, middle = (g[0], g[1]) if len(g) == 2 else (g[0] + g[2], g[1])
    return torch.stack([g[0], (ends + middle) / 2, (ends - middle) / 2, g[-1]])


def _input_sums(d: Sequence[Tensor], out: Tensor | None = None) -> list[Tensor]:
    """What is multiplied, of the 4 inputs of a tile."""
    outs = [None] * EACH if out is None else out.unbind(0)
    return [
        torch.sub(d[0], d[2], out=outs[0]),
        torch.add(d[1], d[2], out=outs[1]),
        torch.sub(d[2], d[1], out=outs[2]),
        torch.sub(d[3], d[1], out=outs[3]),
    ]
