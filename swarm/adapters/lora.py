"""LoRA (Hu et al., 2021): W + scale B A on linear layers of the blocks; scale is alpha / r in jobs.

Keys are "<block>/<path of the linear within its block>.lora_A" and ".lora_B"; A is [r, in], B is
[out, r], both float32. A starts uniform in ±1/sqrt(in) as in PEFT (Kaiming with a = sqrt 5), drawn from
a counter-based generator keyed by (seed, key), so every node and the coordinator draw the same
numbers; B starts at zero, so the adapted model starts equal to the base model.

Training injects PEFT's modules into a view of its own (`attach`) and sums their products in place
(`swarm.adapters.fused`); serving adds `LoraPart`s to a view that others share (`parts`), in PEFT's order of operations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import numpy as np
import peft
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from swarm.adapters.fused import fuse
from swarm.config import LoraMethod
from swarm.errors import UnsupportedModel
from swarm.ids import Span, param_key, seed_from

_ADAPTER = "default"
_LEAVES = ("lora_A", "lora_B")
_NOT_PLAIN = ("Router", "GroupedLinear")
"""Subclasses of linear layers in `transformers` that return several tensors or cut their input in groups."""
_BLOCK = re.compile(r"0|[1-9][0-9]{0,5}")


@dataclass(frozen=True)
class LoraAdapter:
    """A LoRA adapter as it was found, whatever made it: ranks are in the tensors' shapes."""

    scales: Mapping[str, float]
    """By linear, "<block>/<path>": what its B A is multiplied with."""


def features(module: nn.Module) -> tuple[int, int] | None:
    """In and out features of a linear layer, quantized ones and GPT-2's `Conv1D` included; None for another module."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    weight = module._parameters.get("weight")  # as an attribute, a quantized layer would widen its weight
    stacked = weight is not None and weight.ndim > 2
    if stacked or isinstance(module, nn.Bilinear) or type(module).__name__.endswith(_NOT_PLAIN):
        return None
    into, out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return (into, out) if isinstance(into, int) and isinstance(out, int) else None


def linears(blocks: nn.ModuleList, span: Span) -> dict[str, tuple[int, int]]:
    """Every linear layer of these blocks, "<block>/<path>", with its in and out features."""
    found = {}
    for index, block in enumerate(blocks):
        for name, module in block.named_modules():
            if (shape := features(module)) is not None:
                found[param_key(index + span.start, name)] = shape
    return found


def target_names(blocks: nn.ModuleList, method: LoraMethod) -> tuple[str, ...]:
    """Leaf names of the linear layers that are adapted. Raises UnsupportedModel for a name no block has."""
    known = {name.rpartition(".")[2] for name, m in blocks.named_modules() if features(m) is not None}
    if method.targets == "all-linear":
        return tuple(sorted(known))
    unknown = sorted(set(method.targets) - known)
    if unknown:
        raise UnsupportedModel(
            f"method.targets: the model's blocks have no linear layer {', '.join(unknown)}",
            f"choose from {', '.join(sorted(known))}",
        )
    return tuple(sorted(method.targets))


def peft_config(method: LoraMethod, blocks: nn.ModuleList) -> Any:
    targets = target_names(blocks, method)
    transposed = [isinstance(m, Conv1D) for n, m in blocks.named_modules() if n.rpartition(".")[2] in targets]
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=method.r,
        lora_alpha=method.alpha,
        lora_dropout=0.0,
        target_modules=list(targets),
        bias="none",
        init_lora_weights=False,
        fan_in_fan_out=all(transposed),
    )


def shapes(blocks: nn.ModuleList, span: Span, method: LoraMethod) -> dict[str, tuple[int, ...]]:
    """Key and shape of every trainable tensor of these blocks (which may be on meta)."""
    targets = set(target_names(blocks, method))
    found: dict[str, tuple[int, ...]] = {}
    for site, (into, out) in linears(blocks, span).items():
        if site.rpartition("/")[2].rpartition(".")[2] in targets:
            found[f"{site}.lora_A"] = (method.r, into)
            found[f"{site}.lora_B"] = (out, method.r)
    return found


def initial(key: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """The tensor that training starts from, the same bits on every machine."""
    if key.endswith(".lora_B"):
        return np.zeros(shape, dtype=np.float32)
    generator = np.random.Philox(key=seed_from("lora", seed, key))
    # 24 random bits make every float32 in [0, 1) of that grid exactly; numpy's own uniform
    # stream may change between releases.
    draws = generator.random_raw(int(np.prod(shape))) >> np.uint64(40)
    unit = draws.astype(np.float32) * np.float32(2.0**-24)
    bound = np.float32(1.0 / np.sqrt(shape[1]))
    return ((unit * np.float32(2.0) - np.float32(1.0)) * bound).reshape(shape)


def attach(
    model: nn.Module, layers: str, span: Span, method: LoraMethod, between: Callable[[], None] = lambda: None
) -> dict[str, nn.Parameter]:
    """Inject LoRA into a view's base model; returns its float32 parameters by key, values unset. `between`: as
    `swarm.adapters.fused.fuse` has it."""
    blocks = cast(nn.ModuleList, model.get_submodule(layers))
    # Into the blocks, not the model: PEFT would take names of linear layers for experts' stacked weights in families
    # whose experts once were linear layers of those names.
    peft.inject_adapter_in_model(peft_config(method, blocks), blocks, adapter_name=_ADAPTER)
    found: dict[str, nn.Parameter] = {}
    marks = {f".lora_A.{_ADAPTER}.weight": ".lora_A", f".lora_B.{_ADAPTER}.weight": ".lora_B"}
    for name, parameter in blocks.named_parameters():
        for mark, short in marks.items():
            if name.endswith(mark):
                index, rest = name[: -len(mark)].split(".", 1)
                parameter.data = parameter.data.to(torch.float32)
                found[param_key(int(index) + span.start, rest + short)] = parameter
    fuse(blocks, _ADAPTER, between)
    return found


def peft_name(key: str, base: str) -> str:
    """The name PEFT gives this tensor in `adapter_model.safetensors`; `base` is "model.layers." or alike."""
    block, tensor = key.split("/", 1)
    return f"base_model.model.{base}{block}.{tensor}.weight"


def key_of(peft_tensor: str, bases: Collection[str]) -> str:
    """The inverse of `peft_name`, for any of several bases. Raises UnsupportedModel for a tensor outside the blocks."""
    for base in bases:
        start = f"base_model.model.{base}"
        if peft_tensor.startswith(start) and peft_tensor.endswith(".weight"):
            block, _, rest = peft_tensor.removesuffix(".weight")[len(start) :].partition(".")
            if _BLOCK.fullmatch(block) and rest.rpartition(".")[2] in _LEAVES:
                return param_key(int(block), rest)
    raise UnsupportedModel(
        f"the adapter has a tensor that is no LoRA tensor of the model's blocks: {peft_tensor[:128]}"
    )


@dataclass(frozen=True, eq=False)
class LoraPart:
    """One adapter at one linear layer, in float32."""

    a_RI: torch.Tensor
    b_OR: torch.Tensor
    scale: float

    @property
    def nbytes(self) -> int:
        return self.a_RI.nbytes + self.b_OR.nbytes

    def check(self, site: str, module: nn.Module) -> None:
        """Raises UnsupportedModel if `module` is no linear layer of these features."""
        if features(module) != (self.a_RI.shape[1], self.b_OR.shape[0]):
            raise UnsupportedModel(f"the adapter's tensors do not fit this model's {site}")

    @classmethod
    def kernel(cls, parts: Sequence[LoraPart | None]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        first = parts[0]
        if first is not None and all(part is first for part in parts):
            return first.add
        return _Mixed(parts).add

    def add(self, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """PEFT's own operations in PEFT's order, so that results are the same bits."""
        x = x.to(self.a_RI.dtype)
        return (result + functional.linear(functional.linear(x, self.a_RI), self.b_OR) * self.scale).to(result.dtype)


@dataclass(frozen=True, eq=False)
class _SameRank:
    """Rows whose adapters have one rank: their tensors can be stacked."""

    rows: torch.Tensor | None
    """Which rows; None: all, in order."""
    a: list[torch.Tensor]
    b: list[torch.Tensor]
    scale_N11: torch.Tensor


class _Mixed:
    """Rows of different adapters at one linear layer.

    Tensors are gathered anew in each pass: a kept copy would double the memory of every adapter, and
    one matmul per adapter was slower at 8 rows (72 against 64 ms a step of SmolLM2's size on one core).
    """

    def __init__(self, parts: Sequence[LoraPart | None]) -> None:
        self._batch = len(parts)
        present = [(row, part) for row, part in enumerate(parts) if part is not None]
        device = present[0][1].a_RI.device
        self._groups = []
        by_rank = sorted(present, key=lambda item: len(item[1].a_RI))
        for _, members in groupby(by_rank, key=lambda item: len(item[1].a_RI)):
            rows, group = zip(*members, strict=True)
            self._groups.append(
                _SameRank(
                    torch.tensor(rows, device=device) if len(rows) < self._batch else None,
                    [part.a_RI for part in group],
                    [part.b_OR for part in group],
                    torch.tensor([part.scale for part in group], device=device).view(-1, 1, 1),
                )
            )

    def add(self, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """`x` is [B, …, I], or [B * T, I] where a family flattens its tokens."""
        if len(x) != self._batch and (x.ndim != 2 or len(x) % self._batch):
            raise UnsupportedModel("a linear layer of this model regroups its rows: adapters cannot share a batch")
        x_BTI = x.reshape(self._batch, -1, x.shape[-1])
        summed_BTO = result.reshape(self._batch, -1, result.shape[-1])
        for group in self._groups:
            x_NTI = x_BTI if group.rows is None else x_BTI.index_select(0, group.rows)
            a_NRI, b_NOR = torch.stack(group.a), torch.stack(group.b)
            inner_NTR = torch.bmm(x_NTI.to(a_NRI.dtype), a_NRI.transpose(1, 2))
            delta_NTO = torch.bmm(inner_NTR, b_NOR.transpose(1, 2)) * group.scale_N11
            if group.rows is None:
                summed_BTO = summed_BTO + delta_NTO
            else:
                summed_BTO = summed_BTO.to(delta_NTO.dtype).index_add(0, group.rows, delta_NTO)
        return summed_BTO.to(result.dtype).view(result.shape)


def parts(
    method: LoraMethod | LoraAdapter, values: Mapping[str, NDArray[np.float32]], device: torch.device
) -> dict[str, LoraPart]:
    """An adapter's tensors by linear, on the device. Raises UnsupportedModel for half a pair or ranks that differ."""
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    # Serving computes in inference mode; what is kept must also be of use to autograd.
    with torch.inference_mode(False):
        for key, value in values.items():
            site, _, leaf = key.rpartition(".")
            copied = torch.tensor(np.ascontiguousarray(value), dtype=torch.float32, device=device)
            tensors.setdefault(site, {})[leaf] = copied
    found = {}
    for site, pair in tensors.items():
        a, b = pair.get("lora_A"), pair.get("lora_B")
        if len(pair) != 2 or a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise UnsupportedModel(f"the adapter's tensors for {site} are not a pair A [r, in], B [out, r]")
        scale = method.alpha / method.r if isinstance(method, LoraMethod) else method.scales[site]
        found[site] = LoraPart(a, b, scale)
    return found
