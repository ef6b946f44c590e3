"""Narrow weights: how far off they may be, what they take, what they leave alone, and that training goes through."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from transformers import AutoModel, MixtralConfig

from swarm.errors import UnsupportedModel
from swarm.ids import Span
from swarm.model.checkpoint import Checkpoint
from swarm.model.kernels import int4, int8
from swarm.model.kernels.int8_rows import FewRows
from swarm.model.kernels.traits import traits
from swarm.model.quantize import (
    GROUP,
    QuantizedLinear,
    QuantizedWeight,
    Scheme,
    plan_of,
    quantize_weight,
    replace_linears,
    weight_bytes,
)
from swarm.model.shard import Shard

NARROW: tuple[Scheme, ...] = ("int8", "int4")
CPU = torch.device("cpu")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def few_rows(input_MI: torch.Tensor, codes_OI: torch.Tensor, scales_O: torch.Tensor) -> torch.Tensor:
    return FewRows(codes_OI, scales_O).product(input_MI)


def off(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 150), st.integers(1, 5), st.integers(0, 2**31), st.sampled_from([1e-6, 1.0, 1e4]))
def test_no_weight_is_off_by_more_than_its_step(rows: int, groups: int, seed: int, size: float) -> None:
    weight = randn(rows, groups * GROUP, seed=seed) * size
    wide = quantize_weight(weight, "int8").dequantize(torch.float32)
    # Half a step, and what the scale loses as bfloat16 (2^-9 of the value, clipped at 127).
    limit_R1 = weight.abs().amax(dim=1, keepdim=True) * (0.5 / 127 + 2**-8)
    assert ((wide - weight).abs() <= limit_R1).all()
    wide = quantize_weight(weight, "int4").dequantize(torch.float32)
    values, back = weight.view(rows, groups, GROUP), wide.view(rows, groups, GROUP)
    spread = values.amax(dim=-1) - values.amin(dim=-1)
    # The range may shrink by a fifth, but never to a larger squared error than without.
    assert ((back - values).square().mean(dim=-1).sqrt() <= spread * 0.04 + values.abs().amax(dim=-1) * 2**-7).all()


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(
    st.integers(1, 200), st.integers(1, 6), st.sampled_from(NARROW), st.sampled_from([torch.float32, torch.bfloat16])
)
def test_bytes_are_known_from_the_shape(rows: int, groups: int, scheme: Scheme, dtype: torch.dtype) -> None:
    shape = (rows, groups * GROUP)
    assert quantize_weight(torch.zeros(shape, dtype=dtype), scheme).nbytes == weight_bytes(shape, scheme, dtype)


def test_what_a_scheme_refuses_costs_its_dtype() -> None:
    assert weight_bytes((4, 64, 64), "int8", torch.bfloat16) == 4 * 64 * 64 * 2
    assert weight_bytes((64, 40), "int4", torch.float32) == 64 * 40 * 4
    assert weight_bytes((64, 64), "none", torch.float32) == 64 * 64 * 4
    with pytest.raises(UnsupportedModel, match="groups of 32"):
        quantize_weight(torch.zeros(64, 40), "int4")
    with pytest.raises(UnsupportedModel, match="not finite"):
        quantize_weight(torch.full((64, 64), float("nan")), "int8")
    with pytest.raises(UnsupportedModel, match="not finite"):
        quantize_weight(torch.full((64, 64), float("inf")), "int4")


@pytest.mark.parametrize("rows", [1, 2, 5, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", NARROW)
def test_products_are_those_of_the_widened_weight(scheme: Scheme, dtype: torch.dtype, rows: int) -> None:
    weight = quantize_weight(randn(200, 320), scheme)
    input_BTD = randn(1, rows, 320, seed=1).to(dtype)
    input_BTD[..., 7] *= 50  # as hidden states have it
    output = weight.product(input_BTD)
    assert output.dtype == dtype
    assert output.shape == (1, rows, 200)
    assert off(output, functional.linear(input_BTD.double(), weight.dequantize(torch.float64))) < 0.005
    assert torch.equal(output, weight.product(input_BTD))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", NARROW)
def test_inputs_may_be_views_and_may_be_empty(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = quantize_weight(randn(200, 320), scheme)
    input_BTD = randn(3, 5, 320, seed=1).to(dtype)
    last = input_BTD[:, -1:]
    assert not last.view(3, 320).is_contiguous()
    assert torch.equal(weight.product(last), weight.product(last.clone()))
    assert weight.product(input_BTD[:, :0]).shape == (3, 0, 200)


@pytest.mark.parametrize("in_features", [24, 40, 56, 200, 576])
def test_any_length_of_a_row_is_summed_to_its_end(in_features: int) -> None:
    """Kernels work in strides of 32; torch's own for CPUs reads beyond a row that 16 does not divide."""
    weight = quantize_weight(randn(40, in_features), "int8")
    input_MI = randn(3, in_features, seed=1)
    expected = functional.linear(input_MI.double(), weight.dequantize(torch.float64))
    for _ in range(20):
        assert off(weight.product(input_MI), expected) < 0.005


@pytest.mark.parametrize("way", [few_rows, int8.pieces, int8.digits])
def test_every_way_of_int8_agrees(way: object) -> None:
    weight = quantize_weight(randn(3000, 576), "int8")  # several pieces
    input_MI = randn(4, 576, seed=1)
    input_MI[:, 3] *= 50
    expected = functional.linear(input_MI.double(), weight.dequantize(torch.float64))
    limit = 1e-6 if way is int8.pieces else 1e-3
    assert off(way(input_MI, weight.codes, weight.scales), expected) < limit  # type: ignore[operator]


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**31), st.integers(2, 9), st.sampled_from([1e-20, 1.0, 1e20]))
def test_a_row_does_not_depend_on_its_batch(seed: int, rows: int, size: float) -> None:
    input_MI = randn(rows, 64, seed=seed) * size
    by_int8, by_int4 = quantize_weight(randn(70, 64), "int8"), quantize_weight(randn(70, 64), "int4")
    for way in (few_rows, int8.digits):
        one_by_one = [way(input_MI[i : i + 1], by_int8.codes, by_int8.scales) for i in range(rows)]
        assert torch.equal(way(input_MI, by_int8.codes, by_int8.scales), torch.cat(one_by_one))
    assert torch.equal(by_int4.product(input_MI), torch.cat([by_int4.product(row) for row in input_MI.split(1)]))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.sampled_from([31, 64, 1000, 8192, 8257, 17000]), st.booleans())
def test_both_ways_with_exact_sums_give_the_same_bits(seed: int, rows: int, inputs: int, extreme: bool) -> None:
    weight = quantize_weight(randn(6, inputs, seed=seed + 1), "int8")
    input_MI = randn(rows, inputs, seed=seed)
    if extreme:  # the largest sums that there are
        input_MI = torch.ones(rows, inputs)
        weight = QuantizedWeight("int8", weight.shape, torch.full_like(weight.codes, -127), weight.scales)
    by_rows = few_rows(input_MI, weight.codes, weight.scales)
    assert torch.equal(by_rows, int8.digits(input_MI, weight.codes, weight.scales))
    if extreme:
        assert off(by_rows, -127.0 * inputs * weight.scales.double().expand(rows, -1)) < 1e-6


def test_large_weights_are_split_among_threads_to_the_same_bits() -> None:
    weight = quantize_weight(randn(4099, 1056), "int8")
    input_MI = randn(3, 1056, seed=1)
    before = torch.get_num_threads()
    outputs = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            outputs.append(few_rows(input_MI, weight.codes, weight.scales))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("scheme", NARROW)
def test_what_is_not_finite_stays_visible(scheme: Scheme, bad: float) -> None:
    weight = quantize_weight(randn(64, 64), scheme)
    input_MI = randn(3, 64)
    input_MI[1, 5] = bad
    finite = weight.product(input_MI).isfinite().all(dim=-1)
    assert finite.tolist() == [True, False, True]


def test_few_rows_zeros_are_zeros() -> None:
    assert not quantize_weight(randn(64, 64), "int8").product(torch.zeros(3, 64)).any()
    assert not quantize_weight(torch.zeros(64, 64), "int8").product(randn(3, 64)).any()


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 3), st.sampled_from([32, 64, 96, 576]), st.integers(0, 2**31))
def test_codes_come_back_from_the_kernels_order(blocks: int, in_features: int, seed: int) -> None:
    shape = (blocks * int4.BLOCK_ROWS, in_features)
    codes = torch.randint(0, 16, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(int4.unpack(int4.pack(codes), in_features), codes)
    assert torch.equal(int4.unpack_plain(int4.pack_plain(codes)), codes)


def test_without_a_kernel_codes_are_kept_row_by_row() -> None:
    weight = randn(100, 64)
    kernel = quantize_weight(weight, "int4")
    codes, scales = int4.quantize(weight, GROUP)
    plain = QuantizedWeight("int4", (100, 64), int4.pack_plain(codes), scales)
    assert torch.equal(plain.dequantize(torch.float32), kernel.dequantize(torch.float32))
    input_MI = randn(3, 64, seed=1)
    assert off(kernel.product(input_MI), plain.product(input_MI)) < 0.005


def test_a_verdict_against_a_kernel_says_why() -> None:
    for verdict in vars(traits(CPU)).values():
        assert verdict.used != bool(verdict.reason)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scheme", NARROW)
def test_gradients_reach_the_input_and_nothing_else(scheme: Scheme, bias: bool) -> None:
    plain = nn.Linear(64, 96, bias=bias).requires_grad_(False)
    weight = quantize_weight(plain.weight, scheme)
    layer = QuantizedLinear(weight, plain.bias, torch.float32)
    input_BTD = randn(2, 3, 64).requires_grad_()
    output = layer(input_BTD)
    grad_BTO = randn(2, 3, 96, seed=1)
    output.backward(grad_BTO)
    assert input_BTD.grad is not None
    assert off(input_BTD.grad, grad_BTO @ weight.dequantize(torch.float32)) < 1e-6
    assert [name for name, _ in layer.named_parameters()] == (["bias"] if bias else [])
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_an_adapter_trains_on_top() -> None:
    plain = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).requires_grad_(False)
    narrow = copy.deepcopy(plain)
    replace_linears(narrow, {str(i): quantize_weight(plain[i].weight, "int8") for i in range(2)}, torch.float32)
    grads = []
    for model in (plain, narrow):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False)
        peft.inject_adapter_in_model(config, model)
        model(randn(5, 64)).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert isinstance(narrow.get_submodule("0.base_layer"), QuantizedLinear)
    assert off(grads[1], grads[0]) < 0.03


def test_layers_that_are_not_there_are_named() -> None:
    weight = quantize_weight(randn(64, 64), "int8")
    with pytest.raises(UnsupportedModel, match="no linear layer 1 of 64 x 64"):
        replace_linears(nn.Sequential(nn.Linear(64, 64)), {"1": weight}, torch.float32)
    with pytest.raises(UnsupportedModel, match="no linear layer 0 of 64 x 64"):
        replace_linears(nn.Sequential(nn.Linear(64, 32)), {"0": weight}, torch.float32)


def test_experts_and_routers_are_kept_by_name() -> None:
    config = MixtralConfig(
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=4,
        vocab_size=64,
    )
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    plan = plan_of(model.layers, "int8")
    assert set(plan.narrowed) == {f"0.self_attn.{name}_proj" for name in "qkvo"}
    assert {name for name in plan.kept if "experts" in name} == {
        "0.mlp.experts.gate_up_proj",
        "0.mlp.experts.down_proj",
    }
    assert any("gate" in name and "experts" not in name for name in plan.kept)
    assert all(plan.kept.values())
    assert plan_of(model.layers, "none").nbytes(model.layers, torch.float32) == sum(
        p.numel() * 4 for p in model.layers.parameters()
    )


@pytest.mark.parametrize(("scheme", "most"), [("int8", 0.03), ("int4", 0.03)])
def test_blocks_of_a_real_model_stay_close(smollm2: Path, scheme: Scheme, most: float) -> None:
    """This checkpoint's weights were 4-bit in groups of 32 before, so int4 is nearly exact on it."""
    shard = Shard(Checkpoint.open(str(smollm2)), Span(10, 12), torch.float32, CPU)
    exact, narrow = shard.view(), shard.view()
    plan = plan_of(narrow.model, scheme)
    assert len(plan.narrowed) == 14
    assert plan.kept == {}
    before = plan_of(narrow.model, "none").nbytes(narrow.model, torch.float32)
    weights = {path: quantize_weight(shard.frozen[f"{path}.weight"], scheme) for path in plan.narrowed}
    assert plan.nbytes(narrow.model, torch.float32) < before * (0.26 if scheme == "int8" else 0.17)
    replace_linears(narrow.model, weights, torch.float32)
    hidden_BTD = randn(1, 12, 576) * 0.1
    with torch.inference_mode():
        expected, cache = exact.forward(hidden_BTD), narrow.new_cache()
        first = narrow.forward(hidden_BTD[:, :11], 0, cache)
        last = narrow.forward(hidden_BTD[:, 11:], 11, cache)
    assert off(torch.cat([first, last], dim=1) - hidden_BTD, expected - hidden_BTD) < most
