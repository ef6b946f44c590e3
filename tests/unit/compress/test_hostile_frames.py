"""Frames from strangers: every one that is not exactly what is expected is a CodecError, within the cap."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from codec_cases import CONTEXT, gaussian, shapes_of
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.compress import FrameContext, decode, encode, max_frame_bytes
from swarm.compress.codec import STREAMS
from swarm.compress.frame import CHECKSUM_BYTES, HEADER, seal
from swarm.config import CodecSettings
from swarm.errors import CodecError, FrameTooLarge
from swarm.wire.bounded import compress, decompress

FIELDS = ["magic", "version", "kind", "bits", "reserved", "chunk", "random_keep", "density", "round"]
FIELDS += ["job_hash", "base_hash", "n_keys", "manifest_bytes"]
SOURCE = gaussian({"0/w.lora_A": (4, 50), "0/w.lora_B": (30, 4), "head/norm": (9,)})
SHAPES = shapes_of(SOURCE)
GAPS = CodecSettings(density=0.1, chunk=64)
BITMAP = CodecSettings(density=0.3, random_keep=0.5, bits=4)
DENSE = CodecSettings(kind="dense")


def with_header(frame: bytes, **changes: object) -> bytes:
    """The frame with other header fields and a checksum that fits."""
    fields = dict(zip(FIELDS, HEADER.unpack_from(frame), strict=True)) | changes
    return seal(HEADER.pack(*fields.values()) + frame[HEADER.size : -CHECKSUM_BYTES])


def manifest_of(frame: bytes) -> tuple[bytes, bytes]:
    """The compressed manifest and the body."""
    end = HEADER.size + HEADER.unpack_from(frame)[-1]
    return frame[HEADER.size : end], frame[end:-CHECKSUM_BYTES]


def with_body(frame: bytes, body: bytes) -> bytes:
    return seal(frame[: HEADER.size] + manifest_of(frame)[0] + body)


def with_manifest(frame: bytes, manifest: bytes, n_keys: int) -> bytes:
    packed = compress(manifest)
    body = manifest_of(frame)[1]
    resized = with_header(frame, n_keys=n_keys, manifest_bytes=len(packed))
    return seal(resized[: HEADER.size] + packed + body)


def entry(key: str, shape: tuple[int, ...]) -> bytes:
    return struct.pack("<H", len(key)) + key.encode() + struct.pack(f"<B{len(shape)}I", len(shape), *shape)


def with_stream(frame: bytes, name: str, change: Callable[[bytes], bytes], *, packed: bool = False) -> bytes:
    """The frame with one stream changed: its content, or its compressed bytes if `packed`."""
    body = manifest_of(frame)[1]
    parts = []
    for stream in STREAMS:
        (size,) = struct.unpack_from("<I", body)
        content, body = body[4 : 4 + size], body[4 + size :]
        if stream == name:
            content = change(content) if packed else compress(change(decompress(content, limit_bytes=10_000)))
        parts.append(struct.pack("<I", len(content)) + content)
    return with_body(frame, b"".join(parts))


def refused(frame: bytes, reason: str | None = None, error: type[CodecError] = CodecError) -> None:
    with pytest.raises(error, match=reason):
        decode(frame, SHAPES, CONTEXT)


@pytest.mark.parametrize("codec", [GAPS, BITMAP, DENSE], ids=["gaps", "bitmap", "dense"])
def test_truncation_at_every_byte(codec: CodecSettings) -> None:
    frame = encode(SOURCE, codec, CONTEXT)
    for size in range(len(frame)):
        refused(frame[:size])


@pytest.mark.parametrize("codec", [GAPS, BITMAP], ids=["gaps", "bitmap"])
def test_every_single_bit_flip(codec: CodecSettings) -> None:
    frame = bytearray(encode(SOURCE, codec, CONTEXT))
    for bit in range(8 * len(frame)):
        frame[bit // 8] ^= 1 << bit % 8
        refused(bytes(frame))
        frame[bit // 8] ^= 1 << bit % 8
    assert decode(bytes(frame), SHAPES, CONTEXT)


@pytest.mark.parametrize(
    ("context", "reason"),
    [
        (replace(CONTEXT, job_id="other"), "another job than 'other'"),
        (replace(CONTEXT, round=6), "round 7, not to round 6"),
        (replace(CONTEXT, round=8), "round 7, not to round 8"),
        (replace(CONTEXT, base_hash=bytes(32)), "starts from parameters 00010203"),
    ],
    ids=["job", "stale round", "future round", "base"],
)
def test_wrong_context_is_named(context: FrameContext, reason: str) -> None:
    with pytest.raises(CodecError, match=reason):
        decode(encode(SOURCE, GAPS, CONTEXT), SHAPES, context)


def test_impossible_context() -> None:
    for round_, base_hash in ((-1, bytes(32)), (1 << 64, bytes(32)), (0, bytes(31))):
        with pytest.raises(CodecError):
            FrameContext("job-1", round_, base_hash)


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ({key: SHAPES[key] for key in ("0/w.lora_A", "head/norm")}, "'0/w.lora_B', which is not expected"),
        (SHAPES | {"1/w": (2,)}, "lacks '1/w'"),
        (SHAPES | {"head/z": (2,)}, "lacks 'head/z'"),
        (SHAPES | {"head/norm": (10,)}, r"\(9,\) where \(10,\)"),
        (SHAPES | {"0/w.lora_A": (50, 4)}, r"\(4, 50\) where \(50, 4\)"),
        (SHAPES | {"head/norm": (9, 1)}, r"\(9,\) where \(9, 1\)"),
        ({}, "'0/w.lora_A', which is not expected"),
    ],
)
def test_other_keys_or_shapes_are_named(shapes: dict[str, tuple[int, ...]], reason: str) -> None:
    with pytest.raises(CodecError, match=reason):
        decode(encode(SOURCE, GAPS, CONTEXT), shapes, CONTEXT)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"magic": b"SWCG"}, "not a codec frame"),
        ({"version": 2}, "version 2"),
        ({"kind": 2}, "kind 2"),
        ({"reserved": 1}, "flags 1"),
        ({"bits": 0}, "settings: bits"),
        ({"bits": 9}, "settings: bits"),
        ({"chunk": 0}, "settings: chunk"),
        ({"chunk": 1 << 31}, "settings: chunk"),
        ({"random_keep": 0.0}, "settings: random_keep"),
        ({"random_keep": float("nan")}, "settings: random_keep"),
        ({"density": 1.5}, "settings: density"),
        ({"density": -float("inf")}, "settings: density"),
        ({"n_keys": 0}, "after its last key|lacks"),
        ({"n_keys": 2}, "lacks 'head/norm'"),
        ({"n_keys": (1 << 32) - 1}, "malformed"),
        ({"manifest_bytes": 0}, "zstandard"),
        ({"manifest_bytes": (1 << 32) - 1}, "beyond the frame"),
    ],
)
def test_forged_header(changes: dict[str, object], reason: str) -> None:
    refused(with_header(encode(SOURCE, GAPS, CONTEXT), **changes), reason)


@pytest.mark.parametrize("field", ["bits", "chunk", "random_keep", "density", "kind"])
def test_settings_that_do_not_fit_the_body(field: str) -> None:
    """Sizes follow from the settings, so a forged one leaves streams too long or too short."""
    other = {"bits": 7, "chunk": 4096, "random_keep": 0.5, "density": 0.5, "kind": 0}
    refused(with_header(encode(SOURCE, GAPS, CONTEXT), **{field: other[field]}))


A, B, NORM = (entry(key, shape) for key, shape in SHAPES.items())


@pytest.mark.parametrize(
    ("manifest", "n_keys", "reason"),
    [
        (A + A + B + NORM, 4, "'0/w.lora_A' twice"),
        (A + B + NORM + NORM, 4, "'head/norm' twice"),
        (B + A + NORM, 3, "'0/w.lora_A', or holds it out of order"),
        (A + NORM + B, 3, "'0/w.lora_B', or holds it out of order"),
        (A + NORM, 2, "lacks '0/w.lora_B'"),
        (A + B + entry("0/x", (1,)) + NORM, 4, "'0/x', which is not expected"),
        (A + B + entry("nonsense", (1,)), 3, "'nonsense', which is not expected"),
        (A + B + entry("head/norm", ()), 3, r"shape \(\)"),
        (A + B + NORM[:-1], 3, "malformed"),
        (A + B + NORM + b"\0", 3, "after its last key"),
        (A + B + struct.pack("<H", 65535), 3, "malformed"),
        (A + B + b"\x02\x00\xff\xff\x00", 3, "malformed"),
        (A + B + entry("head/norm", (1,) * 9), 3, "malformed"),
        (b"", 0, "lacks '0/w.lora_A'"),
    ],
)
def test_forged_manifest(manifest: bytes, n_keys: int, reason: str) -> None:
    refused(with_manifest(encode(SOURCE, GAPS, CONTEXT), manifest, n_keys), reason)


@pytest.mark.parametrize(
    ("codec", "name", "change", "reason"),
    [
        (GAPS, "gaps", lambda data: data[:-1], "gaps"),
        (GAPS, "gaps", lambda data: data[:-1] + b"\xff", "gaps"),
        (GAPS, "gaps", lambda data: data[1:] + b"\xfe", "beyond the 8 places"),
        (GAPS, "gaps", lambda data: b"\x40" + data[1:], "beyond"),
        (GAPS, "gaps", lambda data: data + bytes(500), "bytes where at most"),
        (BITMAP, "bitmaps", lambda data: bytes(len(data)), "exactly"),
        (BITMAP, "bitmaps", lambda data: b"\xff" * len(data), "exactly"),
        (GAPS, "signs", lambda data: data[:-1], "signs"),
        (GAPS, "codes", lambda data: data + b"\0", "bytes where at most"),
        (GAPS, "bitmaps", lambda _: b"\0", "bytes where at most 0"),
        (GAPS, "levels", lambda data: data[:-1], "levels"),
        (GAPS, "levels", lambda data: b"\x80\x7f" * (len(data) // 2), "not finite"),
        (GAPS, "levels", lambda data: b"\xff" * len(data), "not finite"),
        (GAPS, "levels", lambda data: b"\x80" * len(data), "negative"),
    ],
)
def test_forged_stream(codec: CodecSettings, name: str, change: Callable[[bytes], bytes], reason: str) -> None:
    refused(with_stream(encode(SOURCE, codec, CONTEXT), name, change), reason)


def test_forged_lengths() -> None:
    frame = encode(SOURCE, GAPS, CONTEXT)
    body = manifest_of(frame)[1]
    refused(with_body(frame, struct.pack("<I", 1 << 31) + body[4:]), "reach beyond")
    refused(with_body(frame, body + b"\0"), "1 bytes after")
    refused(with_body(frame, body[:-1]), "reach beyond")
    refused(with_body(frame, b""), "ends before its gaps")
    dense = encode(SOURCE, DENSE, CONTEXT)
    refused(with_body(dense, manifest_of(dense)[1] + bytes(4)), "bytes of values")


@pytest.mark.parametrize("bits", [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001])
def test_dense_values_that_are_not_finite_are_refused_by_key(bits: int) -> None:
    frame = encode(SOURCE, DENSE, CONTEXT)
    body = manifest_of(frame)[1]
    refused(with_body(frame, body[:-4] + struct.pack("<I", bits)), "'head/norm' holds 1 values")


@pytest.mark.parametrize("name", STREAMS)
def test_bomb_in_a_stream_is_refused_within_the_cap(name: str) -> None:
    bomb = compress(bytes(8 << 20))
    frame = with_stream(encode(SOURCE, GAPS, CONTEXT), name, lambda _: bomb, packed=True)
    tracemalloc.start()
    try:
        refused(frame, "8388608 bytes where at most", FrameTooLarge)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1 << 20


def test_bomb_in_the_manifest_is_refused() -> None:
    refused(with_manifest(encode(SOURCE, GAPS, CONTEXT), bytes(1 << 20), 3), "1048576 bytes where", FrameTooLarge)


def test_long_frame_is_refused_before_it_is_hashed() -> None:
    frame = encode(SOURCE, GAPS, CONTEXT)
    refused(frame + bytes(max_frame_bytes(SHAPES)), "can be needed", FrameTooLarge)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400), st.sampled_from(["raw", "sealed", "header", "body"]))
def test_arbitrary_bytes_end_in_a_typed_error(data: bytes, where: str) -> None:
    frame = encode(SOURCE, GAPS, CONTEXT)
    forged = {
        "raw": data,
        "sealed": seal(data),
        "header": seal(frame[:5] + data),
        "body": with_body(frame, data),
    }[where]
    refused(forged)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([GAPS, BITMAP]),
    st.sampled_from(STREAMS),
    st.integers(0, 10_000),
    st.integers(0, 255),
    st.booleans(),
)
def test_one_forged_byte_decodes_finite_or_ends_in_a_typed_error(
    codec: CodecSettings, name: str, place: int, value: int, packed: bool
) -> None:
    """A sender can sign any values; what must hold is that they are finite, of these shapes, or refused."""

    def change(data: bytes) -> bytes:
        at = place % max(1, len(data))
        return data[:at] + bytes([value])[: len(data)] + data[at + 1 :]

    try:
        decoded = decode(with_stream(encode(SOURCE, codec, CONTEXT), name, change, packed=packed), SHAPES, CONTEXT)
    except CodecError:
        return
    assert {key: tensor.shape for key, tensor in decoded.items()} == SHAPES
    assert all(np.isfinite(tensor).all() for tensor in decoded.values())
