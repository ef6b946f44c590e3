"""Narrow weights made wide again in one pass on a GPU, for products of many rows and for gradients.

Torch takes six passes for 4-bit codes in its kernel's order: on an H100 a weight of 14336 x 4096 took 1.02 ms, more
than its product with 4,096 rows (0.64 ms); here 0.21 ms (docs/experiments.md).

In: codes and scales as `swarm.model.quantize` holds them on a CUDA device. Out: [O, I], each value rounded once from
float32. Loaded only where there is such a device: Triton comes with torch's builds for them.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from swarm.model.kernels.int4 import BLOCK_ROWS, order

_MOST_COLUMNS = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _int8(codes, scales, out, width, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here, at = column < width, row.to(tl.int64) * width + column
    scale = tl.load(scales + row).to(tl.float32)
    value = tl.load(codes + at, mask=here, other=0).to(tl.float32) * scale
    tl.store(out + at, value.to(out.dtype.element_ty), mask=here)


@triton.jit  # type: ignore[untyped-decorator]
def _int4(  # type: ignore[no-untyped-def]
    codes, places, scales, out, width, kept_rows, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row, column = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = column < width
    place = tl.load(places + (row % ROWS) * width + column, mask=here, other=0)
    two = tl.load(codes + (row // ROWS).to(tl.int64) * (ROWS // 2) * width + (place >> 1), mask=here, other=0)
    code = (two.to(tl.int32) >> ((place & 1) * 4)) & 15
    at = ((column // GROUP) * kept_rows + row) * 2
    scale = tl.load(scales + at, mask=here, other=0).to(tl.float32)
    zero = tl.load(scales + at + 1, mask=here, other=0).to(tl.float32)
    value = (code - 8).to(tl.float32) * scale + zero
    tl.store(out + row.to(tl.int64) * width + column, value.to(out.dtype.element_ty), mask=here)


def int8(codes_OI: torch.Tensor, scales_O: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As `int8.dequantize`."""
    rows, width = codes_OI.shape
    out_OI = torch.empty((rows, width), dtype=dtype, device=codes_OI.device)
    columns = _columns(width)
    with torch.cuda.device(codes_OI.device):
        _int8[(rows, triton.cdiv(width, columns))](codes_OI, scales_O, out_OI, width, columns)
    return out_OI


def int4(packed: torch.Tensor, scales_GO2: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """As `int4.dequantize` of `int4.unpack(packed, I)`. packed: in the order of torch's kernel; O may be fewer rows."""
    rows, width = shape
    groups, kept_rows, _ = scales_GO2.shape
    out_OI = torch.empty(shape, dtype=dtype, device=packed.device)
    columns = _columns(width)
    with torch.cuda.device(packed.device):
        _int4[(rows, triton.cdiv(width, columns))](
            packed.view(torch.uint8),
            _order(packed.device, width),
            scales_GO2,
            out_OI,
            width,
            kept_rows,
            width // groups,
            BLOCK_ROWS,
            columns,
        )
    return out_OI


def _columns(width: int) -> int:
    return min(_MOST_COLUMNS, int(triton.next_power_of_2(width)))


@lru_cache(maxsize=64)
def _order(device: torch.device, in_features: int) -> torch.Tensor:
    return order(device, in_features).to(torch.int32)
