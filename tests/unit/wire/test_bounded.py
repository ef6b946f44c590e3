"""Opening compressed bytes from strangers: what comes back is right, or a typed error within the cap."""

from __future__ import annotations

import struct
import tracemalloc
from contextlib import suppress

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import CodecError, FrameTooLarge
from swarm.wire.bounded import compress, decompress

MAGIC = b"\x28\xb5\x2f\xfd"
MIB = 1 << 20


def raw_block(content: bytes, last: bool) -> bytes:
    return struct.pack("<I", len(content) << 3 | int(last))[:3] + content


def rle_block(size: int, last: bool) -> bytes:
    """`size` zero bytes out of four."""
    return struct.pack("<I", size << 3 | 1 << 1 | int(last))[:3] + b"\0"


def frame(declared: int, blocks: bytes, window_byte: int = 0) -> bytes:
    """A hand-made frame: 4-byte content size, window descriptor, no checksum."""
    return MAGIC + bytes([0b10 << 6, window_byte]) + struct.pack("<I", declared) + blocks


@settings(deadline=None)
@given(st.binary(max_size=5000), st.sampled_from([1, 3, 9]))
def test_round_trip(data: bytes, level: int) -> None:
    packed = compress(data, level)
    assert decompress(packed, limit_bytes=len(data)) == data
    assert decompress(memoryview(packed), limit_bytes=len(data) + 1000) == data


@pytest.mark.parametrize("size", [1, 1000, 300_000, 3 * MIB])
def test_limit_is_exact(size: int) -> None:
    packed = compress(b"ab" * (size // 2) + b"c" * (size % 2))
    assert len(decompress(packed, limit_bytes=size)) == size
    with pytest.raises(FrameTooLarge, match=f"{size} bytes where at most {size - 1}"):
        decompress(packed, limit_bytes=size - 1)


def test_hand_made_frame_is_read() -> None:
    assert decompress(frame(3, raw_block(b"abc", True)), limit_bytes=3) == b"abc"


@pytest.mark.parametrize(
    "bomb",
    [
        compress(bytes(256 * MIB)),
        frame(MIB, rle_block(128 << 10, False) * 2000 + rle_block(1, True)),
        frame(10, rle_block(128 << 10, False) * 2000 + rle_block(1, True)),
        frame(0, rle_block(128 << 10, False) * 2000 + rle_block(1, True)),
        frame(MIB, raw_block(b"x", False) + rle_block(128 << 10, False) * 2000),
        frame(MIB, raw_block(b"", False) * 2000),
    ],
    ids=["declared", "more than declared", "far more", "more than nothing", "no end", "never anything"],
)
def test_bomb_is_refused_within_the_cap(bomb: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(CodecError):
            decompress(bomb, limit_bytes=MIB)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2 * MIB


def test_size_must_be_declared() -> None:
    stream = zstandard.ZstdCompressor().compressobj()
    with pytest.raises(CodecError, match="does not declare"):
        decompress(stream.compress(b"abc") + stream.flush(), limit_bytes=MIB)


@pytest.mark.parametrize("declared", [2, 4, 1000])
def test_declared_size_must_be_the_real_one(declared: int) -> None:
    with pytest.raises(CodecError):
        decompress(frame(declared, raw_block(b"abc", True)), limit_bytes=MIB)


def test_huge_window_is_refused() -> None:
    with pytest.raises(FrameTooLarge, match="window"):
        decompress(frame(3, raw_block(b"abc", True), window_byte=21 << 3), limit_bytes=MIB)


@pytest.mark.parametrize("content", [b"", b"a", b"abc" * 1000], ids=len)
def test_nothing_may_follow(content: bytes) -> None:
    packed = compress(content)
    skippable = b"\x50\x2a\x4d\x18\0\0\0\0"
    for extra in (b"\0", packed, compress(b""), skippable, bytes(1000)):
        with pytest.raises(CodecError):
            decompress(packed + extra, limit_bytes=MIB)
        with pytest.raises(CodecError):
            decompress(extra + packed, limit_bytes=MIB)
    with pytest.raises(CodecError):
        decompress(skippable, limit_bytes=MIB)


@pytest.mark.parametrize("content", [b"", b"a", bytes(range(256)) * 3], ids=len)
def test_truncation_at_every_byte(content: bytes) -> None:
    packed = compress(content)
    for size in range(len(packed)):
        with pytest.raises(CodecError):
            decompress(packed[:size], limit_bytes=MIB)


@settings(deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_arbitrary_bytes_end_in_a_typed_error_or_within_the_limit(data: bytes, with_magic: bool) -> None:
    with suppress(CodecError):
        assert len(decompress(MAGIC * with_magic + data, limit_bytes=100)) <= 100


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=300), st.data())
def test_a_flipped_bit_never_exceeds_the_limit(content: bytes, data: st.DataObject) -> None:
    packed = bytearray(compress(content))
    bit = data.draw(st.integers(0, 8 * len(packed) - 1))
    packed[bit // 8] ^= 1 << bit % 8
    with suppress(CodecError):
        assert len(decompress(bytes(packed), limit_bytes=300)) <= 300
