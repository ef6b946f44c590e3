"""Frames from strangers: every one that is not exactly what is expected is a CodecError, within the cap."""

from __future__ import annotations

import struct
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from codec_cases import CONTEXT, gaussian, shapes_of
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.compress import FrameContext, decode, encode, max_frame_bytes
from swarm.compress.frame import CHECKSUM_BYTES, HEADER, seal
from swarm.config import CodecSettings
from swarm.errors import CodecError, FrameTooLarge

FIELDS = ["magic", "version", "kind", "bits", "allocation", "chunk", "random_keep", "density", "round"]
FIELDS += ["job_hash", "base_hash", "manifest_hash", "n_keys"]
SOURCE = gaussian({"0/w.lora_A": (4, 150), "0/w.lora_B": (30, 4), "head/norm": (9,)})
SHAPES = shapes_of(SOURCE)
EXACT = CodecSettings(density=0.1, chunk=64)
GAPS = CodecSettings(density=0.15, chunk=4096)
BITMAP = CodecSettings(density=0.4, random_keep=0.5, bits=4)
ENERGY = CodecSettings(density=0.2, allocation="energy")
DENSE = CodecSettings(kind="dense")
SPARSE = {"exact": EXACT, "gaps": GAPS, "bitmap": BITMAP, "energy": ENERGY}
every_sparse = pytest.mark.parametrize("codec", SPARSE.values(), ids=SPARSE)
PARTS = ("numbers", "symbols")


def with_header(frame: bytes, **changes: object) -> bytes:
    """The frame with other header fields and a checksum that fits."""
    fields = dict(zip(FIELDS, HEADER.unpack_from(frame), strict=True)) | changes
    return seal(HEADER.pack(*fields.values()) + body_of(frame))


def body_of(frame: bytes) -> bytes:
    return frame[HEADER.size : -CHECKSUM_BYTES]


def with_body(frame: bytes, body: bytes) -> bytes:
    return seal(frame[: HEADER.size] + body)


def with_part(frame: bytes, part: str, change: Callable[[bytes], bytes]) -> bytes:
    """The frame with its coded numbers or its coded symbols changed, and lengths and checksum that fit."""
    body = body_of(frame)
    (size,) = struct.unpack_from("<I", body)
    numbers, symbols = body[4 : 4 + size], body[4 + size :]
    if part == "numbers":
        numbers = change(numbers)
    else:
        symbols = change(symbols)
    return with_body(frame, struct.pack("<I", len(numbers)) + numbers + symbols)


def refused(frame: bytes, reason: str | None = None, error: type[CodecError] = CodecError) -> None:
    with pytest.raises(error, match=reason):
        decode(frame, SHAPES, CONTEXT)


@pytest.mark.parametrize("codec", [*SPARSE.values(), DENSE], ids=[*SPARSE, "dense"])
def test_truncation_at_every_byte(codec: CodecSettings) -> None:
    frame = encode(SOURCE, codec, CONTEXT)
    for size in range(len(frame)):
        refused(frame[:size])


@every_sparse
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
        ({key: SHAPES[key] for key in ("0/w.lora_A", "head/norm")}, "3 tensors where 2 are expected"),
        (SHAPES | {"1/w": (2,)}, "3 tensors where 4 are expected"),
        (SHAPES | {"head/norm": (10,)}, "other shapes"),
        (SHAPES | {"0/w.lora_A": (150, 4)}, "other shapes"),
        (SHAPES | {"head/norm": (9, 1)}, "other shapes"),
        ({"0/w.lora_A": (4, 150), "1/w.lora_B": (30, 4), "head/norm": (9,)}, "other tensors"),
        ({}, "3 tensors where 0 are expected"),
    ],
)
def test_other_keys_or_shapes_are_refused(shapes: dict[str, tuple[int, ...]], reason: str) -> None:
    with pytest.raises(CodecError, match=reason):
        decode(encode(SOURCE, GAPS, CONTEXT), shapes, CONTEXT)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"magic": b"SWCG"}, "not a codec frame"),
        ({"version": 1}, "version 1"),
        ({"version": 3}, "version 3"),
        ({"kind": 2}, "kind 2"),
        ({"allocation": 2}, "allocation 2"),
        ({"bits": 0}, "settings: bits"),
        ({"bits": 9}, "settings: bits"),
        ({"chunk": 0}, "settings: chunk"),
        ({"chunk": 1 << 31}, "settings: chunk"),
        ({"random_keep": 0.0}, "settings: random_keep"),
        ({"random_keep": float("nan")}, "settings: random_keep"),
        ({"density": 1.5}, "settings: density"),
        ({"density": -float("inf")}, "settings: density"),
        ({"n_keys": 0}, "0 tensors where 3"),
        ({"n_keys": (1 << 32) - 1}, "4294967295 tensors"),
        ({"manifest_hash": bytes(8)}, "other tensors"),
    ],
)
def test_forged_header(changes: dict[str, object], reason: str) -> None:
    refused(with_header(encode(SOURCE, GAPS, CONTEXT), **changes), reason)


@every_sparse
@pytest.mark.parametrize(
    "changes",
    [
        {"bits": 7},
        {"bits": 1},
        {"chunk": 100},
        {"random_keep": 0.31},
        {"density": 0.9},
        {"density": 1.0, "bits": 8},
        {"allocation": 1},
        {"kind": 0},
    ],
    ids=str,
)
def test_settings_that_do_not_fit_the_body(codec: CodecSettings, changes: dict[str, object]) -> None:
    """What is read follows from the settings: under forged ones it ends too early, too late or in another state."""
    frame = encode(SOURCE, codec, CONTEXT)
    forged = with_header(frame, **changes)
    if forged != frame:
        refused(forged)


@every_sparse
@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        ("numbers", lambda data: b"", None),
        ("numbers", lambda data: b"\xff" * len(data), None),
        ("symbols", lambda data: b"", "cut short"),
        ("symbols", lambda data: data[:-1], "within a word"),
        ("symbols", lambda data: data[:-2], "cut short"),
        ("symbols", lambda data: data[2:], None),
        ("symbols", lambda data: data + bytes(2), "2 bytes after"),
        ("symbols", lambda data: data + bytes(600), "600 bytes after"),
        ("symbols", lambda data: bytes(len(data)), None),
        ("symbols", lambda data: b"\xff" * len(data), None),
    ],
)
def test_forged_part(codec: CodecSettings, part: str, change: Callable[[bytes], bytes], reason: str | None) -> None:
    refused(with_part(encode(SOURCE, codec, CONTEXT), part, change), reason)


def test_forged_lengths() -> None:
    frame = encode(SOURCE, GAPS, CONTEXT)
    body = body_of(frame)
    refused(with_body(frame, struct.pack("<I", 1 << 31) + body[4:]), "reach beyond")
    refused(with_body(frame, b""), "ends before its numbers")
    refused(with_body(frame, bytes(4)), None)
    dense = encode(SOURCE, DENSE, CONTEXT)
    refused(with_body(dense, body_of(dense) + bytes(4)), "bytes of values")
    refused(with_body(dense, b""), "0 bytes of values")


@pytest.mark.parametrize("bits", [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001])
def test_dense_values_that_are_not_finite_are_refused_by_key(bits: int) -> None:
    frame = encode(SOURCE, DENSE, CONTEXT)
    refused(with_body(frame, body_of(frame)[:-4] + struct.pack("<I", bits)), "'head/norm' holds 1 values")


@pytest.mark.parametrize("part", PARTS)
def test_no_memory_or_time_by_a_number_in_a_frame(part: str) -> None:
    """Random numbers and symbols under the greediest settings cost what the shapes allow, no more."""
    shapes = {"0/w": (512, 1024)}
    big = gaussian(shapes)
    rng = np.random.default_rng(0)
    for codec in (CodecSettings(density=0.3), CodecSettings(density=0.02, allocation="energy"), EXACT):
        frame = encode(big, codec, CONTEXT)
        for _ in range(5):
            forged = with_part(frame, part, lambda data: rng.bytes(len(data)))
            tracemalloc.start()
            start_s = time.perf_counter()
            try:
                decode(forged, shapes, CONTEXT)
            except CodecError:
                pass
            finally:
                _, peak_bytes = tracemalloc.get_traced_memory()
                tracemalloc.stop()
            assert peak_bytes < 2 * 4 * 512 * 1024
            assert time.perf_counter() - start_s < 2


def test_long_frame_is_refused_before_it_is_hashed() -> None:
    frame = encode(SOURCE, GAPS, CONTEXT)
    refused(frame + bytes(max_frame_bytes(SHAPES)), "can be needed", FrameTooLarge)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400), st.sampled_from(["raw", "sealed", "header"]))
def test_arbitrary_bytes_end_in_a_typed_error(data: bytes, where: str) -> None:
    frame = encode(SOURCE, GAPS, CONTEXT)
    forged = {"raw": data, "sealed": seal(data), "header": seal(frame[:5] + data)}[where]
    refused(forged)


def decoded_or_refused(frame: bytes) -> None:
    """A sender can sign any values; what must hold is that they are finite, of these shapes, or refused."""
    try:
        decoded = decode(frame, SHAPES, CONTEXT)
    except CodecError:
        return
    assert {key: tensor.shape for key, tensor in decoded.items()} == SHAPES
    assert all(np.isfinite(tensor).all() for tensor in decoded.values())


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400), st.sampled_from(list(SPARSE.values())), st.integers(1, 8), st.floats(0.001, 1))
def test_any_body_decodes_finite_or_ends_in_a_typed_error(
    body: bytes, codec: CodecSettings, bits: int, density: float
) -> None:
    frame = with_header(encode(SOURCE, codec, CONTEXT), bits=bits, density=density)
    decoded_or_refused(with_body(frame, body))
    decoded_or_refused(with_part(frame, "numbers", lambda _: body))


@every_sparse
@pytest.mark.parametrize("part", PARTS)
def test_every_forged_byte_decodes_finite_or_ends_in_a_typed_error(codec: CodecSettings, part: str) -> None:
    frame = encode(SOURCE, codec, CONTEXT)
    (size,) = struct.unpack_from("<I", body_of(frame))
    length = size if part == "numbers" else len(body_of(frame)) - 4 - size
    for place in range(length):
        for flip in (0x01, 0x10, 0x80, 0xFF):
            decoded_or_refused(
                with_part(
                    frame,
                    part,
                    lambda data, at=place, by=flip: data[:at] + bytes([data[at] ^ by]) + data[at + 1 :],  # type: ignore[misc]
                )
            )
