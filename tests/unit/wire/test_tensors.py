from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import ProtocolError
from swarm.wire import tensors
from swarm.wire.tensors import pack, payload_size, unpack
from swarm.wire.v1 import common_pb2 as pb

CPU = torch.device("cpu")
shapes = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


@given(shapes, st.integers(0, 2**31))
def test_float32_is_exact_and_the_others_are_close(shape: tuple[int, ...], seed: int) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 30
    for encoding, tolerance in [("float32", 0.0), ("bfloat16", 2**-8), ("float16", 2**-10), ("int8", None)]:
        meta, payload = pack(tensor, encoding)
        assert len(payload) == payload_size(meta)
        back = unpack(meta, payload, torch.float32, CPU)
        if tolerance is None:
            bound = tensor.abs().amax(dim=-1, keepdim=True) / 127 * 0.5001
            assert bool(((back - tensor).abs() <= bound).all())
        else:
            assert bool(((back - tensor).abs() <= tensor.abs() * tolerance).all())


def test_int8_scales_are_per_group_so_that_an_outlier_harms_its_neighbours_only() -> None:
    tensor = torch.randn(2, 3, 192, generator=torch.Generator().manual_seed(1))
    tensor[..., 70] = 500.0
    meta, payload = pack(tensor, "int8")
    assert len(payload) == payload_size(meta) == tensor.numel() * (1 + 4 / 64)
    error = (unpack(meta, payload, torch.float32, CPU) - tensor).abs()
    assert float(error[..., :64].max()) < 0.02
    assert float(error[..., 128:].max()) < 0.02
    assert float(error[..., 64:128].max()) < 2.0


@given(shapes, st.integers(0, 2**31), st.integers(-140, 127))
def test_a_scaled_float16_gradient_keeps_its_digits_whatever_its_size(
    shape: tuple[int, ...], seed: int, power: int
) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).clamp(-0.9, 0.9) * 2.0**power
    meta, payload = pack(tensor, "float16", scaled=True)
    assert len(payload) == payload_size(meta) == 2 * tensor.numel()
    back = unpack(meta, payload, torch.float32, CPU)
    # Half of the last of float16's eleven digits; far below the largest value, what float16 and float32 end at.
    bound = tensor.abs() * 2**-11 + tensor.abs().max() * 2**-38 + 2.0**-149
    assert bool(((back - tensor).abs() <= bound).all())


def test_a_scale_is_undone_exactly() -> None:
    tensor = torch.randn(4, 64).to(torch.float16).float()
    for power in (-100, -30, 0, 20):
        meta, payload = pack(tensor * 2.0**power, "float16", scaled=True)
        assert torch.equal(unpack(meta, payload, torch.float32, CPU), tensor * 2.0**power)
    meta, payload = pack(torch.zeros(2, 3), "float16", scaled=True)
    assert meta.exponent == 0
    assert not unpack(meta, payload, torch.float32, CPU).any()
    assert pack(tensor, "bfloat16", scaled=True)[0].exponent == pack(tensor, "float16")[0].exponent == 0


@pytest.mark.parametrize(("encoding", "exponent"), [("float32", 1), ("float16", 127), ("float16", -2000)])
def test_an_exponent_that_cannot_be_is_refused(encoding: str, exponent: int) -> None:
    meta, payload = pack(torch.ones(2, 3), encoding)
    meta.exponent = exponent
    with pytest.raises(ProtocolError, match="exponent"):
        unpack(meta, payload, torch.float32, CPU)
    meta, payload = pack(torch.full((2, 3), 6e4), "float16")
    meta.exponent = 120  # out of float32's range
    with pytest.raises(ProtocolError, match="NaN or infinity"):
        unpack(meta, payload, torch.float32, CPU)


@pytest.mark.parametrize("encoding", ["int8", "int4"])
def test_a_row_of_zeros_stays_zero(encoding: str) -> None:
    meta, payload = pack(torch.zeros(2, 3, 4), encoding)
    assert not unpack(meta, payload, torch.float32, CPU).any()


@given(shapes, st.integers(0, 2**31), st.sampled_from([1.0, 1e-30, 1e30]))
def test_int4_is_within_half_a_step_and_keeps_the_largest(shape: tuple[int, ...], seed: int, factor: float) -> None:
    shape = (*shape[:-1], 16 * shape[-1])
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * factor
    tensor[..., 3] *= 80
    meta, payload = pack(tensor, "int4")
    assert len(payload) == payload_size(meta)
    back = unpack(meta, payload, torch.float32, CPU)
    rows, found = tensor.reshape(-1, shape[-1]), back.reshape(-1, shape[-1])
    largest = rows.abs().topk(4, dim=-1).indices
    assert bool(((found - rows).gather(1, largest).abs() <= rows.gather(1, largest).abs() * 2**-8).all())
    size = 32 if shape[-1] % 32 == 0 else shape[-1]
    rest = rows.scatter(1, largest, 0.0).reshape(-1, size)
    error = (found.scatter(1, largest, 0.0).reshape(-1, size) - rest).abs()
    span = rest.amax(dim=-1, keepdim=True) - rest.amin(dim=-1, keepdim=True)
    # Half a step, and what bfloat16 takes from the least value and from fifteen steps.
    bound = span / 15 * 0.5 + 2**-7 * (rest.abs().amax(dim=-1, keepdim=True) + span)
    assert bool((error[rest != 0] <= bound.expand_as(rest)[rest != 0]).all())


def test_int4_bytes() -> None:
    meta, payload = pack(torch.randn(2, 3, 576), "int4")
    assert len(payload) == payload_size(meta) == 6 * (4 * 6 + 576 // 32 * 4 + 576 // 2)
    for width in (1, 3, 7):  # an odd number of codes; fewer values than travel apart
        meta, payload = pack(torch.randn(3, width), "int4")
        assert len(payload) == payload_size(meta)
        assert unpack(meta, payload, torch.float32, CPU).shape == (3, width)


@given(st.binary(min_size=44, max_size=44))
def test_any_int4_payload_gives_finite_numbers_or_is_refused(payload: bytes) -> None:
    meta = pb.TensorMeta(shape=[1, 32], encoding="int4")
    assert payload_size(meta) == 4 * 6 + 4 + 16 == 44
    try:
        values = unpack(meta, payload, torch.float32, CPU)
    except ProtocolError:
        return
    assert bool(values.isfinite().all())


@given(st.integers(1, 40), st.sampled_from([1, 3, 32, 64, 96]), st.sampled_from(["int8", "int4"]))
def test_encoding_a_few_rows_at_a_time_changes_no_bit(rows: int, width: int, encoding: str) -> None:
    tensor = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))
    whole = pack(tensor, encoding)
    expected = unpack(*whole, torch.bfloat16, CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "_AT_ONCE", 200)
        assert pack(tensor, encoding) == whole
        assert torch.equal(unpack(*whole, torch.bfloat16, CPU), expected)


@pytest.mark.parametrize("place", [32, -1, 2**31 - 1])
def test_an_int4_place_beyond_the_row_is_refused(place: int) -> None:
    meta, payload = pack(torch.ones(1, 32), "int4")
    with pytest.raises(ProtocolError, match="beyond their row"):
        unpack(meta, place.to_bytes(4, "little", signed=True) + payload[4:], torch.float32, CPU)


@pytest.mark.parametrize("encoding", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(encoding: str, value: float) -> None:
    tensor = torch.ones(1, 2, 4)
    tensor[0, 1, 2] = value
    meta, payload = pack(tensor, encoding)
    with pytest.raises(ProtocolError, match="NaN or infinity"):
        unpack(meta, payload, torch.float32, CPU)


@pytest.mark.parametrize(
    ("shape", "encoding", "size"),
    [
        ([2, 3], "float32", 23),
        ([2, 3], "float32", 25),
        ([2, 3], "int8", 6),
        ([2, 32], "int4", 32),
        ([0, 32], "int4", 0),
        ([2**31, 2**31], "int4", 16),
        ([], "float32", 4),
        ([0, 3], "float32", 0),
        ([1, 1, 1, 1, 1], "float32", 4),
        ([2, 3], "complex64", 48),
        ([2**31, 2**31], "float32", 16),
    ],
)
def test_a_payload_that_is_not_what_was_announced(shape: list[int], encoding: str, size: int) -> None:
    with pytest.raises(ProtocolError):
        unpack(pb.TensorMeta(shape=shape, encoding=encoding), bytes(size), torch.float32, CPU)
