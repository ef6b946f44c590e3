"""Attention masks of a step as bits: one a row and column, rows one after the other, lowest bit first."""

from __future__ import annotations

import torch

from swarm.errors import ProtocolError

_SHIFTS = torch.arange(8, dtype=torch.uint8)


def pack_mask(mask_BT: torch.Tensor) -> bytes:
    """Bits of a [batch, time] mask (1: real token, 0: padding); nothing if there is no padding."""
    flat = mask_BT.bool().flatten().to(torch.uint8)
    if bool(flat.all()):
        return b""
    padded = torch.cat([flat, flat.new_zeros(-len(flat) % 8)]).reshape(-1, 8)
    return bytes((padded << _SHIFTS).sum(dim=1, dtype=torch.uint8).tolist())


def unpack_mask(data: bytes, batch: int, time: int) -> torch.Tensor | None:
    """The mask [batch, time] bool; None for no padding. Raises ProtocolError."""
    if not data:
        return None
    if len(data) != -(-batch * time // 8):
        raise ProtocolError(f"a mask of {len(data)} bytes for {batch} rows and {time} columns")
    bits = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    ones = (bits.unsqueeze(1) >> _SHIFTS) & 1
    return ones.flatten()[: batch * time].reshape(batch, time).bool()
