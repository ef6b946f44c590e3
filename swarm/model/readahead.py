"""Decoding on a CPU waits for memory; this brings a weight into the cache before it is multiplied.

One row times a matrix, as the BLAS does it, uses half of what the memory could give: 12 GB/s on one
core of an EPYC, where a plain sum streams 20 and the same product out of the cache runs at 46. So a
linear layer sums a piece of its weight, forgets the sum, and multiplies by the piece while it is
near. Whether that pays depends on processor, dtype and threads, so it is tried on the weights at hand;
and no result may change by a bit, which is tried as well.

In: a model whose weights are in place and frozen. Out: the same model; its plain linear layers become
`ReadAheadLinear`, which PEFT and others still see as `nn.Linear`. Weights are shared, never copied, so views
over one store of tensors read ahead over one store. Never touches layers of another class, and must
come after the weights: a layer whose weight is replaced or moved later still multiplies by the old one.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

_PIECE_BYTES = 2 * 1024**2
_ROWS_OF_PIECES = 64
"""A piece's rows are a multiple of this, so that every piece is aligned as the whole is."""
_MOST_ROWS = 5
"""Of the input, each multiplied by itself while the piece is near, to the same bits as alone: the BLAS takes
longer for two to five rows together than for each alone (docs/experiments.md). With more it does better."""
_LEAST_BYTES = 64 * 1024
_CACHE_BYTES = 32 * 1024**2
_TRIAL_BYTES = 128 * 1024**2
_TRIALS = 6
_WORTH = 1.0


class ReadAheadLinear(nn.Linear):
    """A frozen linear layer that reads ahead for few rows. Made of a plain one by `read_ahead`."""

    pieces: tuple[tuple[torch.Tensor, torch.Tensor | None], ...]
    most_values: int
    """Of an input that is read ahead for."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.numel() > self.most_values:
            return super().forward(input)
        if input.numel() == self.in_features:
            outputs = []
            for weight, bias in self.pieces:
                torch.sum(weight)
                outputs.append(functional.linear(input, weight, bias))
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        rows = input.reshape(-1, 1, self.in_features).unbind()
        columns = []
        for weight, bias in self.pieces:
            torch.sum(weight)
            columns.append(torch.cat([functional.linear(row, weight, bias) for row in rows]))
        output = columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)
        return output.reshape(*input.shape[:-1], self.out_features)


@dataclass(frozen=True)
class Trial:
    """What linear layers take for one row, all in turn."""

    plain_s: float
    ahead_s: float
    exact: bool
    """Whether results were the same, bit for bit."""

    @property
    def pays(self) -> bool:
        return self.exact and self.ahead_s < _WORTH * self.plain_s


def read_ahead(model: nn.Module) -> None:
    """From now on the large linear layers of a model (or the model, if it is one) read ahead.
    Ask `try_read_ahead` first whether that pays."""
    for linear in _large_linears(model):
        _convert(linear)


@torch.inference_mode()
def try_read_ahead(model: nn.Module) -> Trial | None:
    """Try it without changing the model, in about 0.3 s; None where there is nothing to gain: on a
    GPU, and with weights so small that the cache may keep them."""
    linears, size = [], 0
    for linear in _large_linears(model):
        if size < _TRIAL_BYTES:
            linears.append(linear)
            size += linear.weight.nbytes
    if size < _CACHE_BYTES or linears[0].weight.device.type != "cpu":
        return None
    ahead = [_convert(copy.copy(linear)) for linear in linears]
    rows = [torch.randn(1, linear.in_features).to(linear.weight.dtype) for linear in linears]
    expected, _ = _pass(linears, rows)  # and the weights are here from the disk
    plain_s, ahead_s, exact = [], [], True
    for _ in range(_TRIALS):
        plain_s.append(_pass(linears, rows)[1])
        outputs, took_s = _pass(ahead, rows)
        ahead_s.append(took_s)
        exact = exact and all(torch.equal(a, b) for a, b in zip(expected, outputs, strict=True))
    return Trial(min(plain_s), min(ahead_s), exact)


def _pass(linears: Sequence[nn.Linear], rows: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], float]:
    began = time.perf_counter()
    outputs = [linear(row) for linear, row in zip(linears, rows, strict=True)]
    return outputs, time.perf_counter() - began


def _large_linears(model: nn.Module) -> Iterator[nn.Linear]:
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.nbytes >= _LEAST_BYTES:
            yield module


def _convert(linear: nn.Linear) -> nn.Linear:
    row_bytes = linear.weight.nbytes // linear.out_features
    rows = max(1, _PIECE_BYTES // row_bytes // _ROWS_OF_PIECES) * _ROWS_OF_PIECES
    weights = torch.split(linear.weight, rows)
    biases = (None,) * len(weights) if linear.bias is None else torch.split(linear.bias, rows)
    linear.__class__ = ReadAheadLinear
    assert isinstance(linear, ReadAheadLinear)
    linear.pieces = tuple(zip(weights, biases, strict=True))
    linear.most_values = linear.in_features * _MOST_ROWS
    return linear
