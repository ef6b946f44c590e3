"""From named tensors to a frame and back: the pipeline of the codec.

In: float32 numpy arrays by parameter key and the settings, or a frame and the shapes it must
have. Out: a frame, or new float32 arrays, equal bit for bit wherever they are decoded.

`cocktail` keeps, chunk by chunk, the largest values of a seeded random subset at a few bits each;
the other coordinates decode to zero. `dense` sends every value as it is. Never mutates its
arguments, never allocates by a number in a frame, never lets a value through that is not finite.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swarm.compress import packing, positions, quantize, select
from swarm.compress.chunks import ChunkGroup, chunk_groups
from swarm.compress.frame import LEVEL, FrameContext, Shape, ordered, read_frame, write_frame
from swarm.compress.positions import PositionCoding
from swarm.config import CodecSettings
from swarm.errors import CodecError
from swarm.wire.bounded import compress, decompress

STREAMS = ("gaps", "bitmaps", "signs", "codes", "levels")
"""A frame's body: a u32 length and a zstandard frame each, apart since each has statistics of its own."""
_LENGTH = struct.Struct("<I")

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class _Plan:
    """What a group of chunks sends; both ends derive it from the shapes and the settings."""

    group: ChunkGroup
    subset: int
    kept: int
    coding: PositionCoding

    def stream_bytes(self, bits: int) -> dict[str, int]:
        """Uncompressed bytes in each stream: exact, except that gaps are an upper bound."""
        rows = self.group.rows
        return {
            "gaps": positions.max_gap_bytes(rows, self.subset, self.kept) * (self.coding is PositionCoding.GAPS),
            "bitmaps": positions.bitmap_bytes(rows, self.subset) * (self.coding is PositionCoding.BITMAP),
            "signs": packing.sign_bytes(rows, self.kept),
            "codes": packing.code_bytes(rows, self.kept, bits),
            "levels": packing.level_bytes(rows, bits),
        }


def encode(tensors: Mapping[str, Float32], settings: CodecSettings, context: FrameContext) -> bytes:
    """One frame of `tensors`, keyed "<block>/<tensor>", any shapes.

    Raises CodecError, naming the key: not a float32 array, values that are not finite, a malformed
    key, an empty tensor.
    """
    shapes = ordered(shapes_of(tensors))
    flats = {key: np.ascontiguousarray(tensors[key]).reshape(-1) for key in shapes}
    for key, flat in flats.items():
        _require_finite(key, flat)
    if settings.kind == "dense":
        body = b"".join(flat.astype("<f4", copy=False).tobytes() for flat in flats.values())
    else:
        body = _encode_cocktail(flats, settings, context)
    return write_frame(settings, context, shapes, body)


def decode(frame: bytes | memoryview, shapes: Mapping[str, Shape], context: FrameContext) -> dict[str, Float32]:
    """The tensors of a frame, in key order, newly allocated.

    `shapes`: exactly the keys and shapes expected. Raises FrameTooLarge for a frame, or a part of
    it, beyond what these shapes can need; CodecError, saying what is wrong, for anything else
    that is not a whole frame of exactly these tensors in exactly this context.
    """
    shapes = ordered(shapes)
    settings, body = read_frame(frame, shapes, context)
    sizes = {key: math.prod(shape) for key, shape in shapes.items()}
    if settings.kind == "dense":
        flats = _decode_dense(body, sizes)
    else:
        flats = _decode_cocktail(body, sizes, settings, context)
    return {key: flats[key].reshape(shape) for key, shape in shapes.items()}


def shapes_of(tensors: Mapping[str, Float32]) -> dict[str, Shape]:
    """Raises CodecError for anything but a float32 array."""
    for key, tensor in tensors.items():
        if not isinstance(tensor, np.ndarray):
            raise CodecError(f"{key!r} is not a numpy array but {type(tensor).__name__}")
        if tensor.dtype != np.float32:
            raise CodecError(f"{key!r} is not of this machine's float32 but of dtype {tensor.dtype.str}")
    return {key: tensor.shape for key, tensor in tensors.items()}


def _require_finite(key: str, flat: Float32) -> None:
    if not np.isfinite(flat).all():
        raise CodecError(f"{key!r} holds {np.count_nonzero(~np.isfinite(flat))} values that are not finite")


def _decode_dense(body: memoryview, sizes: Mapping[str, int]) -> dict[str, Float32]:
    if len(body) != 4 * sum(sizes.values()):
        raise CodecError(f"the frame holds {len(body)} bytes of values where {4 * sum(sizes.values())} are expected")
    flats: dict[str, Float32] = {}
    offset = 0
    for key, size in sizes.items():
        flats[key] = np.frombuffer(body, "<f4", size, offset).astype(np.float32)
        _require_finite(key, flats[key])
        offset += 4 * size
    return flats


def _plans(sizes: Mapping[str, int], settings: CodecSettings) -> Iterator[_Plan]:
    for group in chunk_groups(sizes, settings.chunk):
        counts = select.counts(group.length, settings)
        coding = positions.position_coding(counts.subset, counts.kept)
        yield _Plan(group, counts.subset, counts.kept, coding)


class _Subsets:
    """The coordinates of each chunk that the round's seed allows; all of them if random_keep is 1."""

    def __init__(self, sizes: Mapping[str, int], settings: CodecSettings, context: FrameContext) -> None:
        self._ranks: dict[str, NDArray[np.uint32]] = {}
        if settings.random_keep < 1:
            self._ranks = {
                key: select.random_ranks(context.job_id, context.round, key, size) for key, size in sizes.items()
            }

    def of(self, plan: _Plan) -> NDArray[np.int64] | None:
        """[R, subset] ascending positions in the chunk; None for all."""
        if plan.subset == plan.group.length:
            return None
        return select.top_positions(plan.group.gather(self._ranks), plan.subset)


def _encode_cocktail(flats: Mapping[str, Float32], settings: CodecSettings, context: FrameContext) -> bytes:
    bits = settings.bits
    sizes = {key: flat.size for key, flat in flats.items()}
    subsets = _Subsets(sizes, settings, context)
    streams: dict[str, list[bytes]] = {name: [] for name in STREAMS}
    for plan in _plans(sizes, settings):
        values_RM = plan.group.gather(flats)
        subset_RM = subsets.of(plan)
        if subset_RM is not None:
            values_RM = np.take_along_axis(values_RM, subset_RM, axis=1)
        positions_RK = select.top_positions(select.magnitude_ranks(values_RM), plan.kept)
        if plan.coding is PositionCoding.GAPS:
            streams["gaps"].append(positions.write_gaps(positions_RK))
        elif plan.coding is PositionCoding.BITMAP:
            streams["bitmaps"].append(positions.write_bitmap(positions_RK, plan.subset))
        values_RK = np.take_along_axis(values_RM, positions_RK, axis=1)
        codes_RK, levels_RP = quantize.quantize(np.abs(values_RK), bits)
        streams["signs"].append(packing.write_signs(values_RK))
        streams["codes"].append(packing.write_codes(codes_RK, bits))
        streams["levels"].append(packing.write_levels(levels_RP))
    parts: list[bytes] = []
    for name in STREAMS:
        compressed = compress(b"".join(streams[name]), LEVEL)
        parts += [_LENGTH.pack(len(compressed)), compressed]
    return b"".join(parts)


def _decode_cocktail(
    body: memoryview, sizes: Mapping[str, int], settings: CodecSettings, context: FrameContext
) -> dict[str, Float32]:
    bits = settings.bits
    plans = list(_plans(sizes, settings))
    streams = _read_streams(body, plans, bits)
    n_gaps = sum(plan.group.rows * plan.kept for plan in plans if plan.coding is PositionCoding.GAPS)
    gaps = positions.read_gaps(streams["gaps"].read(), n_gaps)
    subsets = _Subsets(sizes, settings, context)
    flats = {key: np.empty(size, np.float32) for key, size in sizes.items()}
    for plan in plans:
        rows, kept = plan.group.rows, plan.kept
        size = plan.stream_bytes(bits)
        codes_RK = packing.read_codes(streams["codes"].read(size["codes"]), rows, kept, bits)
        levels_RP = packing.read_levels(streams["levels"].read(size["levels"]), rows, bits)
        negative_RK = packing.read_signs(streams["signs"].read(size["signs"]), rows, kept)
        magnitudes_RK = quantize.dequantize(codes_RK, levels_RP, bits)
        values_RK = np.where(negative_RK, -magnitudes_RK, magnitudes_RK)
        if plan.coding is PositionCoding.GAPS:
            own, gaps = gaps[: rows * kept], gaps[rows * kept :]
            positions_RK = positions.positions_from_gaps(own.reshape(rows, kept), plan.subset)
        elif plan.coding is PositionCoding.BITMAP:
            marks = streams["bitmaps"].read(size["bitmaps"])
            positions_RK = positions.read_bitmap(marks, rows, plan.subset, kept)
        else:
            positions_RK = np.broadcast_to(np.arange(kept), (rows, kept))
        subset_RM = subsets.of(plan)
        if subset_RM is not None:
            positions_RK = np.take_along_axis(subset_RM, positions_RK, axis=1)
        values_RL = np.zeros((rows, plan.group.length), np.float32)
        np.put_along_axis(values_RL, positions_RK, values_RK, axis=1)
        plan.group.scatter(values_RL, flats)
    return flats


def _read_streams(body: memoryview, plans: list[_Plan], bits: int) -> dict[str, io.BytesIO]:
    """The uncompressed streams, none larger than the shapes and settings allow."""
    expected = dict.fromkeys(STREAMS, 0)
    for plan in plans:
        for name, size in plan.stream_bytes(bits).items():
            expected[name] += size
    streams: dict[str, io.BytesIO] = {}
    for name in STREAMS:
        if len(body) < _LENGTH.size:
            raise CodecError(f"the frame ends before its {name}")
        (compressed_bytes,) = _LENGTH.unpack_from(body)
        if compressed_bytes > len(body) - _LENGTH.size:
            raise CodecError(f"the {name} reach beyond the frame")
        body = body[_LENGTH.size :]
        content = decompress(body[:compressed_bytes], limit_bytes=expected[name])
        if name != "gaps" and len(content) != expected[name]:
            raise CodecError(f"the frame holds {len(content)} bytes of {name}, expected are {expected[name]}")
        streams[name] = io.BytesIO(content)
        body = body[compressed_bytes:]
    if len(body):
        raise CodecError(f"the frame has {len(body)} bytes after its last part")
    return streams
