"""LoRA's thin products summed straight into the layer's own, in training.

PEFT computes x W' + (x A') B' * scale as four tensors as wide as the layer's output, forward and backward. Here
BLAS adds each thin product to the wide one in place, and the scale is applied where it is r wide: the same sum,
rounded in another order, for about a tenth less time of a training step (docs/experiments.md).

Over bfloat16 weights the thin products are bfloat16 too, where PEFT widens the layer's input for them: sums are
float32 within a product, and a microbatch's gradient is rounded before it is added to the adapter's, which stays
float32 as the adapter and its optimizer do.

Over quantized weights the wide product is theirs, and backward widens them once more. PEFT keeps every layer's input in
float32 there (docs/experiments.md, "On a GPU").

In: PEFT's LoRA layers over linear layers, plain or quantized, in float32 or bfloat16. Out: the same layers, whose
forward pass is this one while gradients are recorded. Without gradients, under autocast, and over other layers PEFT's
own runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from swarm.model.parted import row_parts
from swarm.model.quantize import QuantizedLinear, QuantizedWeight

_DTYPES = (torch.float32, torch.bfloat16)
_Frozen = torch.Tensor | QuantizedWeight
"""A weight [O, I]."""


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        frozen: _Frozen,
        bias: torch.Tensor | None,
        a_RI: Any,
        b_OR: Any,
        scale: float,
        between: Callable[[], None],
    ) -> torch.Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        a_RI, b_OR = a_RI.to(x.dtype), b_OR.to(x.dtype)
        u_NR, b_RO, outputs = x_NI @ a_RI.t(), b_OR.t(), len(b_OR)
        if isinstance(frozen, QuantizedWeight):
            quantized, wide_OI, kept = frozen, frozen.widened(len(x_NI), x.dtype), []
        else:
            quantized, wide_OI, kept = None, frozen, [frozen]
        y_NO = x_NI.new_empty((len(x_NI), outputs))
        for part in row_parts(x_NI, outputs, between):
            x_PI, y_PO = x_NI[part], y_NO[part]
            if wide_OI is None:
                assert quantized is not None
                y_PO.copy_(quantized.product(x_PI))
                if bias is not None:
                    y_PO.add_(bias)
            elif bias is None:
                torch.mm(x_PI, wide_OI.t(), out=y_PO)
            else:
                torch.addmm(bias, x_PI, wide_OI.t(), out=y_PO)
            y_PO.addmm_(u_NR[part], b_RO, alpha=scale)
        ctx.save_for_backward(x_NI, u_NR, a_RI, b_OR, *kept)
        ctx.quantized, ctx.scale, ctx.between = quantized, scale, between
        return y_NO.view(*x.shape[:-1], outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x_NI, u_NR, a_RI, b_OR, *plain = ctx.saved_tensors
        grad_NO = grad.reshape(-1, grad.shape[-1])
        grad_u_NR = (grad_NO @ b_OR).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            weight_OI, inputs = plain[0] if plain else ctx.quantized.dequantize(grad_NO.dtype), x_NI.shape[1]
            grad_NI = grad_NO.new_empty((len(grad_NO), inputs))
            for part in row_parts(grad_NO, inputs, ctx.between):
                torch.mm(grad_NO[part], weight_OI, out=grad_NI[part]).addmm_(grad_u_NR[part], a_RI)
            grad_x = grad_NI.view(*grad.shape[:-1], inputs)
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
        if not isinstance(base, QuantizedLinear) and not (isinstance(base, nn.Linear) and "weight" in base._parameters):
            continue
        if _dtype(base) in _DTYPES and adapter in getattr(module, "lora_A", {}) and not module.lora_variant:
            module.forward = _forward(module, base, adapter, module.forward, between)


def _dtype(base: nn.Linear) -> torch.dtype:
    """What the layer computes in."""
    return base.compute_dtype if isinstance(base, QuantizedLinear) else base.weight.dtype


def _forward(
    module: Any, base: nn.Linear, adapter: str, plain: Callable[..., Any], between: Callable[[], None]
) -> Callable[..., Any]:
    a, b, scale = module.lora_A[adapter].weight, module.lora_B[adapter].weight, float(module.scaling[adapter])
    dtype = _dtype(base)

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        plainly = args or kwargs or not torch.is_grad_enabled() or x.dtype != dtype
        if plainly or torch.is_autocast_enabled(x.device.type):
            return cast(torch.Tensor, plain(x, *args, **kwargs))
        frozen = base.quantized if isinstance(base, QuantizedLinear) else base.weight
        fused = _Fused.apply(x, frozen, base.bias, a, b, scale, between)  # type: ignore[no-untyped-call]
        return cast(torch.Tensor, fused)

    return forward
