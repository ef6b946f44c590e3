"""What a frame says about itself: header, body and checksum.

    magic "SWCF" | version | kind | bits | allocation | chunk u32 | random_keep f64 | density f64 | round u64
    | sha256(job id)[:8] | base hash[:8] | sha256(manifest)[:8] | keys u32 | body | sha256[:8]

Little-endian. The manifest, each parameter key and its shape in key order, is what the receiver must know anyway, as
it must know the round: only its hash travels, since the names would be 8% of a small frame. The
checksum covers all that stands before it; it finds damage, not forgery, which is the signature's task.

In: settings, context, shapes and a body, or a frame from anybody. Out: a frame, or its settings
and body once everything else about it has been found right. Never allocates by a number in a
frame, never reports a frame as good in part.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from pydantic import ValidationError

from swarm.config import CodecSettings
from swarm.errors import CodecError, FrameTooLarge
from swarm.ids import key_order, sha256

MAGIC: Final = b"SWCF"
VERSION: Final = 2
HEADER: Final = struct.Struct("<4sBBBBIddQ8s8s8sI")
CHECKSUM_BYTES: Final = 8
MAX_KEY_BYTES: Final = 512
MAX_RANK: Final = 8
_KINDS: Final = ("dense", "cocktail")
_ALLOCATIONS: Final = ("even", "energy")
_KEY_PATTERN: Final = re.compile(r"(head|0|[1-9][0-9]{0,8})/[!-~]+")
"""One spelling a block, so that key order is total; printable ASCII, so that errors can quote it."""
_KEY_SIZE: Final = struct.Struct("<H")
_SLACK_BYTES: Final = 4096

Shape = tuple[int, ...]


@dataclass(frozen=True)
class FrameContext:
    """Where a frame belongs. `base_hash`: 32 bytes, the hash of the parameters its delta starts from."""

    job_id: str
    round: int
    base_hash: bytes

    def __post_init__(self) -> None:
        if not 0 <= self.round < 1 << 64 or len(self.base_hash) != 32:
            raise CodecError("a frame needs a round from 0 to 2^64 - 1 and a base hash of 32 bytes")

    @property
    def job_hash(self) -> bytes:
        return sha256(self.job_id.encode())[:8]


@dataclass(frozen=True)
class Layout:
    """Tensors as they lie one after the other in a frame."""

    shapes: dict[str, Shape]
    """In key order."""
    sizes: tuple[int, ...]
    manifest_hash: bytes
    max_bytes: int

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self.shapes)

    @property
    def elements(self) -> int:
        return sum(self.sizes)


def layout_of(shapes: Mapping[str, Shape]) -> Layout:
    """Raises CodecError: a key or shape that a frame cannot carry. Remembered: the same tensors come every round."""
    return _layout(tuple(shapes.items()))


@lru_cache(maxsize=64)
def _layout(items: tuple[tuple[str, Shape], ...]) -> Layout:
    shapes = dict(items)
    for key, shape in shapes.items():
        if len(key) > MAX_KEY_BYTES or _KEY_PATTERN.fullmatch(key) is None:
            raise CodecError(f"{key!r} is not a parameter key of the form <block>/<tensor>")
        if len(shape) > MAX_RANK or not all(0 < size < 1 << 32 for size in shape):
            raise CodecError(f"{key!r} has shape {shape}, which a frame cannot carry")
    shapes = {key: shapes[key] for key in sorted(shapes, key=key_order)}
    sizes = tuple(math.prod(shape) for shape in shapes.values())
    fixed_bytes = HEADER.size + CHECKSUM_BYTES + _SLACK_BYTES
    # Raw float32 is the largest body: a coded value takes at most 16 bits, a position as many.
    max_bytes = fixed_bytes + 64 * len(shapes) + 4 * sum(sizes) + sum(sizes) // 32
    return Layout(shapes, sizes, sha256(_manifest(shapes))[:8], max_bytes)


def max_frame_bytes(shapes: Mapping[str, Shape]) -> int:
    """The most bytes a frame of these tensors takes under any settings: what a receiver need accept."""
    return layout_of(shapes).max_bytes


def write_frame(settings: CodecSettings, context: FrameContext, layout: Layout, body: bytes) -> bytes:
    header = HEADER.pack(
        MAGIC,
        VERSION,
        _KINDS.index(settings.kind),
        settings.bits,
        _ALLOCATIONS.index(settings.allocation),
        settings.chunk,
        settings.random_keep,
        settings.density,
        context.round,
        context.job_hash,
        context.base_hash[:8],
        layout.manifest_hash,
        len(layout.shapes),
    )
    return seal(header + body)


def seal(content: bytes) -> bytes:
    """Appends the checksum."""
    return content + sha256(content)[:CHECKSUM_BYTES]


def read_frame(frame: bytes | memoryview, layout: Layout, context: FrameContext) -> tuple[CodecSettings, memoryview]:
    """Settings and body of a frame that is whole and is the expected one.

    Raises FrameTooLarge: longer than any frame of these tensors; CodecError: anything else, by name.
    """
    view = memoryview(frame).cast("B")
    if len(view) > layout.max_bytes:
        raise FrameTooLarge(f"a frame of {len(view)} bytes arrived where at most {layout.max_bytes} can be needed")
    if bytes(view[:4]) != MAGIC:
        raise CodecError("this is not a codec frame")
    if len(view) < HEADER.size + CHECKSUM_BYTES:
        raise CodecError(f"the frame is cut short: {len(view)} bytes")
    if view[4] != VERSION:
        raise CodecError(f"the frame has version {view[4]}, this release reads version {VERSION}")
    content = view[:-CHECKSUM_BYTES]
    if sha256(content)[:CHECKSUM_BYTES] != view[-CHECKSUM_BYTES:]:
        raise CodecError("the frame does not match its checksum: it is damaged or cut short")
    fields = HEADER.unpack_from(content)
    kind, bits, allocation, chunk, random_keep, density, round_, job_hash, base_hash, manifest_hash, n_keys = fields[2:]
    if job_hash != context.job_hash:
        raise CodecError(f"the frame belongs to another job than '{context.job_id}'")
    if round_ != context.round:
        raise CodecError(f"the frame belongs to round {round_}, not to round {context.round}")
    if base_hash != context.base_hash[:8]:
        raise CodecError(
            f"the frame starts from parameters {base_hash.hex()}, this round from {context.base_hash[:8].hex()}"
        )
    if n_keys != len(layout.shapes):
        raise CodecError(f"the frame holds {n_keys} tensors where {len(layout.shapes)} are expected")
    if manifest_hash != layout.manifest_hash:
        raise CodecError(f"the frame holds other tensors than the {n_keys} expected, or other shapes of them")
    if kind >= len(_KINDS) or allocation >= len(_ALLOCATIONS):
        raise CodecError(f"the frame has unknown kind {kind} or allocation {allocation}")
    try:
        settings = CodecSettings(
            kind=_KINDS[kind],
            random_keep=random_keep,
            density=density,
            bits=bits,
            chunk=chunk,
            allocation=_ALLOCATIONS[allocation],
        )
    except ValidationError as error:
        raise CodecError(f"the frame has impossible settings: {error.errors()[0]['loc'][0]}") from error
    return settings, content[HEADER.size :]


def _manifest(shapes: Mapping[str, Shape]) -> bytes:
    """A key's length, the key, its rank and its sizes, for each in turn."""
    parts: list[bytes] = []
    for key, shape in shapes.items():
        name = key.encode()
        parts.append(_KEY_SIZE.pack(len(name)) + name + struct.pack(f"<B{len(shape)}I", len(shape), *shape))
    return b"".join(parts)
