"""A wide product in parts is the product, and stops between them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from swarm.model import parted
from swarm.model.parted import linear_in_parts

ROWS, WIDTH, VOCABULARY = 5, 16, 37


@pytest.mark.parametrize("columns", [1, 10, 37, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_parts_come_to_the_whole(monkeypatch: pytest.MonkeyPatch, columns: int, dtype: torch.dtype, bias: bool) -> None:
    monkeypatch.setitem(parted._PART_PRODUCTS, "cpu", columns * ROWS * WIDTH)
    torch.manual_seed(0)
    layer = nn.Linear(WIDTH, VOCABULARY, bias).to(dtype).requires_grad_(False)
    rows = torch.randn(ROWS, WIDTH, dtype=dtype, requires_grad=True)
    upstream = torch.randn(ROWS, VOCABULARY, dtype=dtype)
    expected = layer(rows)
    (gradient,) = torch.autograd.grad(expected, rows, upstream)
    stops: list[bool] = []
    found = linear_in_parts(rows, layer, lambda: stops.append(torch.is_grad_enabled()))
    (own,) = torch.autograd.grad(found, rows, upstream)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(found, expected, **close)
    torch.testing.assert_close(own, gradient, **close)
    parts = -(-VOCABULARY // columns)
    assert len(stops) == 2 * (parts - 1)


def test_without_gradients_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(parted._PART_PRODUCTS, "cpu", 10 * ROWS * WIDTH)
    layer = nn.Linear(WIDTH, VOCABULARY).requires_grad_(False)
    with torch.inference_mode():
        rows = torch.randn(ROWS, WIDTH)
        torch.testing.assert_close(linear_in_parts(rows, layer, lambda: None), layer(rows))


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 64])
def test_a_gradient_over_a_vocabulary_keeps_its_digits_however_few_rows(rows: int) -> None:
    """As a loss has it: what the words have in common cancels out, since their weights sum to nothing."""
    torch.manual_seed(1)
    vocabulary, width = 49_152, 64
    layer = nn.Linear(width, vocabulary, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.randn(vocabulary, width) + 3 * torch.randn(width))
    hidden = torch.randn(rows, width, requires_grad=True)
    upstream = torch.softmax(4 * torch.randn(rows, vocabulary), dim=-1)
    upstream[:, 40_000] -= 1
    (gradient,) = torch.autograd.grad(linear_in_parts(hidden, layer, lambda: None), hidden, upstream)
    exact = upstream.double() @ layer.weight.double()
    assert (gradient - exact).norm() < 3e-5 * exact.norm()
