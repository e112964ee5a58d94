"""3x3 convolutions with frozen weights by fewer products, for CPU inference: Lavin and Gray 2015
(arXiv:1509.09308), F(2x2, 3x3).

Neighbouring outputs of a filter see nearly the same inputs and can share products. Of four inputs d and a
filter of three taps g come two outputs, with four products m instead of six:

    sums of inputs   d0 - d2     d1 + d2              d2 - d1              d3 - d1
    sums of taps     g0          (g0 + g1 + g2) / 2   (g0 - g1 + g2) / 2   g2
    outputs          m0 + m1 + m2,   m1 - m2 + m3

In two dimensions that is 16 products instead of 36. The sums of taps are computed once (`Filter`); those of
inputs and of products cost little where channels are many.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.models.fast.wide import PackedMatrix

SIDE = 2
"""Outputs of a tile in each dimension."""

EACH = 4
"""Inputs, and products, of a tile in each dimension."""

MIN_CHANNELS = 512
"""Input and output channels together from which this is faster (benchmarks/README.md)."""

MIN_OUTPUTS = 128
"""Output pixels of a batch from which this is faster: with fewer, reading the weights is all the work."""

BAND = 512
"""Tiles computed at a time: with fewer, weights are read too often; more do not stay in the cache."""


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether a layer is faster this way, and exact enough: sums in bf16 are not."""
    return (
        weight.dtype == torch.float32
        and weight.shape[0] + weight.shape[1] >= MIN_CHANNELS
        and x.shape[0] * x.shape[2] * x.shape[3] >= MIN_OUTPUTS
    )


class Filter:
    """A convolution of kernel 3 and stride 1 by frozen weights (C_out, C_in, 3, 3).

    Its sums of taps take 16/9 of the weights' memory.
    """

    def __init__(self, weight: Tensor) -> None:
        self.out_channels = len(weight)
        by_rows = _tap_sums(weight.permute(2, 3, 1, 0))
        self.sums = [[PackedMatrix(sums) for sums in _tap_sums(row)] for row in by_rows]

    def __call__(self, x: Tensor, *, padding: int, reflect: bool = False) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H', W'), channels last. No bias.

        Where tiles of outputs reach beyond H' or W', the result is a view of a larger map.
        """
        if reflect:
            x, padding = F.pad(x, (padding,) * 4, mode="reflect"), 0
        outputs = [length + 2 * padding - 2 for length in x.shape[2:]]
        used = [-(-length // SIDE) * SIDE + 2 for length in outputs]
        below, right = (reach - length - padding for reach, length in zip(used, x.shape[2:], strict=True))
        pixels = F.pad(x, (padding, right, padding, below)).permute(0, 2, 3, 1).contiguous()
        y = _filtered(pixels, self.sums, self.out_channels)
        return y[:, : outputs[0], : outputs[1]].permute(0, 3, 1, 2)


Sums = Sequence[Sequence[PackedMatrix]]
"""Matrices (C_in, C_out) to multiply with, by row and column of a tile."""


def _filtered(pixels: Tensor, sums: Sums, out: int) -> Tensor:
    """(N, H, W, C_in) -> (N, H - 2, W - 2, C_out), in tiles of `SIDE` by `SIDE` outputs."""
    over = EACH - SIDE  # pixels that a tile shares with the next
    samples, high, wide = len(pixels), (pixels.shape[1] - over) // SIDE, (pixels.shape[2] - over) // SIDE
    y = pixels.new_empty(samples, high, SIDE, wide, SIDE, out)
    rows = -(-high // -(-high * wide // BAND))
    together = -(-samples // -(-samples * high * wide // BAND)) if rows == high else 1
    for sample in range(0, samples, together):
        for top in range(0, high, rows):
            band = pixels[sample : sample + together, SIDE * top : SIDE * (top + rows) + over]
            _filter_band(band, sums, y[sample : sample + together, top : top + rows])
    return y.view(samples, SIDE * high, SIDE * wide, out)


def _filter_band(pixels: Tensor, sums: Sums, out: Tensor) -> None:
    """A few rows of tiles: out is (N, rows of tiles, SIDE, columns of tiles, SIDE, C_out)."""
    samples, high, _, wide, _, _ = out.shape
    inputs = pixels.new_empty(EACH, EACH, samples, high, wide, pixels.shape[3])
    by_rows = _input_sums([pixels[:, row : row + SIDE * (high - 1) + 1 : SIDE] for row in range(EACH)])
    for of_row, of_tiles in zip(by_rows, inputs, strict=True):
        columns = [of_row[:, :, column : column + SIDE * (wide - 1) + 1 : SIDE] for column in range(EACH)]
        _input_sums(columns, of_tiles)
    inputs = inputs.view(EACH, EACH, samples * high * wide, -1)
    lines: list[list[Tensor]] = []  # outputs of a tile's column, by column
    for column in range(EACH):
        m = [row[column] for row in sums]
        d = inputs[:, column]
        # The first and the last product are in one output each: they are added where they are multiplied.
        second, third = m[1].product(d[1]), m[2].product(d[2])
        both, apart = second + third, second.sub_(third)
        lines.append([m[0].product(d[0], plus=both), m[3].product(d[3], plus=apart)])
    for row, of_columns in enumerate(zip(*lines, strict=True)):
        m0, m1, m2, m3 = (products.view(samples, high, wide, -1) for products in of_columns)
        left, right = out[:, :, row].unbind(3)
        torch.add(m0, m1, out=left).add_(m2)
        torch.sub(m1, m2, out=right).add_(m3)


def _tap_sums(g: Tensor) -> Tensor:
    """(3, ...) taps -> the (4, ...) numbers that sums of inputs are multiplied by."""
    ends = g[0] + g[2]
    return torch.stack([g[0], (ends + g[1]) / 2, (ends - g[1]) / 2, g[2]])


def _input_sums(d: Sequence[Tensor], out: Tensor | None = None) -> list[Tensor]:
    """The four sums of a tile's four inputs."""
    outs = [None] * EACH if out is None else out.unbind(0)
    return [
        torch.sub(d[0], d[2], out=outs[0]),
        torch.add(d[1], d[2], out=outs[1]),
        torch.sub(d[2], d[1], out=outs[2]),
        torch.sub(d[3], d[1], out=outs[3]),
    ]
