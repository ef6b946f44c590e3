"""Activations and their gradients as bytes.

In: a float tensor [..., hidden]. Out: a `TensorMeta` and its payload, in the encoding asked for:

    float32, bfloat16, float16   the values, little endian
    int8                         per 64 values of the last dimension one fp32 scale (absmax / 127),
                                 all scales first, then the rounded values; a last dimension that 64
                                 does not divide has one scale a row

A few hidden dimensions are tens of times larger than the rest; with one scale a row they would leave
the others a handful of levels, which shifts the loss (docs/experiments.md).

Decoding checks every size against what was announced and refuses values that are not finite, so
that a faulty node is caught at its own door.
"""

from __future__ import annotations

import math

import torch

from swarm.errors import ProtocolError
from swarm.wire.v1 import common_pb2 as pb

_PLAIN = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_RANK = 4
_GROUP = 64


def pack(tensor: torch.Tensor, encoding: str) -> tuple[pb.TensorMeta, bytes]:
    """Encode a float tensor of any device. Raises ProtocolError for an unknown encoding."""
    meta = pb.TensorMeta(shape=list(tensor.shape), encoding=encoding)
    if encoding == "int8":
        values = tensor.detach().to(device="cpu", dtype=torch.float32).reshape(-1, _group_size(tensor.shape[-1]))
        scale = values.abs().amax(dim=-1, keepdim=True).div_(127.0)
        # A group of zeros has scale 0: divide by 1 instead, its codes are 0 all the same.
        codes = (values / torch.where(scale == 0, 1.0, scale)).round_().to(torch.int8)
        return meta, scale.numpy().tobytes() + codes.numpy().tobytes()
    dtype = _PLAIN.get(encoding)
    if dtype is None:
        raise ProtocolError(f"unknown tensor encoding '{encoding}'")
    plain = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
    return meta, plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def payload_size(meta: pb.TensorMeta) -> int:
    """Bytes that a payload of this shape and encoding has. Raises ProtocolError."""
    shape = tuple(meta.shape)
    if not 1 <= len(shape) <= MAX_RANK or 0 in shape:
        raise ProtocolError(f"tensor shape {list(shape)} is not allowed")
    count = math.prod(shape)
    if meta.encoding == "int8":
        return count + 4 * (count // _group_size(shape[-1]))
    dtype = _PLAIN.get(meta.encoding)
    if dtype is None:
        raise ProtocolError(f"unknown tensor encoding '{meta.encoding[:32]}'")
    return count * dtype.itemsize


def unpack(meta: pb.TensorMeta, payload: bytes, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Decode to `dtype` on `device`.

    Raises ProtocolError: wrong size, unknown encoding, or values that are not finite.
    """
    expected = payload_size(meta)
    if len(payload) != expected:
        raise ProtocolError(f"tensor payload has {len(payload)} bytes, {expected} announced")
    shape = tuple(meta.shape)
    # A bytearray gives torch writable memory of its own; a view of `bytes` would be read-only.
    buffer = bytearray(payload)
    if meta.encoding == "int8":
        groups = math.prod(shape) // _group_size(shape[-1])
        scale = torch.frombuffer(buffer, dtype=torch.float32, count=groups).unsqueeze(1)
        codes = torch.frombuffer(buffer, dtype=torch.int8, offset=4 * groups).reshape(groups, -1)
        values = (codes.to(torch.float32) * scale).reshape(shape)
    else:
        values = torch.frombuffer(buffer, dtype=_PLAIN[meta.encoding]).reshape(shape)
    if not is_finite(values):
        raise ProtocolError("activations contain NaN or infinity", "route around the node that sent them")
    return values.to(device=device, dtype=dtype)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether every value is. (One pass; `isfinite` takes five, twenty times as long.)"""
    # Both extremes are NaN if any value is.
    return all(math.isfinite(extreme) for extreme in torch.aminmax(tensor))


def _group_size(width: int) -> int:
    """How many values of the last dimension share a scale."""
    return _GROUP if width % _GROUP == 0 else width
