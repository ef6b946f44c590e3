"""RMS norms of any family are recognized by what they give; everything else is left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from swarm.model.few_rows import MOST_ROWS
from swarm.model.norms import use_norm_rows


class HalfRMSNorm(LlamaRMSNorm):  # type: ignore[misc]  # transformers has no types
    """Named and built like the others, but another function."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return 0.5 * super().forward(hidden_states)


def frozen(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter)
    return module.requires_grad_(False)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm, Qwen3RMSNorm, Olmo2RMSNorm])
@pytest.mark.parametrize("width", [576, 63])
@torch.inference_mode()
def test_norms_of_families_give_what_they_gave(kind: type[nn.Module], width: int) -> None:
    plain = frozen(kind(width))
    ours = copy.deepcopy(plain)
    assert use_norm_rows(ours) == 1
    input_BTD = 7 * torch.randn(2, 3, width)
    assert torch.allclose(ours(input_BTD), plain(input_BTD), rtol=1e-5, atol=1e-5)
    assert torch.equal(ours(input_BTD)[1:, :1], ours(input_BTD[1:, :1]))
    many_MD = torch.randn(MOST_ROWS + 1, width)
    assert torch.equal(ours(many_MD), plain(many_MD))


def test_gradients_go_the_plain_way() -> None:
    ours = frozen(LlamaRMSNorm(32))
    use_norm_rows(ours)
    input_MD = torch.randn(2, 32, requires_grad=True)
    ours(input_MD).sum().backward()
    assert input_MD.grad is not None


def test_other_functions_are_left_alone() -> None:
    model = nn.Sequential(frozen(HalfRMSNorm(32)), nn.LayerNorm(32), LlamaRMSNorm(32).to(torch.bfloat16))
    assert use_norm_rows(model) == 0


@torch.inference_mode()
def test_a_weight_that_is_trained_or_replaced_counts() -> None:
    plain = frozen(Gemma2RMSNorm(32))
    ours, input_MD = copy.deepcopy(plain), torch.randn(2, 32)
    use_norm_rows(ours)
    for module in (plain, ours):
        module.weight = nn.Parameter(torch.full((32,), 2.0), requires_grad=False)
    assert torch.equal(ours(input_MD), plain(input_MD))
    ours = copy.deepcopy(plain)
    use_norm_rows(ours)
    for module in (plain, ours):
        module.requires_grad_(True)
        module.weight.data.fill_(3.0)
    assert torch.equal(ours(input_MD), plain(input_MD))
