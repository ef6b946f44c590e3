"""A linear layer's product in parts, so that who is served need not wait for the end of it.

A part takes no more time than its share of the whole (docs/experiments.md). It holds some of the rows, or some of
the outputs of a layer as wide as the vocabulary; then backward sums over the parts in their order, which rounds
otherwise than the whole product does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn

_PART_PRODUCTS = {"cpu": 2**27, "cuda": 2**38}
"""Multiplications of a part, about: some 3 ms of one core; for a GPU by calculation."""
_LEAST_ROWS = 128
"""Fewer rows would take longer each: every part reads the whole matrix."""
_FEW_ROWS, _FEW_ROWS_COLUMNS = 8, 1024
"""Products of a few rows add one number after the other in some BLAS: over a vocabulary of 49,152 words that left a
gradient in float32 with an error of 1.3e-4 (docs/experiments.md). So they are summed part by part."""


def row_parts(rows_NI: torch.Tensor, outputs: int, between: Callable[[], None]) -> Iterator[slice]:
    """Rows to multiply by a matrix of so many outputs in one go, in order; `between` is called between them."""
    most = _PART_PRODUCTS[rows_NI.device.type] // max(1, outputs * rows_NI.shape[1])
    return _parts(len(rows_NI), max(_LEAST_ROWS, most), between)


def linear_in_parts(rows_ND: torch.Tensor, layer: nn.Linear, between: Callable[[], None]) -> torch.Tensor:
    """`layer(rows_ND)` [N, V]; `between` is called between parts, in the backward pass too.

    The layer's own weights get no gradient, and autocast is not followed.
    """
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    columns = max(1, _PART_PRODUCTS[rows_ND.device.type] // max(1, rows_ND.numel()))
    if len(rows_ND) < _FEW_ROWS:
        columns = min(columns, _FEW_ROWS_COLUMNS)
    return cast(torch.Tensor, _InParts.apply(rows_ND, weight, bias, columns, between))  # type: ignore[no-untyped-call]


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        columns: int,
        between: Callable[[], None],
    ) -> torch.Tensor:
        ctx.save_for_backward(weight_VD)
        ctx.columns, ctx.between = columns, between
        output_NV = rows_ND.new_empty((len(rows_ND), len(weight_VD)))
        for part in _parts(len(weight_VD), columns, between):
            torch.mm(rows_ND, weight_VD[part].T, out=output_NV[:, part])
        return output_NV if bias_V is None else output_NV.add_(bias_V)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor, None, None, None, None]:
        (grad_NV,) = gradients
        (weight_VD,) = ctx.saved_tensors
        # A sum of narrow parts in float32: each would round what was there before. Each part by itself: `addmm_` may go
        # on adding one number after the other to the sum.
        grad_ND = torch.zeros((len(grad_NV), weight_VD.shape[1]), dtype=torch.float32, device=grad_NV.device)
        for part in _parts(len(weight_VD), ctx.columns, ctx.between):
            grad_ND.add_(grad_NV[:, part] @ weight_VD[part])
        return grad_ND.to(grad_NV.dtype), None, None, None, None


def _parts(length: int, size: int, between: Callable[[], None]) -> Iterator[slice]:
    for start in range(0, length, size):
        if start:
            between()
        yield slice(start, min(start + size, length))
