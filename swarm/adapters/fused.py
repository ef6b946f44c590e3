"""LoRA's thin products summed straight into the layer's own, in training.

PEFT computes x W' + (x A') B' * scale as four tensors as wide as the layer's output, forward and backward. Here
BLAS adds each thin product to the wide one in place, and the scale is applied where it is r wide: the same sum,
rounded in another order, for about a tenth less time of a training step (docs/experiments.md).

Over bfloat16 weights the thin products are bfloat16 too, where PEFT widens the layer's input for them: sums are
float32 within a product, and a microbatch's gradient is rounded before it is added to the adapter's, which stays
float32 as the adapter and its optimizer do.

In: PEFT's LoRA layers over plain linear layers in float32 or bfloat16. Out: the same layers, whose forward pass is this
one while gradients are recorded. Without gradients, under autocast, and over quantized or other layers PEFT's own runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from swarm.model.parted import row_parts

_DTYPES = (torch.float32, torch.bfloat16)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight_OI: torch.Tensor,
        bias: torch.Tensor | None,
        a_RI: Any,
        b_OR: Any,
        scale: float,
        between: Callable[[], None],
    ) -> torch.Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        a_RI, b_OR = a_RI.to(x.dtype), b_OR.to(x.dtype)
        u_NR = x_NI @ a_RI.t()
        y_NO = x_NI.new_empty((len(x_NI), len(weight_OI)))
        for part in row_parts(x_NI, weight_OI, between):
            if bias is None:
                torch.mm(x_NI[part], weight_OI.t(), out=y_NO[part])
            else:
                torch.addmm(bias, x_NI[part], weight_OI.t(), out=y_NO[part])
            y_NO[part].addmm_(u_NR[part], b_OR.t(), alpha=scale)
        ctx.save_for_backward(x_NI, u_NR, weight_OI, a_RI, b_OR)
        ctx.scale, ctx.between = scale, between
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x_NI, u_NR, weight_OI, a_RI, b_OR = ctx.saved_tensors
        grad_NO = grad.reshape(-1, grad.shape[-1])
        grad_u_NR = (grad_NO @ b_OR).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_NI = grad_NO.new_empty((len(grad_NO), weight_OI.shape[1]))
            for part in row_parts(grad_NO, weight_OI, ctx.between):
                torch.mm(grad_NO[part], weight_OI, out=grad_NI[part]).addmm_(grad_u_NR[part], a_RI)
            grad_x = grad_NI.view(*grad.shape[:-1], -1)
        ctx.between()
        grad_a = (grad_u_NR.t() @ x_NI).float()
        grad_b = (grad_NO.t() @ u_NR).float().mul_(ctx.scale)
        return grad_x, None, None, grad_a, grad_b, None, None


def fuse(model: nn.Module, adapter: str, between: Callable[[], None] = lambda: None) -> None:
    """Let the LoRA layers of `adapter` run fused where they can. Its parameters must be float32. `between` is called
    between parts of a layer's product, forward and backward."""
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        # Subclasses that only multiply few rows another way have the same weight.
        if not isinstance(base, nn.Linear) or "weight" not in base._parameters or base.weight.dtype not in _DTYPES:
            continue
        if adapter in getattr(module, "lora_A", {}) and not module.lora_variant:
            module.forward = _forward(module, base, adapter, module.forward, between)


def _forward(
    module: Any, base: nn.Linear, adapter: str, plain: Callable[..., Any], between: Callable[[], None]
) -> Callable[..., Any]:
    a, b, scale = module.lora_A[adapter].weight, module.lora_B[adapter].weight, float(module.scaling[adapter])

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        plainly = args or kwargs or not torch.is_grad_enabled() or x.dtype != base.weight.dtype
        if plainly or torch.is_autocast_enabled(x.device.type):
            return cast(torch.Tensor, plain(x, *args, **kwargs))
        fused = _Fused.apply(x, base.weight, base.bias, a, b, scale, between)  # type: ignore[no-untyped-call]
        return cast(torch.Tensor, fused)

    return forward
