"""Frozen linear layers under autocast whose narrow weights are made a second time in backward instead of kept.

Autocast multiplies by a copy of the weight in its own dtype. The gradient of the input needs that copy once more, so
torch keeps one a layer for every forward pass that waits for its gradient: half a float32 span again and
again. Making it anew costs one pass over the weight, and gives the same bits.

In: a model whose weights are in place. Out: the same model; nothing changes outside autocast, or where a weight is
trained. Layers of other classes keep their copies: `kept_cast_bytes` says how large those are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from swarm.model.few_rows import FewRowsLinear


class _CastAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight_OI)
        return functional.linear(x, weight_OI.to(x.dtype), None if bias_O is None else bias_O.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight_OI,) = ctx.saved_tensors
        grad_NO = grad.reshape(-1, grad.shape[-1])
        return (grad_NO @ weight_OI.to(grad.dtype)).view(*grad.shape[:-1], -1), None, None


def cast_again(model: nn.Module) -> None:
    """Let the model's frozen linear layers keep no copy of their weights. Call once adapters are in place."""
    for module in model.modules():
        if _takes_part(module):
            linear = cast(nn.Linear, module)
            linear.forward = _forward(linear, linear.forward)  # type: ignore[method-assign]


def kept_cast_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """What the other layers' copies may take in autocast's dtype, for every forward pass that waits."""
    taken = {id(module._parameters["weight"]) for module in model.modules() if _takes_part(module)}
    others = [p for p in model.parameters() if not p.requires_grad and p.dim() > 1 and id(p) not in taken]
    return sum(p.numel() for p in others) * dtype.itemsize


def _takes_part(module: nn.Module) -> bool:
    plain = isinstance(module, FewRowsLinear) or (
        isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    )
    return plain and "weight" in module._parameters and not module.weight.requires_grad


def _forward(linear: nn.Linear, plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        if not torch.is_autocast_enabled(kind) or not torch.is_grad_enabled() or linear.weight.requires_grad:
            return plain(x)
        x = x.to(torch.get_autocast_dtype(kind))
        return cast(torch.Tensor, _CastAgain.apply(x, linear.weight, linear.bias))  # type: ignore[no-untyped-call]

    return forward
