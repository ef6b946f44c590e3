"""A few rows times int8 codes on a CPU, at the speed at which memory gives the codes.

In: activations [M, I] float32, codes [O, I] int8, scales [O] bfloat16. Out: [M, O] float32. A row
becomes integers up to ±`TOP` by its largest magnitude, is summed exactly, and only then scaled, step by step as
`int8.digits` does with torch's integer product: the two give the same bits, and a row has the same bits in every
batch. A row with anything that is not finite becomes NaN.

One row of SmolLM2's blocks takes 8 to 12 ms of one core, reading all its bytes once 5.6, torch's own kernel 15 to 18:
it waits for every line of codes, which here are asked for 4 KiB ahead (docs/experiments.md).
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from swarm.jit import jit
from swarm.model.kernels.int8 import TINY, TOP
from swarm.model.kernels.int8_dot import dot1, dot4
from swarm.model.kernels.threads import on_threads

_NOT_FINITE = 0x7F800000
_THREADS_FROM = 2**22
"""Codes. A smaller weight is done (0.2 ms) before another thread is awake (0.1 ms) and has paid for itself."""

_i32, _f32, _f64 = np.int32, np.float32, np.float64


class FewRows:
    """A weight as the compiled code takes it: made once, since a view costs as much as a short product."""

    def __init__(self, codes_OI: torch.Tensor, scales_O: torch.Tensor) -> None:
        """Contiguous and on the CPU; they are shared, not copied."""
        self._codes_OI = codes_OI.numpy()
        self._scales_O = scales_O.view(torch.int16).numpy()
        self._splits = codes_OI.numel() >= _THREADS_FROM

    def product(self, input_MI: torch.Tensor) -> torch.Tensor:
        """[M, I] float32, contiguous and on the CPU, to [M, O] float32."""
        output_MO = torch.empty(input_MI.shape[0], self._codes_OI.shape[0], dtype=torch.float32)
        arrays = (input_MI.detach().numpy(), self._codes_OI, self._scales_O, output_MO.numpy())
        on_threads(_product, _product_in_parts, arrays, splits=self._splits)
        return output_MO


@jit
def _to_integers(input_MI: NDArray[np.float32], values_MI: NDArray[np.int16], unit_M: NDArray[np.float64]) -> None:
    """Each row as integers, and what one of them stands for (NaN where a value is not finite)."""
    one = np.empty(1, np.int32)
    for m in range(input_MI.shape[0]):
        row = input_MI[m]
        bits = row.view(np.int32)
        largest = _i32(0)  # magnitudes sort as their bits do, and what is not finite is above all others
        for i in range(bits.shape[0]):
            magnitude = _i32(bits[i] & _i32(0x7FFFFFFF))
            largest = magnitude if magnitude > largest else largest
        if largest >= _NOT_FINITE:
            unit_M[m] = np.nan
            values_MI[m] = 0
            continue
        one[0] = largest
        top = max(one.view(np.float32)[0], _f32(TINY))
        ratio = _f32(_f32(TOP) / top)
        unit_M[m] = _f64(top) / TOP
        for i in range(row.shape[0]):
            values_MI[m, i] = np.int16(np.rint(_f32(row[i] * ratio)))


@jit
def _multiply(
    values_MI: NDArray[np.int16],
    unit_M: NDArray[np.float64],
    codes_OI: NDArray[np.int8],
    scales_O: NDArray[np.int16],
    out_MO: NDArray[np.float32],
    first: int,
    last: int,
) -> None:
    """Outputs from `first` to before `last`."""
    rows, inputs = values_MI.shape
    values, codes = values_MI.reshape(-1), codes_OI.reshape(-1)
    bits = np.empty(1, np.int32)
    as_float = bits.view(np.float32)
    for o in range(first, last):
        bits[0] = _i32(scales_O[o]) << 16  # a bfloat16 is the upper half of a float32
        scale = _f64(as_float[0])
        m = 0
        while m + 4 <= rows:
            a, b, c, d = dot4(values, m * inputs, codes, o * inputs, inputs)
            out_MO[m, o] = _f32(_f64(a) * unit_M[m] * scale)
            out_MO[m + 1, o] = _f32(_f64(b) * unit_M[m + 1] * scale)
            out_MO[m + 2, o] = _f32(_f64(c) * unit_M[m + 2] * scale)
            out_MO[m + 3, o] = _f32(_f64(d) * unit_M[m + 3] * scale)
            m += 4
        while m < rows:
            (a,) = dot1(values, m * inputs, codes, o * inputs, inputs)
            out_MO[m, o] = _f32(_f64(a) * unit_M[m] * scale)
            m += 1


@jit
def _product(
    input_MI: NDArray[np.float32],
    codes_OI: NDArray[np.int8],
    scales_O: NDArray[np.int16],
    out_MO: NDArray[np.float32],
) -> None:
    values_MI, unit_M = np.empty(input_MI.shape, np.int16), np.empty(input_MI.shape[0])
    _to_integers(input_MI, values_MI, unit_M)
    _multiply(values_MI, unit_M, codes_OI, scales_O, out_MO, 0, codes_OI.shape[0])


def _split(
    input_MI: NDArray[np.float32],
    codes_OI: NDArray[np.int8],
    scales_O: NDArray[np.int16],
    out_MO: NDArray[np.float32],
    parts: int,
) -> None:
    values_MI, unit_M = np.empty(input_MI.shape, np.int16), np.empty(input_MI.shape[0])
    _to_integers(input_MI, values_MI, unit_M)
    outputs = codes_OI.shape[0]
    for part in numba.prange(parts):
        first, last = part * outputs // parts, (part + 1) * outputs // parts
        _multiply(values_MI, unit_M, codes_OI, scales_O, out_MO, first, last)


_product_in_parts = jit(_split, parallel=True)
