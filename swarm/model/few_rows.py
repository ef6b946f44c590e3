"""Linear layers on a CPU that multiply a few rows with our own kernel (`swarm.model.kernels.float_rows`).

Decoding waits for memory, and torch's product leaves a third of it unused. Whether ours gains depends on processor and
threads, so it is tried on the weights at hand, and must come out as torch's own does but for rounding.

In: a model whose weights are in place and frozen. Out: the same model; its plain float32 linear layers become
`FewRowsLinear`, which PEFT and others still see as `nn.Linear`. Weights are shared, never copied. Never touches
layers of another class, and must come after the weights: a layer whose weight is replaced or moved later still
multiplies by the old one.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from swarm.model.kernels.float_rows import FewRows

MOST_ROWS = 16
"""Of the input. With more, torch's product catches up."""
_LEAST_BYTES = 64 * 1024
_CACHE_BYTES = 32 * 1024**2
_TRIAL_BYTES = 128 * 1024**2
_TRIALS = 6
_TRIAL_ROWS = (1, 8)
"""One session, a batch of sessions."""
_CLOSE = 1e-5
"""Of the norm of the result; rounding costs some 1e-7."""


class FewRowsLinear(nn.Linear):
    """A frozen linear layer with a way of its own for few rows. Made of a plain one by `use_few_rows`."""

    few_rows: FewRows
    most_values: int
    """Of an input that takes that way."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        few = input.numel() <= self.most_values and input.dtype == torch.float32  # autocast hands over other dtypes
        if not few or torch.is_grad_enabled():
            return super().forward(input)
        output = self.few_rows.product(input.contiguous())
        return output if self.bias is None else output.add_(self.bias)


@dataclass(frozen=True)
class Trial:
    """What linear layers take for a few rows, all in turn."""

    plain_s: float
    few_rows_s: float
    error: float
    """Of the norm of the result, at the worst layer."""

    @property
    def pays(self) -> bool:
        return self.error < _CLOSE and self.few_rows_s < self.plain_s


def use_few_rows(model: nn.Module) -> None:
    """From now on the large linear layers of a model (or the model, if it is one) take our way for few rows.
    Ask `try_few_rows` first whether that pays."""
    for linear in _large_linears(model):
        _convert(linear)


@torch.inference_mode()
def try_few_rows(model: nn.Module) -> Trial | None:
    """Try it without changing the model, in about 0.5 s; None where there is nothing to gain: on a
    GPU, in another dtype than float32, and with weights so small that the cache may keep them."""
    linears, size = [], 0
    for linear in _large_linears(model):
        if size < _TRIAL_BYTES:
            linears.append(linear)
            size += linear.weight.nbytes
    if size < _CACHE_BYTES:
        return None
    ours = [_convert(copy.copy(linear)) for linear in linears]
    plain_s, few_rows_s, error = 0.0, 0.0, 0.0
    for count in _TRIAL_ROWS:
        rows = [torch.randn(count, linear.in_features) for linear in linears]
        expected, _ = _pass(linears, rows)  # and the weights are here from the disk
        outputs, _ = _pass(ours, rows)  # and the kernel is compiled
        error = max(error, *(float((a - b).norm() / a.norm()) for a, b in zip(expected, outputs, strict=True)))
        times = [(_pass(linears, rows)[1], _pass(ours, rows)[1]) for _ in range(_TRIALS)]
        plain_s += min(plain for plain, _ in times)
        few_rows_s += min(own for _, own in times)
    return Trial(plain_s, few_rows_s, error)


def _pass(linears: Sequence[nn.Linear], rows: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], float]:
    began = time.perf_counter()
    outputs = [linear(row) for linear, row in zip(linears, rows, strict=True)]
    return outputs, time.perf_counter() - began


def _large_linears(model: nn.Module) -> Iterator[nn.Linear]:
    for module in model.modules():
        if type(module) is not nn.Linear or module.out_features < 2:
            continue
        weight = module.weight
        here = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous()
        if here and weight.nbytes >= _LEAST_BYTES:
            yield module


def _convert(linear: nn.Linear) -> nn.Linear:
    from swarm.model.kernels.float_rows import FewRows  # compiled: loaded where a CPU holds float32

    linear.__class__ = FewRowsLinear
    assert isinstance(linear, FewRowsLinear)
    linear.few_rows = FewRows(linear.weight)
    linear.most_values = linear.in_features * MOST_ROWS
    return linear
