"""The adapters a base model can take: parameter layout, start values, modules and files.

`ModelAdapters` is what the coordinator, nodes and clients ask; it reads the checkpoint's
configuration only. Methods differ in one file each; what they share (keys, hashes, PEFT's
on-disk format) is here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save as save_safetensors
from torch import nn

from swarm.adapters import lora
from swarm.adapters.peft_files import CONFIG_FILE, MAX_ADAPTER_BYTES, WEIGHTS_FILE, read_adapter, read_lora, targets
from swarm.config import LoraMethod
from swarm.ids import Span, block_of, key_order
from swarm.model.checkpoint import Checkpoint
from swarm.model.shard import Parts, View, base_prefix, n_blocks, skeleton_of

__all__ = [
    "CONFIG_FILE",
    "MAX_ADAPTER_BYTES",
    "WEIGHTS_FILE",
    "ModelAdapters",
    "Parameters",
    "get_values",
    "read_adapter",
    "set_values",
]

Parameters = dict[str, NDArray[np.float32]]


class ModelAdapters:
    """Adapters of one base model."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._parts = Parts.of(checkpoint.config)
        self._all = Span(0, n_blocks(checkpoint.config))
        self._shapes: dict[LoraMethod, dict[str, tuple[int, ...]]] = {}
        self._base = f"{base_prefix(checkpoint)}{self._parts.layers}."
        self._linears: frozenset[str] | None = None

    def shapes(self, method: LoraMethod) -> dict[str, tuple[int, ...]]:
        """Key and shape of every trainable tensor of the whole model. Raises UnsupportedModel."""
        if method not in self._shapes:
            found = lora.shapes(self._blocks(), self._all, method)
            self._shapes[method] = {key: found[key] for key in sorted(found, key=key_order)}
        return dict(self._shapes[method])

    def span_shapes(self, method: LoraMethod, span: Span) -> dict[str, tuple[int, ...]]:
        """The part of `shapes` that the blocks of a span own."""
        return {key: shape for key, shape in self.shapes(method).items() if int(block_of(key)) in span}

    def initial(self, method: LoraMethod, seed: int) -> Parameters:
        """Start values of every trainable tensor: a function of (method, seed) only."""
        return self.initial_span(method, seed, self._all)

    def initial_span(self, method: LoraMethod, seed: int, span: Span) -> Parameters:
        return {key: lora.initial(key, shape, seed) for key, shape in self.span_shapes(method, span).items()}

    def attach(
        self, view: View, method: LoraMethod, between: Callable[[], None] = lambda: None
    ) -> dict[str, nn.Parameter]:
        """Inject the method's modules into a view; its float32 parameters by key, to be set by `set_values`.
        `between` is called within their longest products, forward and backward."""
        return lora.attach(view.model, self._parts.layers, view.span, method, between)

    def export(
        self, method: LoraMethod, params: Mapping[str, NDArray[np.float32]], model_name: str
    ) -> dict[str, bytes]:
        """PEFT's files, by name, for parameters of the whole model."""
        config = lora.peft_config(method, self._blocks())
        config.base_model_name_or_path = model_name
        config.inference_mode = True
        shapes = self.shapes(method)
        linears = {key.partition("/")[2].rpartition(".")[0] for key in shapes}
        settings = config.to_dict() | targets(linears, self._checkpoint.config)
        weights = {lora.peft_name(key, self._base): np.ascontiguousarray(params[key]) for key in shapes}
        return {
            CONFIG_FILE: json.dumps(settings, indent=2, sort_keys=True, default=str).encode(),
            WEIGHTS_FILE: save_safetensors(weights, metadata={"format": "pt"}),
        }

    def load(self, files: Mapping[str, bytes], span: Span) -> tuple[lora.LoraAdapter, Parameters]:
        """Read a LoRA adapter in PEFT's format and keep the span's part: what `AdapterBank.add` takes.

        The part is empty if the adapter leaves these blocks alone. Raises CodecError (files that do not
        parse, values that are no numbers) and UnsupportedModel (another method, a setting that cannot be
        served, or an adapter for another model).
        """
        if self._linears is None:
            self._linears = frozenset(lora.linears(self._blocks(), self._all))
        # Trained on the base model alone, an adapter's names lack the prefix of the whole model.
        bases = (self._base, f"{self._parts.layers}.")
        scales, tensors = read_lora(files, self._linears, self._base, lambda name: lora.key_of(name, bases), span)
        ordered = sorted(tensors, key=key_order)
        return lora.LoraAdapter(scales), {key: tensors[key].numpy() for key in ordered}

    def _blocks(self) -> Any:
        # On meta: costs modules, not memory.
        return skeleton_of(self._checkpoint, self._all, torch.float32).get_submodule(self._parts.layers)


def set_values(parameters: Mapping[str, nn.Parameter], values: Mapping[str, NDArray[np.float32]]) -> None:
    """Copy values into attached parameters, in place."""
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(values[key]))


def get_values(parameters: Mapping[str, nn.Parameter]) -> Parameters:
    """Copies of attached parameters as float32 arrays on the CPU."""
    return {key: p.detach().to("cpu", torch.float32).numpy().copy() for key, p in parameters.items()}
