"""RMS norms that take one pass for a few rows (`swarm.model.kernels.norm_rows`).

Every family has a class of its own, all with one vector and six small operations; between products that sweep the
caches each of them costs 10 µs, 3 ms of a token of SmolLM2. Which classes these are is not told from names
alone: a module is taken if it gives what the formula gives, by its weight or by one plus its weight.

In: a model whose weights are in place and frozen, in float32 on a CPU. Out: the same model; norms that were
recognized take our way while no gradient is wanted. Modules that are not stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from swarm.model.few_rows import MOST_ROWS

Norm = Callable[[torch.Tensor], torch.Tensor]
_EPSILONS = ("variance_epsilon", "eps", "epsilon")
_CLOSE = 1e-5
"""Of the largest value of a row."""


def use_norm_rows(model: nn.Module) -> int:
    """Returns how many norms take our way from now on."""
    found = 0
    for module in model.modules():
        norm = _recognized(module)
        if norm is not None:
            module.forward = _forward(module, norm)
            found += 1
    return found


def _forward(module: nn.Module, norm: Norm) -> Norm:
    plain, weight = cast(Norm, module.forward), module._parameters["weight"]
    assert weight is not None
    most_values = weight.numel() * MOST_ROWS

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        ours = hidden_states.numel() <= most_values and hidden_states.dtype == torch.float32
        # A weight that is trained, or that another was put in the place of, is not the one we took.
        if not ours or torch.is_grad_enabled() or weight.requires_grad or module._parameters["weight"] is not weight:
            return plain(hidden_states)
        return norm(hidden_states.contiguous())

    return forward


@torch.inference_mode()
def _recognized(module: nn.Module) -> Norm | None:
    from swarm.model.kernels.norm_rows import NormRows  # compiled: loaded where a CPU runs a model

    if "RMSNorm" not in type(module).__name__ or set(module.state_dict()) != {"weight"}:
        return None
    weight = module.weight
    eps = next((float(value) for name in _EPSILONS if isinstance(value := getattr(module, name, None), float)), None)
    if eps is None or not isinstance(weight, torch.Tensor) or weight.dim() != 1:
        return None
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        return None
    # Small rows show where eps belongs, large ones what is squared.
    rows_MD = torch.randn(4, weight.numel()) * torch.tensor([1e-3, 1.0, 30.0, 1e3]).unsqueeze(1)
    try:
        expected_MD = module(rows_MD)
    except (TypeError, RuntimeError):  # a norm that is given something else too
        return None
    for scale_D in (weight.detach().contiguous(), weight.detach() + 1):
        norm = NormRows(scale_D, eps).norm
        off_M = (norm(rows_MD) - expected_MD).abs().amax(dim=-1)
        if (off_M <= _CLOSE * expected_MD.abs().amax(dim=-1)).all():
            return norm
    return None
