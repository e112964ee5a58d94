"""Convolutions of many channels over few pixels, as matrix products: for CPUs.

At the bottom of a generator a layer has 1024 x 1024 x 9 weights for 256 pixels. oneDNN's convolution first
copies such weights into its own layout, three times a step, which costs as much as the computation. A matrix
product over patches reads them in place. The sums are those of a convolution in another order.

    patches   (rows, kernel * kernel * C_in), one row per output pixel, channels last
    weights   (C_out, kernel * kernel * C_in), a view of channels-last weights
    forward   patches @ weights.T;  input gradient: gradient @ weights, summed back into the image
    weight gradient   gradient.T @ patches, already in the layout of the weights

A transposed convolution is the same with forward and input gradient exchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stages.models.layers import Conv, ResizeConv, TransposedConv

MAX_ROWS = 1024
MIN_WEIGHTS = 2**20
PACKED_FOR_ROWS = 512  # the layout is chosen for so many; any number may come


class WideConv(Conv):
    """A convolution that is a matrix product where that is faster."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H', W')."""
        if not suits(x, self.weight, self.output_rows(x)):
            return super().forward(x)
        y = wide_conv(
            x,
            self.weight,
            stride=self.stride[0],
            padding=int(self.padding[0]),
            reflect=self.padding_mode == "reflect",
        )
        return add_bias(y, None if self.inert_bias else self.bias)

    def output_rows(self, x: Tensor) -> int:
        """Pixels of the output, of all samples together."""
        return x.shape[0] * (x.shape[2] // self.stride[0]) * (x.shape[3] // self.stride[0])


class WideResizeConv(ResizeConv, WideConv):
    """Nearest-neighbour doubling, then a wide convolution."""


class WideTransposedConv(TransposedConv):
    """A transposed convolution that is a matrix product where that is faster."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, 2H, 2W)."""
        if not suits(x, self.weight, self.input_rows(x)):
            return super().forward(x, output_size)
        return add_bias(wide_transposed_conv(x, self.weight), None if self.inert_bias else self.bias)

    def input_rows(self, x: Tensor) -> int:
        """Pixels of the input, of all samples together."""
        return x.shape[0] * x.shape[2] * x.shape[3]


def suits(x: Tensor, weight: Tensor, rows: int) -> bool:
    """Whether a layer is faster this way: measured, see benchmarks/README.md."""
    return (
        not torch.compiler.is_compiling()  # first: an exported program has no sizes to compare
        and x.device.type == "cpu"
        and rows <= MAX_ROWS
        and weight.numel() >= MIN_WEIGHTS
    )


def add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """(N, C, H, W) plus (C,)."""
    return y if bias is None else y + bias.view(1, -1, 1, 1)


def wide_conv(x: Tensor, weight: Tensor, *, stride: int, padding: int, reflect: bool) -> Tensor:
    """(N, C_in, H, W) -> (N, C_out, H', W'), channels last. No bias."""
    x, weight = _cast(x, weight)
    y: Tensor = _ConvByProduct.apply(x, weight, stride, padding, reflect)  # type: ignore[no-untyped-call]
    return y


def wide_transposed_conv(x: Tensor, weight: Tensor) -> Tensor:
    """(N, C_in, H, W), weights (C_in, C_out, k, k) -> (N, C_out, 2H, 2W): stride 2, padding 1. No bias."""
    x, weight = _cast(x, weight)
    y: Tensor = _TransposedConvByProduct.apply(x, weight)  # type: ignore[no-untyped-call]
    return y


def _cast(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both as autocast casts the arguments of a convolution."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        return x.to(dtype), weight.to(dtype)
    return x, weight


Function = TypeVar("Function", bound=Callable[..., Any])


def without_autocast(function: Function) -> Function:
    """Disable autocast inside: it would cast reflection padding back to float32."""
    return cast(Function, torch.autocast("cpu", enabled=False)(function))


class _ConvByProduct(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int, reflect: bool) -> Tensor:
        kernel = weight.shape[2]
        patches, height, width = patches_of(pad(x, padding, reflect), kernel, stride)
        y = _product(patches, as_matrix(weight).T, x.shape[0], height, width)
        ctx.save_for_backward(x, weight)  # not the patches: nine times the size, and cheap to recompute
        ctx.stride, ctx.padding, ctx.reflect = stride, padding, reflect
        return y

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        kernel, rows = weight.shape[2], rows_of(gradient)
        of_x = of_weight = None
        if ctx.needs_input_grad[1]:
            patches, _, _ = patches_of(pad(x, ctx.padding, ctx.reflect), kernel, ctx.stride)
            of_weight = _weights(rows.T @ patches, weight)
        if ctx.needs_input_grad[0]:
            height, width = (side + 2 * ctx.padding for side in x.shape[2:])
            padded = _summed_patches(
                rows @ as_matrix(weight), gradient.shape, kernel, ctx.stride, (height, width)
            )
            of_x = unpad(padded, ctx.padding, ctx.reflect)
        return of_x, of_weight, None, None, None


class _TransposedConvByProduct(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return doubled(rows_of(x) @ as_matrix(weight), x.shape, weight.shape[2])

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        kernel = weight.shape[2]
        last = kernel - 3
        patches, height, width = patches_of(F.pad(gradient, (1, last, 1, last)), kernel, 2)
        of_x = of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = _weights(rows_of(x).T @ patches, weight)
        if ctx.needs_input_grad[0]:
            of_x = _product(patches, as_matrix(weight).T, x.shape[0], height, width)
        return of_x, of_weight


def rows_of(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N*H*W, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _product(rows: Tensor, matrix: Tensor, samples: int, height: int, width: int) -> Tensor:
    """(N*H*W, K) @ (K, C) -> (N, C, H, W), channels last; in-place operators may change it."""
    shape = (samples, matrix.shape[1], height, width)
    y = torch.empty(shape, dtype=rows.dtype, device=rows.device, memory_format=torch.channels_last)
    torch.mm(rows, matrix, out=y.permute(0, 2, 3, 1).view(rows.shape[0], -1))
    return y


def doubled(patches: Tensor, shape: torch.Size, kernel: int) -> Tensor:
    """Patches around the pixels of `shape` (N, C_in, H, W) -> (N, C_out, 2H, 2W), channels last."""
    height, width = (2 * side for side in shape[2:])
    last = kernel - 3  # how far the outermost patches reach beyond the image
    padded = _summed_patches(patches, shape, kernel, 2, (height + 1 + last, width + 1 + last))
    return padded[:, :, 1 : height + 1, 1 : width + 1].contiguous(memory_format=torch.channels_last)


def as_matrix(weight: Tensor) -> Tensor:
    """(A, B, k, k) -> (A, k*k*B): no copy if the weights are channels last."""
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)


def _weights(matrix: Tensor, weight: Tensor) -> Tensor:
    """(A, k*k*B) -> (A, B, k, k)."""
    out, channels, kernel, _ = weight.shape
    return matrix.view(out, kernel, kernel, channels).permute(0, 3, 1, 2)


def pad(x: Tensor, padding: int, reflect: bool) -> Tensor:
    """(N, C, H, W) with a border of mirrored pixels, or of zeros."""
    if padding == 0:
        return x
    return F.pad(x, (padding,) * 4, mode="reflect" if reflect else "constant")


def unpad(padded: Tensor, padding: int, reflect: bool) -> Tensor:
    """The gradient of padding, in place: reflected borders are added to what they mirrored."""
    if padding == 0:
        return padded
    if reflect:
        for dim in (2, 3):
            size = padded.shape[dim]
            for i in range(padding):
                padded.select(dim, 2 * padding - i).add_(padded.select(dim, i))
                padded.select(dim, size - 1 - 2 * padding + i).add_(padded.select(dim, size - 1 - i))
    return padded[:, :, padding:-padding, padding:-padding]


def patches_of(x: Tensor, kernel: int, stride: int) -> tuple[Tensor, int, int]:
    """(N, C, H, W) -> (N*H'*W', kernel*kernel*C), H', W'."""
    rows = x.permute(0, 2, 3, 1).contiguous()
    samples, height, width, channels = rows.shape
    height, width = (height - kernel) // stride + 1, (width - kernel) // stride + 1
    of_sample, of_row, of_pixel, _ = rows.stride()
    patches = rows.as_strided(
        (samples, height, width, kernel, kernel, channels),
        (of_sample, of_row * stride, of_pixel * stride, of_row, of_pixel, 1),
    )
    return patches.reshape(samples * height * width, -1), height, width


def _summed_patches(
    patches: Tensor, shape: torch.Size, kernel: int, stride: int, size: tuple[int, int]
) -> Tensor:
    """The transpose of `patches_of`: patches around pixels of `shape` -> (N, C, *size), overlaps summed."""
    samples, _, height, width = shape
    patches = patches.view(samples, height, width, kernel, kernel, -1)
    exact = torch.promote_types(patches.dtype, torch.float32)  # sums of up to k*k terms: not in bf16
    total = patches.new_zeros(samples, *size, patches.shape[-1], dtype=exact)
    for i in range(kernel):
        for j in range(kernel):
            covered = total[:, i : i + stride * height : stride, j : j + stride * width : stride]
            covered += patches[:, :, :, i, j]
    return total.to(patches.dtype).permute(0, 3, 1, 2)


# -- frozen weights, prepacked in oneDNN's layout (inference) --------------------


class PackedMatrix:
    """A frozen matrix (K, C) to multiply rows with. Where oneDNN packs it, it is a copy of the weights.

    A product with a plain matrix copies it into blocks first, at each call. Where rows are few, at the bottom
    of a generator, that takes as long as the product itself.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.dtype = matrix.dtype
        self.packed = _has_library(matrix.dtype)
        self.matrix = matrix
        if self.packed:
            self.matrix = torch.ops.mkldnn._reorder_linear_weight(matrix.T.contiguous(), PACKED_FOR_ROWS)

    def product(self, rows: Tensor, plus: Tensor | None = None) -> Tensor:
        """(M, K) times the matrix, plus (M, C): a new tensor (M, C). All of the matrix's dtype."""
        if not self.packed:
            return rows @ self.matrix if plus is None else torch.addmm(plus, rows, self.matrix)
        linear = torch.ops.mkldnn._linear_pointwise
        if plus is None:
            return cast(Tensor, linear(rows, self.matrix, None, "none", [], ""))
        return cast(Tensor, linear.binary(rows, plus, self.matrix, None, "add"))


def _has_library(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:  # not on every processor
        return cast(bool, torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32
