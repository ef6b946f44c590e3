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
_CHUNK = 2**19
"""Weights quantized at a time: what the search makes of them stays in the cache."""


def quantize(weight_OI: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [O, I] uint8 in 0..15 and scales with zeros [I / group, O, 2] bfloat16. Of several ranges around a
    group's middle the one with the least squared error is taken: clipping the ends pays for a finer step."""
    count = _CHUNK if weight_OI.device.type == "cpu" else _CHUNK * 16
    rows = max(1, count // weight_OI.shape[1])
    parts = [_quantize_rows(part.float(), group) for part in torch.split(weight_OI, rows)]
    return torch.cat([codes for codes, _ in parts]), torch.cat([scales for _, scales in parts], dim=1).contiguous()


def _quantize_rows(weight_OI: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    values = weight_OI.reshape(weight_OI.shape[0], -1, group)
    low, high = values.amin(dim=-1, keepdim=True), values.amax(dim=-1, keepdim=True)
    middle, spread = (low + high) / 2, high - low
    scale, zero = _range(middle, spread, _SHRINKS[0])
    least = _error(values, scale, zero)
    for shrink in _SHRINKS[1:]:
        other_scale, other_zero = _range(middle, spread, shrink)
        error = _error(values, other_scale, other_zero)
        less = error < least
        scale, zero = torch.where(less, other_scale, scale), torch.where(less, other_zero, zero)
        least = torch.minimum(error, least)
    codes = _codes(values, scale, zero).add_(8).flatten(1).to(torch.uint8)
    return codes, torch.cat([scale, zero], dim=-1).transpose(0, 1).to(torch.bfloat16)


def _range(middle: torch.Tensor, spread: torch.Tensor, shrink: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero, float32 values that bfloat16 can hold."""
    scale = (spread * (shrink / LEVELS)).clamp_(min=_TINY).to(torch.bfloat16).float()
    return scale, (middle + scale / 2).to(torch.bfloat16).float()


def _codes(values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Less 8."""
    return (values - zero).div_(scale).round_().clamp_(-8, LEVELS - 8)


def _error(values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    back = _codes(values, scale, zero).mul_(scale).add_(zero)
    return back.sub_(values).square_().sum(dim=-1, keepdim=True)


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
    return nibbles.index_select(1, order(packed.device, in_features)).view(-1, in_features)


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
def order(device: torch.device, in_features: int) -> torch.Tensor:
    """Where in a packed block of 64 rows each code lies, [64 * I] int64."""
    count = BLOCK_ROWS * in_features
    position = torch.arange(count, device=device)
    found = torch.zeros(count, dtype=torch.int64, device=device)
    for shift in range(0, (count - 1).bit_length(), 4):
        digit = position.bitwise_right_shift(shift).bitwise_and_(15).to(torch.uint8)
        found += _nibbles(pack(digit.view(BLOCK_ROWS, in_features))).long() << shift
    places = torch.empty_like(found)
    places[found] = position
    return places
