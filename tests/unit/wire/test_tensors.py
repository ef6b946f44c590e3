from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import ProtocolError
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


def test_a_row_of_zeros_stays_zero() -> None:
    meta, payload = pack(torch.zeros(2, 3, 4), "int8")
    assert not unpack(meta, payload, torch.float32, CPU).any()


@pytest.mark.parametrize("encoding", ["float32", "bfloat16", "int8"])
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
