"""Matrix products with frozen weights, prepacked once in oneDNN's layout (CPU inference).

A product with a plain matrix copies it into blocks first, at each call. Where rows are few, at the bottom
of a generator, that takes as long as the product itself.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

ROWS = 512
"""Rows that the layout is chosen for; any number may come."""


class PackedMatrix:
    """A frozen matrix (K, C) to multiply rows with. Where oneDNN packs it, it is a copy of the weights."""

    def __init__(self, matrix: Tensor) -> None:
        self.dtype = matrix.dtype
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
