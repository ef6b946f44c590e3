"""Activations and their gradients as bytes.

In: a float tensor [..., hidden]. Out: a `TensorMeta` and its payload, in the encoding asked for:

    float32, bfloat16, float16   the values, little endian; gradients in float16 divided by a power of two that
                                 brings the largest close to the end of its range (`TensorMeta.exponent`)
    int8                         per 64 values of the last dimension one fp32 scale (absmax / 127),
                                 all scales first, then the rounded values; a last dimension that 64
                                 does not divide has one scale a row
    int4                         of each row (the last dimension) the four largest values apart, as
                                 bfloat16; of the rest per 32 values (or a row) the least one and the
                                 step, bfloat16; a value is least + code x step, two codes a byte. In
                                 order: positions (int32) and values of the large ones, all least
                                 values, all steps, the codes, the first of two in the low half

A few hidden dimensions are tens of times larger than the rest; with one scale a row they would leave
the others a handful of levels, which shifts the loss; at 4 bits they would even among 32 (docs/experiments.md).

A gradient is one of a mean over all labelled tokens of a step: of 32,768 tokens two thirds of the values are below
float16's least.

Decoding checks every size against what was announced and refuses values that are not finite, so
that a faulty node is caught at its own door.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from swarm.errors import ProtocolError
from swarm.wire.v1 import common_pb2 as pb

_PLAIN = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_RANK = 4
_GROUP = {"int8": 64, "int4": 32}
_STEPS = 15.0
_APART = 4
_FEW = 2**15
"""Values. A CPU is done with so many before a GPU has been asked for the ten steps of it (measured for 4,096)."""
_AT_ONCE = 2**22
"""Values. What is made of them on the way takes up to 16 bytes each, which a card may not have for a whole prompt."""
_LARGEST = 15
"""The largest value of a scaled tensor is below two to this; float16 ends at just below two to the 16."""
_MOST_EXPONENT = 126
"""Either way: powers of two that float32 holds exactly."""


def pack(tensor: torch.Tensor, encoding: str, *, scaled: bool = False) -> tuple[pb.TensorMeta, bytes]:
    """Encode a float tensor of any device. Raises ProtocolError for an unknown encoding.

    scaled: with an exponent, if the encoding is float16; for gradients, where the receiver knows it.
    """
    meta = pb.TensorMeta(shape=list(tensor.shape), encoding=encoding)
    if tensor.numel() <= _FEW:
        tensor = tensor.cpu()
    if scaled and encoding == "float16":
        tensor = tensor.detach().float()
        meta.exponent = _exponent(tensor)
        tensor = tensor * 2.0**-meta.exponent
    if encoding == "int8":
        return meta, _in_parts(_pack_int8, tensor.detach().reshape(-1, _group_size("int8", tensor.shape[-1])))
    if encoding == "int4":
        return meta, _in_parts(_pack_int4, tensor.detach().reshape(-1, tensor.shape[-1]))
    dtype = _PLAIN.get(encoding)
    if dtype is None:
        raise ProtocolError(f"unknown tensor encoding '{encoding}'")
    return meta, _bytes(tensor.detach().to(dtype))


def payload_size(meta: pb.TensorMeta) -> int:
    """Bytes that a payload of this shape and encoding has. Raises ProtocolError."""
    shape = tuple(meta.shape)
    if not 1 <= len(shape) <= MAX_RANK or 0 in shape:
        raise ProtocolError(f"tensor shape {list(shape)} is not allowed")
    count = math.prod(shape)
    if meta.encoding == "int8":
        return count + 4 * (count // _group_size("int8", shape[-1]))
    if meta.encoding == "int4":
        rows = count // shape[-1]
        return 6 * rows * _apart(shape[-1]) + 4 * (count // _group_size("int4", shape[-1])) + (count + 1) // 2
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
    if meta.exponent and (meta.encoding != "float16" or abs(meta.exponent) > _MOST_EXPONENT):
        raise ProtocolError(f"an exponent of {meta.exponent} with the encoding '{meta.encoding}'")
    shape = tuple(meta.shape)
    # A bytearray gives torch writable memory of its own; a view of `bytes` would be read-only.
    buffer = bytearray(payload)
    where = torch.device("cpu") if math.prod(shape) <= _FEW else device
    if meta.encoding == "int8":
        groups = math.prod(shape) // _group_size("int8", shape[-1])
        sent = torch.frombuffer(buffer, dtype=torch.uint8)
        # No value is larger than this many of its scale.
        _check_finite(128 * sent[: 4 * groups].view(torch.float32))
        sent = sent.to(where)
        scale_G, codes_GN = sent[: 4 * groups].view(torch.float32), sent[4 * groups :].view(torch.int8).view(groups, -1)
        parts = [
            codes_GN[part].to(torch.float32).mul_(scale_G[part].unsqueeze(1)).to(dtype)
            for part in _parts(groups, codes_GN.shape[1])
        ]
        values = (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(shape)
    elif meta.encoding == "int4":
        values = _unpack_int4(buffer, shape, where, dtype)
    else:
        values = torch.frombuffer(buffer, dtype=_PLAIN[meta.encoding]).reshape(shape)
        if meta.exponent:
            values = values.float() * 2.0**meta.exponent
        _check_finite(values)
    return values.to(device=device, dtype=dtype)


def _exponent(tensor: torch.Tensor) -> int:
    """The power of two by which a tensor is divided so that its largest value nearly fills float16's range."""
    largest = max(abs(float(extreme)) for extreme in torch.aminmax(tensor)) if tensor.numel() else 0.0
    if largest == 0.0 or not math.isfinite(largest):
        return 0
    return max(-_MOST_EXPONENT, min(_MOST_EXPONENT, math.frexp(largest)[1] - _LARGEST))


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether every value is. (One pass; `isfinite` takes five, twenty times as long.)"""
    # Both extremes are NaN if any value is.
    return all(math.isfinite(extreme) for extreme in torch.aminmax(tensor))


def _check_finite(values: torch.Tensor) -> None:
    if not is_finite(values):
        raise ProtocolError("activations contain NaN or infinity", "route around the node that sent them")


def _bytes(tensor: torch.Tensor) -> bytes:
    plain = tensor.cpu().contiguous()
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def _parts(rows: int, width: int) -> list[slice]:
    """Rows that are computed at a time: an even number of them, so that the codes of a part fill their bytes."""
    most = max(2, _AT_ONCE // width // 2 * 2)
    return [slice(start, start + most) for start in range(0, rows, most)]


def _in_parts(encode: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], rows: torch.Tensor) -> bytes:
    """What `encode` makes of all rows, each kind of it in one piece."""
    pieces = [tuple(map(_bytes, encode(rows[part].float()))) for part in _parts(*rows.shape)]
    return b"".join(b"".join(kind) for kind in zip(*pieces, strict=True))


def _pack_int8(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    scale = values.abs().amax(dim=-1, keepdim=True).div_(127.0)
    # A group of zeros has scale 0: divide by 1 instead, its codes are 0 all the same.
    return scale, (values / torch.where(scale == 0, 1.0, scale)).round_().to(torch.int8)


def _pack_int4(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    width = values.shape[-1]
    # NaN and infinity are the largest of their row: they arrive as they are, and are refused there.
    places = values.abs().topk(_apart(width), dim=-1).indices
    large = values.gather(1, places).to(torch.bfloat16)
    groups = values.scatter(1, places, 0.0).reshape(-1, _group_size("int4", width))
    least, most = torch.aminmax(groups, dim=-1, keepdim=True)
    # Rounded first: codes are chosen for the numbers that the other side will compute with.
    least = least.to(torch.bfloat16)
    step = ((most - least.float()) / _STEPS).to(torch.bfloat16)
    divisor = torch.where(step == 0, 1.0, step.float())
    codes = ((groups - least.float()) / divisor).round_().clamp_(0, _STEPS).to(torch.uint8).flatten()
    if len(codes) % 2:
        codes = torch.cat((codes, codes.new_zeros(1)))
    return places.to(torch.int32), large, least, step, codes[0::2] | (codes[1::2] << 4)


def _unpack_int4(buffer: bytearray, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Raises ProtocolError for a position beyond the row, and for values that are not finite."""
    count, width, size = math.prod(shape), shape[-1], _group_size("int4", shape[-1])
    apart, groups = count // width * _apart(width), count // size
    sent, numbers_at, codes_at = torch.frombuffer(buffer, dtype=torch.uint8), 4 * apart, 6 * apart + 4 * groups
    least_place, last_place = torch.aminmax(sent[:numbers_at].view(torch.int32))
    if not 0 <= int(least_place) <= int(last_place) < width:
        raise ProtocolError("activations name a place beyond their row", "route around the node that sent them")
    sent = sent.to(device)
    places_RA = sent[:numbers_at].view(torch.int32).view(-1, _apart(width))
    numbers = sent[numbers_at:codes_at].view(torch.bfloat16)
    large_RA = numbers[:apart].view(places_RA.shape)
    least_RG, step_RG = (each.view(-1, width // size) for each in torch.split(numbers[apart:], groups))
    parts = []
    for part in _parts(count // width, width):
        least, step = (each[part].float().reshape(-1, 1) for each in (least_RG, step_RG))
        halves = sent[codes_at:][part.start * width // 2 : (part.stop * width + 1) // 2]
        codes = torch.stack((halves & 15, halves >> 4), dim=1).flatten()[: len(least) * size].view(-1, size).float()
        values = torch.addcmul(least, codes, step).reshape(-1, width)
        values.scatter_(1, places_RA[part].long(), large_RA[part].float())
        _check_finite(values)
        parts.append(values.to(dtype))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(shape)


def _apart(width: int) -> int:
    """How many values of a row travel apart from the others."""
    return min(_APART, width)


def _group_size(encoding: str, width: int) -> int:
    """How many values of the last dimension share a scale."""
    return _GROUP[encoding] if width % _GROUP[encoding] == 0 else width
