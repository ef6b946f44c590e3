"""Frozen linear layers with narrow weights: int8 (8 bits) or int4 (5 bits with its scales).

In: a frozen weight [O, I] as the checkpoint has it, one at a time, so that loading needs little more memory
than the narrow weights take. Out: a `QuantizedWeight` that views share, and `QuantizedLinear` in the
place of `nn.Linear`. Gradients reach inputs and adapters, never the weight. What a scheme cannot or should
not narrow is named by `plan_of` with its reason and stays as it is; nothing is left out in silence.

int8 loses next to nothing and is faster; int4 is for weights that do not fit otherwise (KL in
docs/experiments.md, "Quantized shards").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import nn
from torch.nn import functional

from swarm.errors import UnsupportedModel
from swarm.model.kernels import int4, int8
from swarm.model.kernels.traits import traits

if TYPE_CHECKING:
    from swarm.model.kernels.int8_rows import FewRows

Scheme = Literal["none", "int8", "int4"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)

GROUP = 32
"""Inputs that share an int4 scale. 64 would save half a bit and cost half as much KL again (docs/experiments.md)."""
_LEAST_WEIGHTS = 2**14
_ROUTERS = ("gate", "router")
_FEW_ROWS_CPU = 12
"""With more rows torch's integer product is faster than our kernel."""
_NATIVE_ROWS_CUDA = {"int8": 8, "int4": 64}
"""With more rows the other ways are faster: on an H100 the 4-bit kernel takes 0.29 ms for 64 rows times 14,336 x 4,096,
widening 0.21 and the product in bfloat16 0.065; int8's, with one thread an output, lost there for a single row."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [O, I] in few bits, on one device. Its tensors are never written to."""

    scheme: Scheme
    shape: tuple[int, int]
    codes: torch.Tensor
    """int8: [O, I]. int4: in the order `packing` names."""
    scales: torch.Tensor
    """bfloat16; int8: [O]. int4: [I / group, O', 2], scales and zeros."""
    packing: Literal["rows", "kernel"] = "rows"

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    @cached_property
    def _few_rows(self) -> FewRows:
        from swarm.model.kernels.int8_rows import FewRows  # compiled: loaded where a CPU holds int8

        return FewRows(self.codes, self.scales)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """[O, I], a new tensor."""
        can, kernel = traits(self.codes.device), self.packing == "kernel"
        if self.scheme == "int8":
            if can.int8_widen.used:
                from swarm.model.kernels import widen

                return widen.int8(self.codes, self.scales, dtype)
            return int8.dequantize(self.codes, self.scales, dtype)
        if kernel and can.int4_widen.used:
            from swarm.model.kernels import widen

            return widen.int4(self.codes, self.scales, self.shape, dtype)
        codes = int4.unpack(self.codes, self.shape[1]) if kernel else int4.unpack_plain(self.codes)
        return int4.dequantize(codes[: self.shape[0]], self.scales, dtype)

    def product(self, input: torch.Tensor) -> torch.Tensor:
        """[..., I] to [..., O] in the input's dtype, without gradients. Equal inputs give equal bits."""
        input_MI = input.reshape(-1, self.shape[1]).contiguous()
        if not input_MI.shape[0]:
            return input.new_empty(*input.shape[:-1], self.shape[0])
        wide_OI = self.widened(len(input_MI), input.dtype)
        if wide_OI is not None:
            output_MO = functional.linear(input_MI, wide_OI)
        elif self.scheme == "int8":
            output_MO = self._int8(input_MI)
        else:
            output_MO = int4.native(input_MI, self.codes, self.scales)[:, : self.shape[0]]
        return output_MO.reshape(*input.shape[:-1], self.shape[0])

    def _int8(self, input_MI: torch.Tensor) -> torch.Tensor:
        can, rows = traits(self.codes.device), input_MI.shape[0]
        if input_MI.is_cuda and can.int8_native.used and rows <= _NATIVE_ROWS_CUDA["int8"]:
            way = int8.native
        elif not input_MI.is_cuda and rows <= _FEW_ROWS_CPU:
            return self._few_rows.product(input_MI.float()).to(input_MI.dtype)
        elif can.int8_digits.used and input_MI.dtype == torch.float32:
            way = int8.digits
        else:
            way = int8.pieces
        return way(input_MI, self.codes, self.scales)

    def widened(self, rows: int, dtype: torch.dtype) -> torch.Tensor | None:
        """The weight [O, I] that a product of so many rows multiplies by; None: it multiplies codes."""
        by_codes = self.scheme == "int8" or self.packing == "kernel"
        if by_codes and self.codes.is_cuda:
            few, can = rows <= _NATIVE_ROWS_CUDA[self.scheme], traits(self.codes.device)
            if self.scheme == "int8":
                by_codes = not can.int8_widen.used or (few and can.int8_native.used)
            else:
                by_codes = few
        return None if by_codes else self.dequantize(dtype)


def quantize_weight(weight_OI: torch.Tensor, scheme: Scheme) -> QuantizedWeight:
    """On the weight's own device. Raises UnsupportedModel for a shape the scheme cannot hold (`refusal`)
    and for weights that are not finite."""
    shape = (int(weight_OI.shape[0]), int(weight_OI.shape[1]))
    if reason := refusal(shape, scheme):
        raise UnsupportedModel(f"a weight of {shape[0]} x {shape[1]} cannot be kept as {scheme}: {reason}")
    with torch.no_grad():
        if scheme == "int8":
            codes, scales = int8.quantize(weight_OI)
        else:
            codes, scales = int4.quantize(weight_OI, GROUP)
        if not scales.isfinite().all():
            raise UnsupportedModel("a weight of the checkpoint is not finite", "get an undamaged checkpoint")
        if scheme == "int8":
            return QuantizedWeight("int8", shape, codes, scales)
        if not traits(weight_OI.device).int4_native.used:
            return QuantizedWeight("int4", shape, int4.pack_plain(codes), scales)
        missing = -shape[0] % int4.BLOCK_ROWS
        codes = functional.pad(codes, (0, 0, 0, missing))
        scales = functional.pad(scales, (0, 0, 0, missing))
        return QuantizedWeight("int4", shape, int4.pack(codes), scales, "kernel")


def refusal(shape: tuple[int, ...], scheme: Scheme) -> str:
    """Why a weight of this shape stays as it is; "" if it can be narrowed."""
    if scheme == "none":
        return "nothing is narrowed"
    if len(shape) != 2:
        return "not a matrix (fused experts)"
    if scheme == "int4" and shape[1] % GROUP:
        return f"its inputs do not fall into groups of {GROUP}"
    return ""


def weight_bytes(shape: tuple[int, ...], scheme: Scheme, dtype: torch.dtype) -> int:
    """What a weight of this shape takes, on any device; as `dtype` if the scheme refuses it."""
    count = 1
    for size in shape:
        count *= size
    if refusal(shape, scheme):
        return count * dtype.itemsize
    if scheme == "int8":
        return count + 2 * shape[0]
    rows = shape[0] + -shape[0] % int4.BLOCK_ROWS
    return rows * (shape[1] // 2 + 4 * (shape[1] // GROUP))


@dataclass(frozen=True)
class Plan:
    """Which weights of a model are narrowed, and why the others are not."""

    scheme: Scheme
    narrowed: tuple[str, ...]
    """Paths of linear layers."""
    kept: Mapping[str, str]
    """Parameter name to reason. Vectors (norms, biases) are not listed: they always stay."""

    def nbytes(self, model: nn.Module, dtype: torch.dtype) -> int:
        """All parameters of the model under this plan; it may be on meta."""
        narrowed = {f"{path}.weight" for path in self.narrowed}
        return sum(
            weight_bytes(tuple(parameter.shape), self.scheme if name in narrowed else "none", dtype)
            for name, parameter in model.named_parameters()
        )


def plan_of(model: nn.Module, scheme: Scheme) -> Plan:
    """Look at a model, which may be on meta. Plain linear layers are narrowed unless they are routers
    of experts (a wrong choice of expert costs more than their few bytes) or small."""
    narrowed, kept = [], {}
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or scheme == "none":
            continue
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        if type(owner) is not nn.Linear or leaf != "weight":
            kept[name] = f"part of a {type(owner).__name__}, not a linear layer"
        elif path.rpartition(".")[2] in _ROUTERS:
            kept[name] = "it chooses experts"
        elif parameter.numel() < _LEAST_WEIGHTS:
            kept[name] = "too small to matter"
        elif reason := refusal(tuple(parameter.shape), scheme):
            kept[name] = reason
        else:
            narrowed.append(path)
    return Plan(scheme, tuple(narrowed), kept)


class _Product(torch.autograd.Function):
    """y = x Wᵀ with a gradient for x only: the weight is widened again on the way back."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
        ctx.weight = weight
        return weight.product(input)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad_output @ ctx.weight.dequantize(grad_output.dtype), None


class QuantizedLinear(nn.Linear):
    """A linear layer over a shared `QuantizedWeight`. An `nn.Linear` to whoever asks (PEFT does), but with
    no parameter of its own: `to`, `state_dict` and optimizers pass over it; the bias is a frozen parameter."""

    def __init__(self, weight: QuantizedWeight, bias: torch.Tensor | None, compute_dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.quantized = weight
        self.compute_dtype = compute_dtype
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """Widened anew at each access, for those that must look at it (an initialization by SVD, a merge)."""
        return self.quantized.dequantize(self.compute_dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and input.requires_grad:
            output = cast(torch.Tensor, _Product.apply(input, self.quantized))  # type: ignore[no-untyped-call]
        else:
            output = self.quantized.product(input)
        return output if self.bias is None else output + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.quantized.scheme}"


def replace_linears(model: nn.Module, weights: Mapping[str, QuantizedWeight], compute_dtype: torch.dtype) -> None:
    """Put a `QuantizedLinear` in the place of each linear layer named, keeping its bias. Raises
    UnsupportedModel if a layer is not there or of another shape."""
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    for path, weight in weights.items():
        layer = layers.get(path)
        if layer is None or (layer.out_features, layer.in_features) != weight.shape:
            raise UnsupportedModel(f"the model has no linear layer {path} of {weight.shape[0]} x {weight.shape[1]}")
        owner, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(owner), leaf, QuantizedLinear(weight, layer.bias, compute_dtype))
