"""Narrow weights on a CUDA device: the same values as on the CPU, through whichever kernels it has."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from swarm.model.kernels import int4, int8
from swarm.model.kernels.traits import traits
from swarm.model.quantize import QuantizedLinear, Scheme, quantize_weight
from swarm.model.speed import ROWS, measure

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
ROWS_ACROSS_KERNELS = [1, 2, 8, 9, 64, 65, 300]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("shape", [(576, 1536), (200, 320), (192, 576)])
def test_the_card_holds_the_same_values(scheme: Scheme, shape: tuple[int, int]) -> None:
    weight = randn(*shape)
    on_cpu, on_card = quantize_weight(weight, scheme), quantize_weight(weight.to(CUDA), scheme)
    assert on_card.codes.device == CUDA
    assert on_card.nbytes == on_cpu.nbytes
    difference = on_card.dequantize(torch.float32).cpu() - on_cpu.dequantize(torch.float32)
    # A value that lies halfway between two codes may round the other way.
    assert (difference != 0).float().mean() < 1e-3


@pytest.mark.parametrize("rows", ROWS_ACROSS_KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_products_are_those_of_the_widened_weight(scheme: Scheme, dtype: torch.dtype, rows: int) -> None:
    weight = quantize_weight(randn(576, 1536).to(CUDA), scheme)
    input_BTD = randn(1, rows, 1536, seed=1).to(CUDA, dtype)
    output = weight.product(input_BTD)
    expected = functional.linear(input_BTD.double(), weight.dequantize(torch.float64))
    assert output.dtype == dtype
    assert float((output.double() - expected).norm() / expected.norm()) < 0.01
    assert torch.equal(output, weight.product(input_BTD))


@pytest.mark.parametrize("in_features", [32, 64, 96, 128, 576, 1536])
def test_codes_come_back_from_the_kernels_order(in_features: int) -> None:
    if not traits(CUDA).int4_native.used:
        assert traits(CUDA).int4_native.reason
        return
    codes = torch.randint(0, 16, (192, in_features), dtype=torch.uint8, device=CUDA)
    assert torch.equal(int4.unpack(int4.pack(codes), in_features), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(576, 1536), (200, 320), (192, 576)])
def test_widening_in_one_pass_gives_what_torch_does(shape: tuple[int, int], dtype: torch.dtype) -> None:
    from swarm.model.kernels import widen  # with Triton: without a C compiler this test fails, as it should

    weight = randn(*shape).to(CUDA)
    wide, narrow = quantize_weight(weight, "int8"), quantize_weight(weight, "int4")
    assert narrow.packing == "kernel", traits(CUDA).int4_native.reason
    codes = int4.unpack(narrow.codes, shape[1])[: shape[0]]
    for found, expected in (
        (widen.int8(wide.codes, wide.scales, dtype), int8.dequantize(wide.codes, wide.scales, torch.float32)),
        (widen.int4(narrow.codes, narrow.scales, shape, dtype), int4.dequantize(codes, narrow.scales, torch.float32)),
    ):
        assert found.dtype == dtype
        assert found.shape == shape
        rounding = torch.finfo(dtype).eps
        torch.testing.assert_close(found.float(), expected, rtol=2 * rounding, atol=rounding)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_gradients_reach_the_input(scheme: Scheme) -> None:
    weight = quantize_weight(randn(96, 64).to(CUDA), scheme)
    layer = QuantizedLinear(weight, None, torch.float32)
    input_BTD = randn(2, 3, 64).to(CUDA).requires_grad_()
    layer(input_BTD).sum().backward()
    expected = torch.ones(2, 3, 96, device=CUDA) @ weight.dequantize(torch.float32)
    assert input_BTD.grad is not None
    torch.testing.assert_close(input_BTD.grad, expected)


def test_every_scheme_is_timed() -> None:
    found = measure(CUDA, torch.bfloat16)
    assert all(tuple(times) == ROWS and min(times.values()) > 0 for times in found.gigaweight_s.values())
