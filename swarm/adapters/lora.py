"""LoRA (Hu et al., 2021): W + (alpha / r) B A on linear layers of the blocks.

Keys are "<block>/<path of the linear within its block>.lora_A" and ".lora_B"; A is [r, in], B is
[out, r], both float32. A starts uniform in ±1/sqrt(in) as in PEFT (Kaiming with a = sqrt 5), drawn from
a counter-based generator keyed by (seed, key), so every node and the coordinator draw the same
numbers; B starts at zero, so the adapted model starts equal to the base model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import peft
import torch
from numpy.typing import NDArray
from torch import nn

from swarm.config import LoraMethod
from swarm.errors import UnsupportedModel
from swarm.ids import Span, param_key, seed_from

_ADAPTER = "default"


def target_names(blocks: nn.ModuleList, method: LoraMethod) -> tuple[str, ...]:
    """Leaf names of the linear layers that are adapted. Raises UnsupportedModel for a name no block has."""
    linears = {name.rpartition(".")[2] for name, m in blocks.named_modules() if isinstance(m, nn.Linear)}
    if method.targets == "all-linear":
        return tuple(sorted(linears))
    unknown = sorted(set(method.targets) - linears)
    if unknown:
        raise UnsupportedModel(
            f"method.targets: the model's blocks have no linear layer {', '.join(unknown)}",
            f"choose from {', '.join(sorted(linears))}",
        )
    return tuple(sorted(method.targets))


def peft_config(method: LoraMethod, targets: tuple[str, ...]) -> Any:
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=method.r,
        lora_alpha=method.alpha,
        lora_dropout=0.0,
        target_modules=list(targets),
        bias="none",
        init_lora_weights=False,
    )


def shapes(blocks: nn.ModuleList, span: Span, method: LoraMethod) -> dict[str, tuple[int, ...]]:
    """Key and shape of every trainable tensor of these blocks (which may be on meta)."""
    targets = set(target_names(blocks, method))
    found: dict[str, tuple[int, ...]] = {}
    for index, block in enumerate(blocks):
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets:
                found[param_key(index + span.start, f"{name}.lora_A")] = (method.r, module.in_features)
                found[param_key(index + span.start, f"{name}.lora_B")] = (module.out_features, method.r)
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


def attach(model: nn.Module, layers: str, span: Span, method: LoraMethod) -> dict[str, nn.Parameter]:
    """Inject LoRA into a view's base model; returns its float32 parameters by key, values unset."""
    targets = target_names(model.get_submodule(layers), method)  # type: ignore[arg-type]
    peft.inject_adapter_in_model(peft_config(method, targets), model, adapter_name=_ADAPTER)
    found: dict[str, nn.Parameter] = {}
    marks = {f".lora_A.{_ADAPTER}.weight": ".lora_A", f".lora_B.{_ADAPTER}.weight": ".lora_B"}
    for name, parameter in model.named_parameters():
        for mark, short in marks.items():
            if name.endswith(mark):
                index, rest = name[len(layers) + 1 : -len(mark)].split(".", 1)
                parameter.data = parameter.data.to(torch.float32)
                found[param_key(int(index) + span.start, rest + short)] = parameter
    return found


def peft_name(key: str, base: str) -> str:
    """The name PEFT gives this tensor in `adapter_model.safetensors`; `base` is "model.layers." or alike."""
    block, tensor = key.split("/", 1)
    return f"base_model.model.{base}{block}.{tensor}.weight"


def key_of(peft_tensor: str, base: str) -> str:
    """The inverse of `peft_name`. Raises UnsupportedModel for a tensor outside the blocks."""
    start, end = f"base_model.model.{base}", ".weight"
    block, _, rest = peft_tensor[len(start) : -len(end)].partition(".")
    if not (peft_tensor.startswith(start) and peft_tensor.endswith(end) and block.isdecimal() and rest):
        raise UnsupportedModel(f"the adapter has a tensor outside the model's blocks: {peft_tensor[:128]}")
    return param_key(block, rest)
