"""RMS norms of a few rows on a CPU: y = x / sqrt(mean(x^2) + eps) * scale, in one pass instead of six operations.

In: rows [..., D] and a scale [D]. Out: [..., D]. All float32, the sum of squares too; a row's bits do not depend on
other rows.
"""

from __future__ import annotations

import numba
import numpy as np
import torch

from swarm.jit import jit
from swarm.model.kernels.emit import float32_at

_f32 = np.float32


class NormRows:
    """A scale as the compiled code takes it: its address, and the tensor that keeps it alive."""

    def __init__(self, scale_D: torch.Tensor, eps: float) -> None:
        """Contiguous, on the CPU, not written to; it is shared, not copied."""
        self._scale_D = scale_D
        self._address, self._width, self._eps = scale_D.data_ptr(), scale_D.numel(), eps

    def norm(self, input: torch.Tensor) -> torch.Tensor:
        """[..., D] contiguous and on the CPU, to the same shape."""
        output = torch.empty(input.shape, dtype=torch.float32)
        _norm(input.data_ptr(), self._address, output.data_ptr(), input.numel() // self._width, self._width, self._eps)
        return output


@jit
def _norm(input_MD: int, scale_D: int, out_MD: int, rows: int, width: int, eps: float) -> None:
    """By the addresses of the three."""
    values = numba.carray(float32_at(input_MD), (rows, width))
    scale = numba.carray(float32_at(scale_D), (width,))
    result = numba.carray(float32_at(out_MD), (rows, width))
    whole = width // 4 * 4
    for m in range(rows):
        a, b, c, d = _f32(0), _f32(0), _f32(0), _f32(0)  # four sums, so that none waits for the one before
        for i in range(0, whole, 4):
            a += values[m, i] * values[m, i]
            b += values[m, i + 1] * values[m, i + 1]
            c += values[m, i + 2] * values[m, i + 2]
            d += values[m, i + 3] * values[m, i + 3]
        total = (a + b) + (c + d)
        for i in range(whole, width):
            total += values[m, i] * values[m, i]
        factor = _f32(1) / np.sqrt(total / _f32(width) + _f32(eps))
        for i in range(width):
            result[m, i] = values[m, i] * factor * scale[i]
