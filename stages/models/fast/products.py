"""Products with weights that change no more, for generating on CPUs: the library's layout is made once.

A product with a plain matrix copies it into blocks first, at each call. Where rows are few, at the bottom
of a generator, that takes as long as the product itself.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

ROWS = 512
"""Rows that the layout is chosen for; any number may come."""


def generates(x: Tensor) -> bool:
    """Whether a layer is computed on a CPU without gradients, and not compiled."""
    return (
        not torch.compiler.is_compiling()  # first: an exported program knows no sizes to compare
        and not torch.is_grad_enabled()
        and x.device.type == "cpu"
    )


def working_dtype(x: Tensor) -> torch.dtype:
    """What a layer on a CPU computes in."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


class FixedMatrix:
    """A matrix (K, C) that rows are multiplied with. Takes its memory beside the weights it was made of."""

    def __init__(self, matrix: Tensor) -> None:
        self.packed = _has_library(matrix.dtype)
        self.matrix = matrix
        if self.packed:
            self.matrix = torch.ops.mkldnn._reorder_linear_weight(matrix.T.contiguous(), ROWS)

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
