"""What encode and decode promise about values: what is kept, how well, and that every machine agrees."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from math import lgamma, log

import numpy as np
import pytest
from codec_cases import CONTEXT, Tensors, any_settings, digest, gaussian, same_bits, shapes_of, tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.compress import decode, encode, max_frame_bytes
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
        assert float(np.abs(tensor).max()) <= 1.25 * float(np.abs(source).max())
    if codec.kind == "dense":
        assert same_bits(decoded, {key: given_tensors[key] for key in decoded})


@settings(max_examples=60, deadline=None)
@given(tensors(), any_settings, st.data())
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
    bias = np.abs(decoded["0/w"]).mean() / np.abs(source["0/w"]).mean() - 1
    assert abs(bias) < 2e-3


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
    ("density", "slack"), [(1 / 64, 1.08), (0.0625, 1.03), (0.125, 1.02), (0.25, 1.02), (0.5, 1.0)]
)
def test_size_is_near_the_entropy_bound(density: float, slack: float) -> None:
    """log2 C(n, k) bits for the positions and `bits` for each value; skewed levels can go below it."""
    source = gaussian({f"{block}/w.lora_A": (8, 4096) for block in range(20)})
    codec = CodecSettings(density=density)
    kept = round(density * 4096)
    positions_bits = (lgamma(4097) - lgamma(kept + 1) - lgamma(4097 - kept)) / log(2)
    bound_bytes = 20 * 8 * (positions_bits + kept * codec.bits) / 8
    assert len(encode(source, codec, CONTEXT)) < slack * bound_bytes


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


GOLDEN_FRAME = (
    "U1dDRgEBAwCAAAAAmpmZmZmZ6T+4HoXrUbi+PwcAAAAAAAAAAmq2OcId+KqA5XiTcKnbGwABAgMEBQYHCAkKCwwNDg8QERIT"
    "FBUWFxgZGhscHR4fAgAAAC4AAAAotS/9ICUpAQAKADAvdy5sb3JhX0ECAwAAAGQAAAAJAGhlYWQvbm9ybQEHAAAAJQAAACi1"
    "L/0gHOEAAAcTAQQACAMFAwkBDQgHCgQIFwUBDAAEAQMPBAUKAAAAKLUv/SABCQAAIA8AAAAotS/9IAYxAACAEOnAMIARAAAA"
    "KLUv/SAIQQAAA0bGETSMMgAZAAAAKLUv/SAQgQAAx/c6OoLROTm6OgE6dzsAABzLxlisilyYNir2dykjN1o="
)
GOLDEN_SHA256 = "048a27b3d741e320517c9e0cd27f7a82d60dcac678d7b6da9ab9d91950d7f490"


def test_frames_of_version_1_decode_as_they_always_did() -> None:
    """Guards the format, the subset generator and the arithmetic against changes of ours or numpy's."""
    decoded = decode(base64.b64decode(GOLDEN_FRAME), {"0/w.lora_A": (3, 100), "head/norm": (7,)}, CONTEXT)
    assert hashlib.sha256(b"".join(tensor.tobytes() for tensor in decoded.values())).hexdigest() == GOLDEN_SHA256
