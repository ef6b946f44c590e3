"""Weights as int8 with one scale per output row: y = (x · codes) * scale.

In: activations [M, I] in float32, float16 or bfloat16, codes [O, I], scales [O] whose values bfloat16
can hold. Out: [M, O] in the dtype of the activations. Which way a product takes depends on the
number of rows alone, so equal calls give equal bits.

One row waits for memory, many rows for arithmetic (one thread of a Xeon, all linear layers of SmolLM2's
blocks, float32 activations, ms; docs/experiments.md):

    way of          1     2     4     8    16 rows
    float32        31    32    51    67    71
    int8_rows      10    12    15    24
    digits         28    27    29    31    40
    pieces         53    34    41    50    95
"""

from __future__ import annotations

import torch
from torch.nn import functional

_PIECE_BYTES = 2 * 1024**2
"""Of widened weights. Smaller ones cost more calls than the nearer cache gives back; larger ones leave it."""
_MANY_ROWS = 32
_LARGE_PIECE_BYTES = 64 * 1024**2
"""With many rows multiplying takes so long that pieces only bound the memory."""
_DIGIT = 256
TOP = 127 * _DIGIT
"""Of a row of activations as integers: two digits of int8 hold it."""
TINY = 1e-30
"""Rows and weights below this are as good as zero; it keeps ratios finite."""
_CHUNK = 2**22


def quantize(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [O, I] int8 in ±127 and scales [O] bfloat16, by the largest magnitude of a row."""
    height = max(1, _CHUNK // weight_OI.shape[1])
    codes, scales = [], []
    for part in torch.split(weight_OI, height):
        wide = part.float()
        scale_O1 = (wide.abs().amax(dim=1, keepdim=True) / 127).clamp_(min=TINY).to(torch.bfloat16)
        codes.append((wide / scale_O1.float()).round_().clamp_(-127, 127).to(torch.int8))
        scales.append(scale_O1.squeeze(1))
    return torch.cat(codes), torch.cat(scales)


def dequantize(codes_OI: torch.Tensor, scales_O: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[O, I]."""
    return codes_OI.to(dtype).mul_(scales_O.unsqueeze(1))


def native(input_MI: torch.Tensor, codes_OI: torch.Tensor, scales_O: torch.Tensor) -> torch.Tensor:
    """Torch's own kernel, for cards: activations and result rounded to bfloat16 (0.3% of a result's norm, a
    quarter of what int8 itself costs), the sum taken in float32. A row's bits do not depend on other rows."""
    return torch._weight_int8pack_mm(input_MI.to(torch.bfloat16), codes_OI, scales_O).to(input_MI.dtype)


def pieces(input_MI: torch.Tensor, codes_OI: torch.Tensor, scales_O: torch.Tensor) -> torch.Tensor:
    """Widen a piece of the weight into the cache, multiply while it is there. As exact as the dtype: codes are
    multiplied as they are, and scaled afterwards. (`widen` rounds scaled weights: 0.17% of their norm in bfloat16.)"""
    if input_MI.dtype == torch.float16:  # codes are up to 127: their products would leave float16's range
        return functional.linear(input_MI, dequantize(codes_OI, scales_O, torch.float16))
    few = input_MI.shape[0] <= _MANY_ROWS and not input_MI.is_cuda
    height = max(1, (_PIECE_BYTES if few else _LARGE_PIECE_BYTES) // (codes_OI.shape[1] * input_MI.element_size()))
    outputs = [functional.linear(input_MI, part.to(input_MI.dtype)) for part in torch.split(codes_OI, height)]
    output_MO = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    return output_MO.mul_(scales_O)


def digits(input_MI: torch.Tensor, codes_OI: torch.Tensor, scales_O: torch.Tensor) -> torch.Tensor:
    """For more rows on a CPU: activations as 16-bit integers by the row's largest magnitude, split into two int8
    digits that torch's integer product multiplies exactly. Off by 2^-16 of the row's largest activation at most;
    a row's bits are those of `int8_rows`, whatever its batch. What is not finite stays so: the row becomes NaN."""
    count = input_MI.shape[0]
    wide = input_MI.float()
    top_M1 = wide.abs().amax(dim=-1, keepdim=True).clamp_(min=TINY)
    # TOP / top_M1 would be a product with the reciprocal, and rounded otherwise than in `int8_rows`.
    value = wide.mul(torch.full_like(top_M1, TOP).div_(top_M1)).round_().to(torch.int16)
    # value = 256 * high + low with low in [-128, 127]: half a digit is added before the high one is cut.
    digit = torch.cat([value.add(_DIGIT // 2).bitwise_right_shift_(8), value]).to(torch.int8)
    sums = torch._int_mm(digit, codes_OI.t()).double()
    output_MO = torch.add(sums[count:], sums[:count], alpha=_DIGIT).mul_(top_M1.double() / TOP).mul_(scales_O)
    return output_MO.float().to(input_MI.dtype)
