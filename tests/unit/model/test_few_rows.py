"""Our product for a few rows differs from torch's by rounding, and a row's bits not at all by its batch."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from swarm.model.few_rows import MOST_ROWS, FewRowsLinear, try_few_rows, use_few_rows
from swarm.model.kernels.float_rows import FewRows


def linear(in_features: int, out_features: int, *, bias: bool = False) -> nn.Linear:
    """Its weight lies as in a checkpoint file: 8 bytes aligned, no more."""
    layer = nn.Linear(in_features, out_features, bias=bias).requires_grad_(False)
    memory = torch.randn(in_features * out_features + 2)[2:]
    layer.weight = nn.Parameter(memory.view(out_features, in_features), requires_grad=False)
    return layer


def off(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 17), st.integers(1, 80), st.integers(2, 40), st.integers(0, 2**31))
def test_every_shape_is_right_and_no_row_depends_on_another(rows: int, inputs: int, outputs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(outputs, inputs, generator=generator)
    input_MI = torch.randn(rows, inputs, generator=generator)
    few_rows = FewRows(weight_OI)
    got_MO = few_rows.product(input_MI)
    expected_MO = input_MI.double() @ weight_OI.double().t()
    limit_MO = 1e-6 * (input_MI.double().abs() @ weight_OI.double().abs().t())
    assert ((got_MO - expected_MO).abs() <= limit_MO).all()
    for row in range(rows):
        assert torch.equal(few_rows.product(input_MI[row : row + 1]), got_MO[row : row + 1])


@pytest.mark.parametrize("outputs", [1536, 3001])
def test_several_threads_give_the_same_bits(outputs: int, threads: None) -> None:
    layer, input_MI = linear(1024, outputs), torch.randn(5, 1024)
    few_rows, found = FewRows(layer.weight), []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(few_rows.product(input_MI))
    assert torch.equal(*found)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so_and_in_its_row(value: float) -> None:
    layer, input_MI = linear(256, 300), torch.randn(3, 256)
    expected_MO = FewRows(layer.weight).product(input_MI)
    input_MI[1, 7] = value
    got_MO = FewRows(layer.weight).product(input_MI)
    assert not got_MO[1].isfinite().any()
    assert torch.equal(got_MO[::2], expected_MO[::2])


@pytest.mark.parametrize("rows", [1, 3, MOST_ROWS, MOST_ROWS + 1])
@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_a_layer_takes_our_way_for_few_rows_only(rows: int, bias: bool) -> None:
    plain = linear(576, 301, bias=bias)
    ours = copy.copy(plain)
    use_few_rows(ours)
    assert type(ours) is FewRowsLinear
    assert type(plain) is nn.Linear
    input_BTD = torch.randn(rows, 1, 576)
    assert ours(input_BTD).shape == (rows, 1, 301)
    assert off(ours(input_BTD), plain(input_BTD)) < 1e-6
    assert torch.equal(ours(input_BTD), plain(input_BTD)) == (rows > MOST_ROWS)


@torch.inference_mode()
def test_other_dtypes_go_the_plain_way() -> None:
    plain = linear(300, 256)
    ours = copy.copy(plain)
    use_few_rows(ours)
    input_MI = torch.randn(2, 300).to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype"):
        ours(input_MI)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(input_MI), plain(input_MI))


def test_gradients_go_the_plain_way() -> None:
    plain = linear(300, 256)
    ours = copy.copy(plain)
    use_few_rows(ours)
    grads = []
    for layer in (plain, ours):
        input_MI = torch.ones(2, 300, requires_grad=True)
        layer(input_MI).square().sum().backward()
        grads.append(input_MI.grad)
    assert grads[0] is not None
    assert grads[1] is not None
    assert torch.equal(grads[0], grads[1])


def test_small_and_narrow_layers_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(32, 32), linear(256, 256), linear(256, 256).to(torch.bfloat16))
    use_few_rows(model)
    assert [type(module) for module in model] == [nn.Linear, FewRowsLinear, nn.Linear]


@torch.inference_mode()
def test_an_adapter_goes_on_top() -> None:
    torch.manual_seed(0)
    layers = [linear(256, 300), linear(300, 256)]
    plain, ours = nn.Sequential(*layers), nn.Sequential(*map(copy.copy, layers))
    use_few_rows(ours)
    config = peft.LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False)
    for model in (plain, ours):
        torch.manual_seed(1)
        peft.inject_adapter_in_model(config, model)
    input_BD = torch.randn(1, 256)
    assert off(ours(input_BD), plain(input_BD)) < 1e-6
    assert isinstance(ours.get_submodule("0.base_layer"), FewRowsLinear)


def test_what_fits_in_a_cache_is_not_tried() -> None:
    assert try_few_rows(nn.Sequential(linear(256, 256), linear(256, 256))) is None


def test_a_trial_measures_and_changes_nothing() -> None:
    model = nn.Sequential(*[linear(1024, 1024) for _ in range(10)])
    trial = try_few_rows(model)
    assert trial is not None
    assert trial.error < 1e-6
    assert trial.plain_s > 0
    assert trial.few_rows_s > 0
    assert all(type(module) is nn.Linear for module in model)
