"""Error feedback: nothing is lost but what the decay takes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from codec_cases import CONTEXT, Tensors, cocktails, gaussian, same_bits, shapes_of, tensors
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from swarm.compress import compress_with_feedback, decode
from swarm.config import CodecSettings
from swarm.errors import CodecError

LARGEST = float(np.finfo(np.float32).max)


@settings(max_examples=100, deadline=None)
@given(tensors(), cocktails, st.data())
def test_sent_and_left_add_up(delta: Tensors, codec: CodecSettings, data: st.DataObject) -> None:
    residual = {key: np.roll(delta[key], 1) for key in delta if data.draw(st.booleans())}
    assume(all(np.abs(tensor).max() < LARGEST / 4 for tensor in delta.values()))
    before = {key: tensor.copy() for key, tensor in (delta | residual).items()}
    result = compress_with_feedback(delta, residual, codec, CONTEXT)
    assert same_bits(delta | residual, before)
    assert same_bits(result.decoded, decode(result.frame, shapes_of(delta), CONTEXT))
    for key, sent in result.decoded.items():
        left = result.residual[key]
        assert (left.shape, left.dtype) == (delta[key].shape, np.float32)
        corrected = np.asarray(delta[key] + np.float32(codec.decay) * residual.get(key, np.float32(0)))
        assert np.array_equal(left[sent == 0], corrected[sent == 0])
        # One rounding, of the difference.
        total = sent.astype(np.float64) + left
        assert (np.abs(total - corrected) <= np.spacing(np.abs(left)) / 2).all()


@pytest.mark.parametrize("codec", [CodecSettings(decay=1.0), CodecSettings(random_keep=0.3, bits=1, decay=1.0)])
def test_over_many_rounds_everything_arrives_or_waits(codec: CodecSettings) -> None:
    shapes = {"0/w.lora_A": (8, 576), "3/w.lora_B": (576, 8), "head/norm": (100,)}
    given_sum = {key: np.zeros(shape) for key, shape in shapes.items()}
    sent_sum = {key: np.zeros(shape) for key, shape in shapes.items()}
    residual: Tensors | None = None
    for round_ in range(60):
        delta = gaussian(shapes, seed=round_)
        result = compress_with_feedback(delta, residual, codec, replace(CONTEXT, round=round_))
        residual = result.residual
        for key in shapes:
            given_sum[key] += delta[key]
            sent_sum[key] += result.decoded[key]
    assert residual is not None
    for key in shapes:
        np.testing.assert_allclose(sent_sum[key] + residual[key], given_sum[key], atol=1e-7)


def test_a_steady_delta_is_sent_in_full() -> None:
    """What sparsification leaves out grows in the residual until it is among the largest."""
    delta = gaussian({"0/w": (4096,)})
    rounds = 200
    sent = np.zeros(4096)
    residual: Tensors = {}
    for round_ in range(rounds):
        context = replace(CONTEXT, round=round_)
        result = compress_with_feedback(delta, residual, CodecSettings(decay=1.0), context)
        residual = result.residual
        sent += result.decoded["0/w"]
    wanted = rounds * delta["0/w"].astype(np.float64)
    assert np.square(sent - wanted).sum() < 0.01 * np.square(wanted).sum()


def test_decay_zero_forgets() -> None:
    delta = gaussian({"0/w": (500,)})
    codec = CodecSettings(decay=0.0)
    fresh = compress_with_feedback(delta, None, codec, CONTEXT)
    again = compress_with_feedback(delta, fresh.residual, codec, CONTEXT)
    assert again.frame == fresh.frame


def test_dense_leaves_nothing() -> None:
    delta = gaussian({"0/w": (500,)})
    result = compress_with_feedback(delta, None, CodecSettings(kind="dense"), CONTEXT)
    assert same_bits(result.decoded, delta)
    assert not result.residual["0/w"].any()


@pytest.mark.parametrize(
    ("residual", "reason"),
    [
        ({"1/w": np.zeros(5, np.float32)}, "'1/w' has shape .* absent"),
        ({"0/w": np.zeros(6, np.float32)}, "'0/w' has shape"),
        ({"0/w": np.zeros(5)}, "'0/w' is not"),
        ({"0/w": np.full(5, np.nan, np.float32)}, "'0/w' holds 5 values that are not finite"),
        ({"0/w": np.full(5, LARGEST, np.float32)}, "'0/w' holds 5 values that are not finite"),
    ],
    ids=["unknown key", "shape", "dtype", "NaN", "overflow"],
)
def test_unusable_residual_is_refused(residual: Tensors, reason: str) -> None:
    delta = {"0/w": np.full(5, LARGEST, np.float32)}
    with pytest.raises(CodecError, match=reason):
        compress_with_feedback(delta, residual, CodecSettings(), CONTEXT)
