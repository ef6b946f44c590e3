"""Fused LoRA layers compute what PEFT's do, up to rounding, and step aside where they cannot."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

from swarm.adapters.fused import fuse
from swarm.model import parted
from swarm.model.quantize import SCHEMES, Scheme, quantize_weight, replace_linears


def layer_of(*, bias: bool = False, dtype: torch.dtype = torch.float32, scheme: Scheme = "none") -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(64, 40, bias=bias)).to(dtype).requires_grad_(False)
    if scheme != "none":
        replace_linears(model, {"0": quantize_weight(model[0].weight, scheme)}, dtype)
        model.register_parameter("any", nn.Parameter(torch.zeros(1), requires_grad=False))  # PEFT looks for one
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model, adapter_name="default")
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = torch.randn_like(parameter.data, dtype=torch.float32)
    return model


def results(model: nn.Module, x: torch.Tensor, input_grad: bool = True) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_(input_grad)
    y = model(x)
    y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype))
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "y": y.detach(), **({"x": x.grad} if x.grad is not None else {})}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 64), (2, 50, 64)])
@pytest.mark.parametrize("input_grad", [True, False])
def test_outputs_and_gradients_are_pefts(scheme: Scheme, bias: bool, shape: tuple[int, ...], input_grad: bool) -> None:
    plain, fused = layer_of(bias=bias, scheme=scheme), layer_of(bias=bias, scheme=scheme)
    fuse(fused, "default")
    x = torch.randn(shape)
    expected, found = results(plain, x, input_grad), results(fused, x, input_grad)
    assert found.keys() == expected.keys()
    assert ("x" in found) == input_grad
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-4)
    assert "Fused" in fused(x).grad_fn.name()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bias", [False, True])
def test_parts_of_a_product_come_to_the_whole_and_stop_between(
    monkeypatch: pytest.MonkeyPatch, scheme: Scheme, bias: bool
) -> None:
    whole, parts = layer_of(bias=bias, scheme=scheme), layer_of(bias=bias, scheme=scheme)
    stops: list[bool] = []
    fuse(whole, "default")
    fuse(parts, "default", lambda: stops.append(torch.is_grad_enabled()))
    x = torch.randn(3, 50, 64)
    expected = results(whole, x)
    monkeypatch.setattr(parted, "_LEAST_ROWS", 32)
    monkeypatch.setitem(parted._PART_PRODUCTS, "cpu", 40 * 64 * 40)
    found = results(parts, x)
    assert len(stops) == 3 + 3 + 1, "between four parts of at most 40 rows, forward and backward, and once after"
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_over_quantized_weights_inputs_are_kept_once_and_narrow(scheme: Scheme) -> None:
    layer = layer_of(dtype=torch.bfloat16, scheme=scheme)
    fuse(layer, "default")
    kept: list[torch.Tensor] = []
    x = torch.randn(50, 64, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    wide = [tensor for tensor in kept if tensor.numel() >= x.numel()]
    assert [(tensor.shape, tensor.dtype) for tensor in wide] == [(x.shape, torch.bfloat16)]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_rows_come_out_as_none(scheme: Scheme, shape: tuple[int, ...]) -> None:
    layer = layer_of(scheme=scheme)
    fuse(layer, "default")
    found = results(layer, torch.randn(*shape, 64))
    assert found["y"].shape == (*shape, 40)
    assert not any(found[name].any() for name in found if "lora" in name)


def test_without_gradients_and_under_autocast_it_is_pefts_own() -> None:
    plain, fused = layer_of(), layer_of()
    fuse(fused, "default")
    x = torch.randn(3, 64)
    with torch.inference_mode():
        assert torch.equal(fused(x), plain(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused(x), plain(x))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("input_grad", [True, False])
def test_in_bfloat16_it_errs_no_more_than_twice_as_much_as_peft(scheme: Scheme, input_grad: bool) -> None:
    narrow = torch.bfloat16
    plain, fused, exact = (layer_of(dtype=narrow, scheme=scheme) for _ in range(3))
    if scheme == "none":
        exact = exact.float()
    else:
        exact[0].base_layer.compute_dtype = torch.float32
    fuse(fused, "default")
    x = torch.randn(64, 64, dtype=narrow)
    truth, expected, found = (
        results(model, of, input_grad) for model, of in ((exact, x.float()), (plain, x), (fused, x))
    )
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype
        peft_error, error = ((got - truth[name]).norm() / truth[name].norm() for got in (expected[name], value))
        assert error < 2 * peft_error + 2**-8, name
    assert "Fused" in fused(x).grad_fn.name()


def test_weights_of_another_dtype_keep_pefts_layer() -> None:
    plain, fused = layer_of(dtype=torch.float16), layer_of(dtype=torch.float16)
    fuse(fused, "default")
    x = torch.randn(3, 64, dtype=torch.float16)
    expected, found = results(plain, x), results(fused, x)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
