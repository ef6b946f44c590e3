"""A few rows times float32 weights on a CPU, at the speed at which memory gives the weights.

In: activations [M, I] and a weight [O, I], O at least 2. Out: [M, O]. All float32. As exact as torch's own product, but
summed in another order; a row has the same bits in every batch, for one processor and shape.

The BLAS multiplies one row at two thirds of what memory gives, and takes twice as long for four rows as for one. With
the weights in large pages (`swarm.model.arena`), all products of SmolLM2 with its head, one thread of a Xeon, ms
(docs/experiments.md, "Few rows in float32"):

    rows           1     2     4     8    12    16
    torch         41    41    68    91   116    96
    float_rows    31    38    37    42    45    53
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from swarm.jit import jit
from swarm.model.kernels.emit import float32_at
from swarm.model.kernels.float_dot import OUTPUTS, dot1, dot4
from swarm.model.kernels.threads import on_threads

_THREADS_FROM = 2**20
"""Weights. A smaller one is done (0.3 ms) before another thread is awake (0.1 ms) and has paid for itself."""


class FewRows:
    """A weight as the compiled code takes it: its address, and the tensor that keeps it alive."""

    def __init__(self, weight_OI: torch.Tensor) -> None:
        """Contiguous, on the CPU, not written to; it is shared, not copied."""
        self._weight_OI = weight_OI
        self._address = weight_OI.data_ptr()
        self._outputs, self._inputs = weight_OI.shape
        self._splits = weight_OI.numel() >= _THREADS_FROM

    def product(self, input: torch.Tensor) -> torch.Tensor:
        """[..., I] contiguous and on the CPU, to [..., O]."""
        output = torch.empty((*input.shape[:-1], self._outputs), dtype=torch.float32)
        rows = input.numel() // self._inputs
        arguments = (input.data_ptr(), self._address, output.data_ptr(), rows, self._inputs, self._outputs)
        on_threads(_product, _product_in_parts, arguments, splits=self._splits)
        return output


@jit
def _multiply(
    input_MI: NDArray[np.float32], weight_OI: NDArray[np.float32], out_MO: NDArray[np.float32], first: int, last: int
) -> None:
    """Outputs from `first` to before `last`, of which there are two at least."""
    rows, inputs = input_MI.shape
    values, weights = input_MI.reshape(-1), weight_OI.reshape(-1)
    at = first
    while at < last:
        o = min(at, last - OUTPUTS)  # an odd last one is computed with the one before it, which comes out as before
        m = 0
        while m + 4 <= rows:
            a, b, c, d, e, f, g, h = dot4(values, m * inputs, weights, o * inputs, inputs)
            out_MO[m, o], out_MO[m, o + 1] = a, b
            out_MO[m + 1, o], out_MO[m + 1, o + 1] = c, d
            out_MO[m + 2, o], out_MO[m + 2, o + 1] = e, f
            out_MO[m + 3, o], out_MO[m + 3, o + 1] = g, h
            m += 4
        while m < rows:
            out_MO[m, o], out_MO[m, o + 1] = dot1(values, m * inputs, weights, o * inputs, inputs)
            m += 1
        at += OUTPUTS


@jit
def _product(input_MI: int, weight_OI: int, out_MO: int, rows: int, inputs: int, outputs: int) -> None:
    """By the addresses of the three."""
    _multiply(
        numba.carray(float32_at(input_MI), (rows, inputs)),
        numba.carray(float32_at(weight_OI), (outputs, inputs)),
        numba.carray(float32_at(out_MO), (rows, outputs)),
        0,
        outputs,
    )


def _split(input_MI: int, weight_OI: int, out_MO: int, rows: int, inputs: int, outputs: int, parts: int) -> None:
    values_MI = numba.carray(float32_at(input_MI), (rows, inputs))
    weights_OI = numba.carray(float32_at(weight_OI), (outputs, inputs))
    result_MO = numba.carray(float32_at(out_MO), (rows, outputs))
    pairs = outputs // OUTPUTS
    for part in numba.prange(parts):
        first, last = part * pairs // parts * OUTPUTS, (part + 1) * pairs // parts * OUTPUTS
        _multiply(values_MI, weights_OI, result_MO, first, outputs if part == parts - 1 else last)


_product_in_parts = jit(_split, parallel=True)
