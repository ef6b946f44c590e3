"""Averaging, the outer step and compression: the numbers, and that they are the same twice."""

from __future__ import annotations

import json

import numpy as np
import pytest
from coordinator_sim import TinyAdapters, job_spec

from coordinator.aggregate import (
    MOST_SENT,
    OuterState,
    RoundResult,
    average,
    initial_round,
    outer_round,
    pipeline_weights,
    refuse_huge,
)
from swarm.compress import FrameContext, decode
from swarm.config import CodecSettings, JobSpec, LoraMethod, job_from_json
from swarm.errors import CorruptData
from swarm.optim.params import block_hash, by_block, hash_all, unpack_block

DENSE = CodecSettings(kind="dense")
SPARSE = CodecSettings()


def _array(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def _spec(**changes: object) -> JobSpec:
    return job_from_json(job_spec(**changes))


def _initial() -> RoundResult:
    return initial_round(TinyAdapters().initial(LoraMethod(r=4), 0))


def _mean(seed: int, params: object = None) -> dict[str, np.ndarray]:
    generator = np.random.Generator(np.random.Philox(key=seed))
    shapes = TinyAdapters().shapes(LoraMethod(r=4))
    return {key: generator.uniform(-0.1, 0.1, shape).astype(np.float32) for key, shape in shapes.items()}


def test_senders_of_a_coordinate_share_it() -> None:
    sent = [
        ("a", {"0/x": _array(8, 0, 0, 1)}),
        ("b", {"0/x": _array(0, 6, 0, 2)}),
        ("c", {"0/x": _array(0, 2, 0, 3)}),
    ]
    mean = average(sent, 8, SPARSE)
    # One sender of eight: divided by 8/4; two: by two; nobody: zero; three: by three.
    np.testing.assert_array_equal(mean["0/x"], _array(4, 4, 0, 2))


def test_a_dense_uplink_is_averaged_plainly() -> None:
    sent = [("a", {"0/x": _array(3, 0), "1/x": _array(5)}), ("b", {"0/x": _array(0, 1)})]
    mean = average(sent, 2, DENSE)
    np.testing.assert_array_equal(mean["0/x"], _array(1.5, 0.5))
    np.testing.assert_array_equal(mean["1/x"], _array(2.5))


def test_equal_weights_are_the_plain_rule_to_the_bit() -> None:
    generator = np.random.Generator(np.random.Philox(key=7))
    sent = [
        (peer, {"0/x": generator.normal(size=999).astype(np.float32) * (generator.random(999) < 0.3)}) for peer in "abc"
    ]
    sent = [(peer, {key: value.astype(np.float32) for key, value in tensors.items()}) for peer, tensors in sent]
    weights = pipeline_weights({0: 4711, 1: 4711, 2: 4711})
    assert set(weights.values()) == {1.0}
    by_peer = dict(zip("abc", weights.values(), strict=True))
    for uplink in (SPARSE, DENSE):
        plain, weighed = average(sent, 3, uplink), average(sent, 3, uplink, by_peer)
        assert plain["0/x"].tobytes() == weighed["0/x"].tobytes()


def test_a_pipeline_counts_by_what_it_trained_on() -> None:
    weights = pipeline_weights({0: 100, 1: 300})
    assert weights == {0: 0.5, 1: 1.5}
    sent = [("a", {"0/x": _array(4, 4, 0)}), ("b", {"0/x": _array(0, 8, 2)})]
    by_peer = {"a": 0.5, "b": 1.5}
    # One sender alone is divided by its own weight, two by the sum of theirs, at least by K/4.
    np.testing.assert_array_equal(average(sent, 2, SPARSE, by_peer)["0/x"], _array(4, 7, 2))
    np.testing.assert_array_equal(average(sent, 2, DENSE, by_peer)["0/x"], _array(1, 7, 1.5))
    np.testing.assert_array_equal(average(sent, 8, SPARSE, by_peer)["0/x"], _array(1, 7, 1.5))


def test_a_boast_counts_twice_the_median_at_most() -> None:
    weights = pipeline_weights({0: 100, 1: 100, 2: 10**9})
    assert weights == {0: 0.75, 1: 0.75, 2: 1.5}


def test_contributions_come_in_order_of_peer() -> None:
    with pytest.raises(AssertionError):
        average([("b", {}), ("a", {})], 2, DENSE)


def test_plain_averaging_is_exact_to_one_rounding() -> None:
    spec = _spec(outer={"lr": 1.0, "momentum": 0.0}, downlink={"kind": "dense"})
    start, mean = _initial(), _mean(1)
    result = outer_round(start.state, mean, spec, "job", 1)
    for key, value in start.state.params.items():
        exact = value.astype(np.float64) - mean[key].astype(np.float64)
        np.testing.assert_array_equal(result.state.params[key], exact.astype(np.float32))
        assert not result.state.residual[key].any()


def test_nodes_that_add_the_frames_get_the_same_hashes() -> None:
    spec = _spec()
    result = start = _initial()
    rebuilt = dict(start.state.params)
    for number in (1, 2, 3):
        result = outer_round(result.state, _mean(number), spec, "job", number)
        for block in result.blocks:
            keys = by_block(rebuilt)[block.block]
            own = {key: rebuilt[key] for key in keys}
            context = FrameContext("job", number, block_hash(own))
            decoded = decode(block.frame, {key: value.shape for key, value in own.items()}, context)
            rebuilt.update({key: own[key] + decoded[key] for key in keys})
            assert block_hash({key: rebuilt[key] for key in keys}) == block.params_hash
            unpacked = unpack_block(block.snapshot, {key: own[key].shape for key in keys})
            for key in keys:
                np.testing.assert_array_equal(unpacked[key], rebuilt[key])
        assert hash_all(rebuilt) == result.params_hash
    assert any(value.any() for value in result.state.residual.values()), "what was left out is kept"


def test_the_same_input_gives_the_same_bytes() -> None:
    results = [outer_round(_initial().state, _mean(1), _spec(), "job", 1) for _ in range(2)]
    assert results[0].state.pack() == results[1].state.pack()
    assert [b.frame for b in results[0].blocks] == [b.frame for b in results[1].blocks]
    unpacked = OuterState.unpack(results[0].state.pack())
    for part in ("params", "momentum", "residual"):
        stored, back = getattr(results[0].state, part), getattr(unpacked, part)
        assert sorted(stored) == sorted(back)
        assert all((stored[key] == back[key]).all() for key in stored)


def test_a_block_nobody_sent_keeps_everything() -> None:
    spec = _spec()
    first = outer_round(_initial().state, _mean(1), spec, "job", 1)
    mean = {key: value for key, value in _mean(2).items() if not key.startswith("2/")}
    second = outer_round(first.state, mean, spec, "job", 2)
    before, after = first.blocks[2], second.blocks[2]
    assert (after.block, after.frame, after.params_hash) == ("2", b"", before.params_hash)
    for part in ("params", "momentum", "residual"):
        for key in by_block(first.state.params)["2"]:
            np.testing.assert_array_equal(getattr(second.state, part)[key], getattr(first.state, part)[key])
    assert second.blocks[1].params_hash != first.blocks[1].params_hash


@pytest.mark.parametrize("downlink", [{"kind": "dense"}, {"density": 0.25, "bits": 1}, {"allocation": "energy"}])
@pytest.mark.parametrize("lr", [1.0, 1e6])
def test_the_largest_that_is_accepted_never_keeps_a_round_from_ending(downlink: dict[str, object], lr: float) -> None:
    spec = _spec(outer={"lr": lr, "momentum": 1 - 1e-12}, downlink=downlink | {"chunk": 64})
    far = {key: np.full_like(value, 3e38) for key, value in _initial().state.params.items()}
    mean = {key: np.full_like(value, -MOST_SENT) for key, value in far.items()}
    refuse_huge(mean)
    for state in (_initial().state, OuterState(_initial().state.params, far, far)):
        for number in range(1, 40):
            state = outer_round(state, mean, spec, "job", number).state
            for part in (state.params, state.momentum, state.residual):
                assert all(np.isfinite(value).all() for value in part.values()), number


def test_a_foreign_file_is_not_an_outer_state() -> None:
    files = TinyAdapters().export(LoraMethod(r=4), _initial().state.params, "tiny")
    assert json.loads(files["adapter_config.json"])["peft_type"] == "LORA"
    with pytest.raises(CorruptData):
        OuterState.unpack(files["adapter_model.safetensors"])
