"""Weights as 4-bit codes in groups along the input, each with a scale and a zero: w = (code - 8) * scale + zero.

In: activations [M, I], packed codes, scales and zeros [I / group, O', 2] bfloat16 (O' is O rounded up
to whole blocks of 64 rows). Out: [M, O] in the dtype of the activations.

Codes are kept as torch's kernel of the device wants them, which every device orders in another way. All
permute the codes within blocks of 64 rows, so the order is found by packing the positions themselves,
and unpacking needs no knowledge of the kernel. Where there is no kernel they are kept row by row.
"""

from __future__ import annotations

from functools import lru_cache
from typing import cast

import torch

BLOCK_ROWS = 64
LEVELS = 15
_SHRINKS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.80)
_TINY = 1e-12
_CHUNK = 2**21


def quantize(weight_OI: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [O, I] uint8 in 0..15 and scales with zeros [I / group, O, 2] bfloat16. Of several ranges around a
    group's middle the one with the least squared error is taken: clipping the ends pays for a finer step."""
    rows = max(1, _CHUNK // weight_OI.shape[1])
    parts = [_quantize_rows(part.float(), group) for part in torch.split(weight_OI, rows)]
    return torch.cat([codes for codes, _ in parts]), torch.cat([scales for _, scales in parts], dim=1)


def _quantize_rows(weight_OI: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    values = weight_OI.reshape(weight_OI.shape[0], -1, group)
    low, high = values.amin(dim=-1, keepdim=True), values.amax(dim=-1, keepdim=True)
    best: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    for shrink in _SHRINKS:
        scale = ((high - low) * (shrink / LEVELS)).clamp_(min=_TINY).to(torch.bfloat16)
        zero = ((low + high) / 2 + scale.float() / 2).to(torch.bfloat16)
        codes = ((values - zero.float()) / scale.float() + 8).round_().clamp_(0, LEVELS)
        error = ((codes - 8) * scale.float() + zero.float() - values).square_().sum(dim=-1, keepdim=True)
        if best is None:
            best = error, codes, scale, zero
        else:
            less = error < best[0]
            chosen = zip((error, codes, scale, zero), best, strict=True)
            best = tuple(torch.where(less, new, old) for new, old in chosen)  # type: ignore[assignment]
    assert best is not None
    _, codes, scale, zero = best
    return codes.flatten(1).to(torch.uint8), torch.cat([scale, zero], dim=-1).transpose(0, 1).contiguous()


def dequantize(codes_OI: torch.Tensor, scales_GO2: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[O, I] from unpacked codes."""
    scales_OG2 = scales_GO2.transpose(0, 1)[: codes_OI.shape[0]].to(dtype)
    values = codes_OI.reshape(*scales_OG2.shape[:2], -1).to(dtype).sub_(8)
    return values.mul_(scales_OG2[..., :1]).add_(scales_OG2[..., 1:]).flatten(1)


def has_kernel(device: torch.device) -> bool:
    """Whether torch can be asked; that its answers are right is for `traits` to find out."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # its mma instructions on bfloat16
    return device.type == "cpu"


def pack(codes_OI: torch.Tensor) -> torch.Tensor:
    """Codes of whole blocks of rows as the device's kernel wants them."""
    if codes_OI.device.type == "cpu":
        return cast(torch.Tensor, torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_OI.to(torch.int32), 1))
    tiles = next(tiles for tiles in (8, 4, 2) if codes_OI.shape[1] % (16 * tiles) == 0)
    return torch._convert_weight_to_int4pack(pack_plain(codes_OI), tiles)


def unpack(packed: torch.Tensor, in_features: int) -> torch.Tensor:
    """The inverse of `pack`: codes [O', I] uint8."""
    nibbles = _nibbles(packed).view(-1, BLOCK_ROWS * in_features)
    return nibbles.index_select(1, _order(packed.device, in_features)).view(-1, in_features)


def pack_plain(codes_OI: torch.Tensor) -> torch.Tensor:
    """[O, I / 2] uint8, the earlier of two codes in the upper half."""
    return codes_OI[:, ::2].bitwise_left_shift(4).bitwise_or_(codes_OI[:, 1::2])


def unpack_plain(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack([packed.bitwise_right_shift(4), packed.bitwise_and(15)], dim=-1).flatten(1)


def native(input_MI: torch.Tensor, packed: torch.Tensor, scales_GO2: torch.Tensor) -> torch.Tensor:
    """Torch's own kernel [M, O']: activations and result rounded to bfloat16. A row's bits do not depend
    on other rows on a CPU."""
    wide = input_MI.to(torch.bfloat16)
    group = input_MI.shape[1] // scales_GO2.shape[0]
    if input_MI.device.type == "cpu":
        output_MO = torch.ops.aten._weight_int4pack_mm_for_cpu(wide, packed, group, scales_GO2)
    else:
        output_MO = torch._weight_int4pack_mm(wide, packed, group, scales_GO2)
    return cast(torch.Tensor, output_MO.to(input_MI.dtype))


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    packed_bytes = packed.contiguous().view(torch.uint8).flatten()
    return torch.stack([packed_bytes.bitwise_and(15), packed_bytes.bitwise_right_shift(4)], dim=-1).flatten()


@lru_cache(maxsize=64)
def _order(device: torch.device, in_features: int) -> torch.Tensor:
    """Where in a packed block of 64 rows each code lies, [64 * I] int64."""
    count = BLOCK_ROWS * in_features
    position = torch.arange(count, device=device)
    found = torch.zeros(count, dtype=torch.int64, device=device)
    for shift in range(0, (count - 1).bit_length(), 4):
        digit = position.bitwise_right_shift(shift).bitwise_and_(15).to(torch.uint8)
        found += _nibbles(pack(digit.view(BLOCK_ROWS, in_features))).long() << shift
    order = torch.empty_like(found)
    order[found] = position
    return order
