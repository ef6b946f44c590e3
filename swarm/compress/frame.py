"""What a frame says about itself: header, manifest, body and checksum.

    magic "SWCF" | version | kind | bits | 0 | chunk u32 | random_keep f64 | density f64 | round u64
    | sha256(job id)[:16] | base hash 32 | keys u32 | manifest bytes u32 | manifest | body | sha256[:16]

Little-endian. The manifest, compressed, names each parameter key and its shape in key order; the
checksum covers all that stands before it. Everything needed to decode stands in the frame except
what the receiver must know anyway: the shapes it expects and the round it is in. Element counts
follow from the shapes, so there is none to forge.

In: settings, context, shapes and a body, or a frame from anybody. Out: a frame, or its settings
and body once everything else about it has been found right. Never allocates by a number in a
frame, never reports a frame as good in part.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from pydantic import ValidationError

from swarm.config import CodecSettings
from swarm.errors import CodecError, FrameTooLarge
from swarm.ids import key_order, sha256
from swarm.wire.bounded import compress, decompress

MAGIC: Final = b"SWCF"
VERSION: Final = 1
HEADER: Final = struct.Struct("<4sBBBBIddQ16s32sII")
CHECKSUM_BYTES: Final = 16
LEVEL: Final = 1
"""zstandard level: higher ones spend time and bytes on repetitions, which random positions do not have."""
MAX_KEY_BYTES: Final = 512
MAX_RANK: Final = 8
_KINDS: Final = ("dense", "cocktail")
_KEY_PATTERN: Final = re.compile(r"(head|0|[1-9][0-9]{0,8})/[!-~]+")
"""One spelling a block, so that key order is total; printable ASCII, so that errors can quote it."""
_KEY_SIZE: Final = struct.Struct("<H")
_SLACK_BYTES: Final = 1024

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
        return sha256(self.job_id.encode())[:16]


def ordered(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The same mapping in key order. Raises CodecError: a key or shape that a frame cannot carry."""
    for key, shape in shapes.items():
        if len(key) > MAX_KEY_BYTES or _KEY_PATTERN.fullmatch(key) is None:
            raise CodecError(f"{key!r} is not a parameter key of the form <block>/<tensor>")
        if len(shape) > MAX_RANK or not all(0 < size < 1 << 32 for size in shape):
            raise CodecError(f"{key!r} has shape {shape}, which a frame cannot carry")
    return {key: shapes[key] for key in sorted(shapes, key=key_order)}


def max_frame_bytes(shapes: Mapping[str, Shape]) -> int:
    """The most bytes a frame of these tensors takes under any settings: what a receiver need accept.

    Raw float32 is the largest body; a cocktail frame needs at most 2 bytes an element and 8 a chunk.
    """
    elements = sum(math.prod(shape) for shape in shapes.values())
    fixed_bytes = HEADER.size + len(_manifest(ordered(shapes))) + CHECKSUM_BYTES + _SLACK_BYTES
    return fixed_bytes + 16 * len(shapes) + 4 * elements + elements // 32


def write_frame(settings: CodecSettings, context: FrameContext, shapes: Mapping[str, Shape], body: bytes) -> bytes:
    """`shapes` in key order."""
    manifest = compress(_manifest(shapes), LEVEL)
    header = HEADER.pack(
        MAGIC,
        VERSION,
        _KINDS.index(settings.kind),
        settings.bits,
        0,
        settings.chunk,
        settings.random_keep,
        settings.density,
        context.round,
        context.job_hash,
        context.base_hash,
        len(shapes),
        len(manifest),
    )
    return seal(header + manifest + body)


def seal(content: bytes) -> bytes:
    """Appends the checksum."""
    return content + sha256(content)[:CHECKSUM_BYTES]


def read_frame(
    frame: bytes | memoryview, shapes: Mapping[str, Shape], context: FrameContext
) -> tuple[CodecSettings, memoryview]:
    """Settings and body of a frame that is whole and is the expected one. `shapes` in key order.

    Raises FrameTooLarge: longer than `max_frame_bytes`; CodecError: anything else, by name.
    """
    view = memoryview(frame).cast("B")
    if len(view) > max_frame_bytes(shapes):
        raise FrameTooLarge(
            f"a frame of {len(view)} bytes arrived where at most {max_frame_bytes(shapes)} can be needed"
        )
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
    kind, bits, reserved, chunk, random_keep, density, round_, job_hash, base_hash, n_keys, manifest_bytes = fields[2:]
    if job_hash != context.job_hash:
        raise CodecError(f"the frame belongs to another job than '{context.job_id}'")
    if round_ != context.round:
        raise CodecError(f"the frame belongs to round {round_}, not to round {context.round}")
    if base_hash != context.base_hash:
        raise CodecError(
            f"the frame starts from parameters {base_hash.hex()[:16]}, this round from {context.base_hash.hex()[:16]}"
        )
    if kind >= len(_KINDS) or reserved != 0:
        raise CodecError(f"the frame has unknown kind {kind} or flags {reserved}")
    try:
        settings = CodecSettings(kind=_KINDS[kind], random_keep=random_keep, density=density, bits=bits, chunk=chunk)
    except ValidationError as error:
        raise CodecError(f"the frame has impossible settings: {error.errors()[0]['loc'][0]}") from error
    body_start = HEADER.size + manifest_bytes
    if body_start > len(content):
        raise CodecError("the manifest reaches beyond the frame")
    _check_manifest(content[HEADER.size : body_start], n_keys, shapes)
    return settings, content[body_start:]


def _manifest(shapes: Mapping[str, Shape]) -> bytes:
    """A key's length, the key, its rank and its sizes, for each in turn."""
    parts: list[bytes] = []
    for key, shape in shapes.items():
        name = key.encode()
        parts.append(_KEY_SIZE.pack(len(name)) + name + struct.pack(f"<B{len(shape)}I", len(shape), *shape))
    return b"".join(parts)


def _check_manifest(compressed: memoryview, n_keys: int, shapes: Mapping[str, Shape]) -> None:
    """Walks along the expected keys up to the first difference; a hostile manifest costs no more."""
    expected = _manifest(shapes)
    # Room for a few keys too many, so that the error can name one.
    manifest = decompress(compressed, limit_bytes=2 * len(expected) + MAX_KEY_BYTES)
    if manifest == expected and n_keys == len(shapes):
        return
    keys = list(shapes)
    offset = 0
    for index in range(n_keys):
        key, shape, offset = _read_entry(manifest, offset)
        _check_entry(key, shape, keys, index, shapes)
    if n_keys < len(keys):
        raise CodecError(f"the frame lacks {keys[n_keys]!r}")
    raise CodecError("the manifest has bytes after its last key")


def _read_entry(manifest: bytes, offset: int) -> tuple[str, Shape, int]:
    try:
        (name_bytes,) = _KEY_SIZE.unpack_from(manifest, offset)
        offset += _KEY_SIZE.size
        key = manifest[offset : offset + name_bytes].decode("ascii")
        offset += name_bytes
        rank = manifest[offset]
        shape = struct.unpack_from(f"<{rank}I", manifest, offset + 1)
    except (struct.error, UnicodeDecodeError, IndexError) as error:
        raise CodecError("the manifest is malformed") from error
    if name_bytes > MAX_KEY_BYTES or rank > MAX_RANK:
        raise CodecError("the manifest is malformed")
    return key, shape, offset + 1 + 4 * rank


def _check_entry(key: str, shape: Shape, keys: Sequence[str], index: int, shapes: Mapping[str, Shape]) -> None:
    if key not in shapes:
        raise CodecError(f"the frame holds {key!r}, which is not expected")
    if index >= len(keys) or key_order(key) < key_order(keys[index]):
        raise CodecError(f"the frame holds {key!r} twice or out of order")
    if key != keys[index]:
        raise CodecError(f"the frame lacks {keys[index]!r}, or holds it out of order")
    if shape != shapes[key]:
        raise CodecError(f"the frame holds {key!r} with shape {shape} where {shapes[key]} is expected")
