"""What encode and decode promise about values: what is kept, how well, and that every machine agrees."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from math import lgamma, log

import numpy as np
import pytest
from codec_cases import (
    CONTEXT,
    Tensors,
    any_settings,
    arithmetic,
    by_itself,
    digest,
    gaussian,
    same_bits,
    shapes_of,
    tensors,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.compress import decode, encode, max_frame_bytes
from swarm.compress.cocktail import choose
from swarm.compress.frame import layout_of
from swarm.compress.plan import counts
from swarm.config import CodecSettings
from swarm.errors import CodecError
from swarm.ids import key_order


@settings(max_examples=150, deadline=None)
@given(tensors(), any_settings)
def test_decodes_to_what_the_settings_promise(given_tensors: Tensors, codec: CodecSettings) -> None:
    frame = encode(given_tensors, codec, CONTEXT)
    decoded = decode(memoryview(frame), shapes_of(given_tensors), CONTEXT)
    assert len(frame) <= max_frame_bytes(shapes_of(given_tensors))
    assert list(decoded) == sorted(given_tensors, key=key_order)
    for key, tensor in decoded.items():
        assert tensor.dtype == np.float32
        assert tensor.flags.writeable
        assert np.isfinite(tensor).all()
        source = given_tensors[key]
        assert (tensor * np.sign(source) >= 0).all()
        assert float(np.abs(tensor).max()) <= 1.42 * float(np.abs(source).max())
    if codec.kind == "dense":
        assert same_bits(decoded, {key: given_tensors[key] for key in decoded})


@settings(max_examples=60, deadline=None)
@given(tensors(), by_itself, st.data())
def test_a_tensor_decodes_alike_whatever_travels_with_it(
    given_tensors: Tensors, codec: CodecSettings, data: st.DataObject
) -> None:
    chosen = data.draw(st.permutations(list(given_tensors)))[: data.draw(st.integers(0, len(given_tensors)))]
    part = {key: given_tensors[key] for key in chosen}
    whole = decode(encode(given_tensors, codec, CONTEXT), shapes_of(given_tensors), CONTEXT)
    alone = decode(encode(part, codec, CONTEXT), shapes_of(part), CONTEXT)
    assert same_bits(alone, {key: whole[key] for key in whole if key in part})


@pytest.mark.parametrize("keep", [1.0, 0.2])
def test_spans_of_two_pipelines_need_not_line_up(keep: float) -> None:
    codec = CodecSettings(random_keep=keep, bits=3, chunk=1000)
    swarm_wide = gaussian({f"{block}/w.lora_{ab}": (block * 97 + 8, 41) for block in range(9) for ab in "AB"})
    whole = decode(encode(swarm_wide, codec, CONTEXT), shapes_of(swarm_wide), CONTEXT)
    for start, end in [(0, 4), (4, 9), (2, 3), (1, 8)]:
        span = {key: swarm_wide[key] for key in whole if start <= int(key.split("/")[0]) < end}
        decoded = decode(encode(span, codec, CONTEXT), shapes_of(span), CONTEXT)
        assert same_bits(decoded, {key: whole[key] for key in span})


def test_keeps_the_largest_of_each_chunk() -> None:
    source = gaussian({"0/w": (1000,)})
    decoded = decode(encode(source, CodecSettings(density=0.1, chunk=300), CONTEXT), shapes_of(source), CONTEXT)
    for start in range(0, 1000, 300):
        chunk = np.abs(source["0/w"][start : start + 300])
        kept = np.flatnonzero(decoded["0/w"][start : start + 300])
        assert set(kept) == set(np.argsort(chunk)[-round(0.1 * chunk.size) :])


def test_equal_values_are_kept_from_the_left() -> None:
    source = {"0/w": np.full(200, -0.5, np.float32)}
    decoded = decode(encode(source, CodecSettings(density=0.1, chunk=100), CONTEXT), shapes_of(source), CONTEXT)
    kept = [*range(10), *range(100, 110)]
    assert list(np.flatnonzero(decoded["0/w"])) == kept
    assert (decoded["0/w"][kept] == -0.5).all()


def test_the_random_subset_follows_job_round_and_key() -> None:
    codec = CodecSettings(random_keep=0.25, density=1.0)
    ones = {key: np.ones(4096, np.float32) for key in ("0/w", "1/w")}

    def sent(context: object, key: str) -> frozenset[int]:
        decoded = decode(encode(ones, codec, context), shapes_of(ones), context)  # type: ignore[arg-type]
        return frozenset(np.flatnonzero(decoded[key]).tolist())

    first = sent(CONTEXT, "0/w")
    others = [
        sent(CONTEXT, "1/w"),
        sent(replace(CONTEXT, round=8), "0/w"),
        sent(replace(CONTEXT, job_id="job-2"), "0/w"),
    ]
    assert len(first) == 1024
    assert sent(replace(CONTEXT, base_hash=bytes(32)), "0/w") == first
    for other in others:
        assert len(other) == 1024
        # Independent quarters overlap in 256 places, give or take 14.
        assert 180 < len(first & other) < 330


@pytest.mark.parametrize(
    ("bits", "best"), [(1, 0.3634), (2, 0.1175), (3, 0.0345), (4, 0.0095), (6, 0.0010), (8, 0.00007)]
)
def test_dense_quantization_is_near_the_best_for_gaussian_values(bits: int, best: float) -> None:
    """`best`: the Lloyd-Max quantizer's error for a normal variable (Max, 1960); 8 bits: uniform."""
    source = gaussian({"0/w": (64, 4096)})
    decoded = decode(encode(source, CodecSettings(density=1.0, bits=bits), CONTEXT), shapes_of(source), CONTEXT)
    error = np.square(decoded["0/w"] - source["0/w"]).sum() / np.square(source["0/w"]).sum()
    assert 0.97 * best < error < 1.7 * best
    # Levels are a 32nd of an octave apart; the residual keeps what they take or add.
    bias = np.abs(decoded["0/w"]).mean() / np.abs(source["0/w"]).mean() - 1
    assert abs(bias) < 0.03


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-6, 1.0, 1e6, 1e30])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_scale_does_not_matter(scale: float, bits: int) -> None:
    codec = CodecSettings(density=0.25, bits=bits)
    source = gaussian({"0/w": (4096,)}, scale=1.0)
    scaled = {"0/w": (source["0/w"].astype(np.float64) * scale).astype(np.float32)}

    def error(tensors_in: Tensors) -> float:
        decoded = decode(encode(tensors_in, codec, CONTEXT), shapes_of(tensors_in), CONTEXT)["0/w"]
        wide = tensors_in["0/w"].astype(np.float64)
        kept = decoded != 0
        return float(np.square(decoded - wide)[kept].sum() / np.square(wide[kept]).sum())

    # Where the rounding of the levels falls depends on the scale; it shows at 8 bits.
    assert error(scaled) == pytest.approx(error(source), rel=0.05, abs=1e-5)


@pytest.mark.parametrize(
    ("keep", "density", "slack"),
    [(1, 1 / 64, 1.02), (1, 1 / 16, 1.012), (1, 1 / 4, 1.01), (1, 1, 1.005), (0.2, 1 / 64, 1.05), (0.2, 1 / 2, 1.025)],
)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_size_is_near_the_entropy_bound(keep: float, density: float, slack: float, bits: int) -> None:
    """log2 C(n, k) bits for the positions of each chunk and the entropy of the frame's value symbols."""
    source = gaussian({f"{block}/w.lora_{ab}": (8, 577) for block in range(210) for ab in "AB"})
    codec = CodecSettings(density=density, random_keep=keep, bits=bits)
    layout = layout_of(shapes_of(source))
    flat = np.concatenate([source[key].reshape(-1) for key in layout.keys])
    symbols = choose(flat, layout, codec, CONTEXT).symbols
    positions_bits = 0.0
    for length in (4096, 8 * 577 - 4096):
        counted = counts(length, codec)
        n, k = counted.subset, counted.kept
        positions_bits += 420 * (lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)) / log(2)
    often = np.bincount(symbols)
    value_bits = -float((often[often > 0] * np.log2(often[often > 0] / symbols.size)).sum())
    assert 8 * len(encode(source, codec, CONTEXT)) < slack * (positions_bits + value_bits)


def test_does_not_touch_its_arguments() -> None:
    source = gaussian({"0/w": (30, 50)})
    source["0/t"] = source["0/w"].T[::2]
    before = digest(source)
    for value in source.values():
        value.flags.writeable = False
    frame = encode(source, CodecSettings(), CONTEXT)
    assert digest(source) == before
    contiguous = {key: value.copy() for key, value in source.items()}
    assert encode(dict(reversed(contiguous.items())), CodecSettings(), CONTEXT) == frame


@pytest.mark.parametrize("kind", ["dense", "cocktail"])
@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("0/w", np.array([1.0, np.nan], np.float32), "not finite"),
        ("0/w", np.array([-np.inf], np.float32), "not finite"),
        ("0/w", np.zeros(3), "<f8"),
        ("0/w", np.zeros(3, np.float16), "<f2"),
        ("0/w", np.zeros(3, ">f4"), ">f4"),
        ("0/w", [1.0], "list"),
        ("0/w", np.zeros((0, 3), np.float32), "shape"),
        ("0/w", np.zeros((1,) * 9, np.float32), "shape"),
        ("w", np.zeros(3, np.float32), "parameter key"),
        ("0/", np.zeros(3, np.float32), "parameter key"),
        ("00/w", np.zeros(3, np.float32), "parameter key"),
        ("tail/w", np.zeros(3, np.float32), "parameter key"),
        ("0/w\n", np.zeros(3, np.float32), "parameter key"),
        ("0/" + "w" * 600, np.zeros(3, np.float32), "parameter key"),
    ],
)
def test_encode_refuses_by_key(kind: str, key: str, value: object, reason: str) -> None:
    tensors_in = {"0/a": np.zeros(3, np.float32), key: value}
    with pytest.raises(CodecError, match=reason) as caught:
        encode(tensors_in, CodecSettings(kind=kind), CONTEXT)  # type: ignore[arg-type]
    assert repr(key) in caught.value.cause


def test_same_bits_in_other_processes() -> None:
    script = (
        "import hashlib\n"
        "from codec_cases import CONTEXT, digest, gaussian, shapes_of\n"
        "from swarm.compress import decode, encode\n"
        "from swarm.config import CodecSettings\n"
        "source = gaussian({f'{b}/w.{m}': (8, 700 + b) for b in range(12) for m in 'AB'})\n"
        "for codec in (CodecSettings(), CodecSettings(random_keep=0.3, density=0.3, bits=4)):\n"
        "    frame = encode(source, codec, CONTEXT)\n"
        "    print(hashlib.sha256(frame).hexdigest(), digest(decode(frame, shapes_of(source), CONTEXT)))\n"
    )
    path = os.pathsep.join([os.path.dirname(__file__), os.getcwd()])
    printed = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONPATH": path, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads},
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout
        for seed, threads in (("1", "1"), ("2", "2"))
    ]
    assert len(printed[0].split()) == 4
    assert printed[0] == printed[1]


GOLDEN = {
    "exact": (CodecSettings(density=0.05, chunk=257), "e83969364dd37d07", "48f67b6ef420608a"),
    "gaps": (CodecSettings(density=0.1, bits=1), "34f425736c572e11", "7ff2c9538bdb465c"),
    "bitmap": (CodecSettings(density=0.4, bits=3, chunk=1000), "2b537ddf6e3f0a0a", "f87ae0040a829a88"),
    "subset": (CodecSettings(random_keep=0.3, density=0.2, bits=4), "a9d7874c0f06e579", "bd62f6f31ae1f7f5"),
    "whole": (CodecSettings(density=1, bits=8), "ecccc70a5b78ebd4", "0b0da8de1fcced81"),
    "energy": (CodecSettings(density=0.1, allocation="energy"), "a2ac3dd5b77121fa", "e6a95cd4ae8a97dc"),
    "dense": (CodecSettings(kind="dense"), "4fc5040af35db4d6", "b7ec35dc0183bddd"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_frames_of_version_2_are_made_and_decoded_as_they_always_were(name: str) -> None:
    """Guards format, choice, levels, subset and arithmetic against changes of ours, numpy's and the compiler's."""
    codec, frame_sha256, decoded_sha256 = GOLDEN[name]
    source = arithmetic({"0/w.lora_A": (8, 577), "0/w.lora_B": (500, 3), "11/v.lora_A": (9000,), "head/norm": (7,)})
    frame = encode(source, codec, CONTEXT)
    assert hashlib.sha256(frame).hexdigest()[:16] == frame_sha256
    assert digest(decode(frame, shapes_of(source), CONTEXT))[:16] == decoded_sha256
