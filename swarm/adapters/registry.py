"""The adapters a base model can take: parameter layout, start values, modules and files.

`ModelAdapters` is what the coordinator, nodes and clients ask; it reads the checkpoint's
configuration only. Methods differ in one file each; what they share (keys, hashes, PEFT's
on-disk format) is here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors
from torch import nn

from swarm.adapters import lora
from swarm.config import LoraMethod
from swarm.errors import CodecError, UnsupportedModel
from swarm.ids import Span, block_of, key_order
from swarm.model.checkpoint import Checkpoint
from swarm.model.shard import Parts, View, base_prefix, n_blocks, skeleton_of

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_ADAPTER_BYTES = 4 * 1024**3

Parameters = dict[str, NDArray[np.float32]]


class ModelAdapters:
    """Adapters of one base model."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._parts = Parts.of(checkpoint.config)
        self._all = Span(0, n_blocks(checkpoint.config))
        self._shapes: dict[LoraMethod, dict[str, tuple[int, ...]]] = {}
        self._base = f"{base_prefix(checkpoint)}{self._parts.layers}."

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

    def attach(self, view: View, method: LoraMethod) -> dict[str, nn.Parameter]:
        """Inject the method's modules into a view; its float32 parameters by key, to be set by `set_values`."""
        return lora.attach(view.model, self._parts.layers, view.span, method)

    def export(
        self, method: LoraMethod, params: Mapping[str, NDArray[np.float32]], model_name: str
    ) -> dict[str, bytes]:
        """PEFT's files, by name, for parameters of the whole model."""
        config = lora.peft_config(method, lora.target_names(self._blocks(), method))
        config.base_model_name_or_path = model_name
        config.inference_mode = True
        settings = config.to_dict()
        settings["target_modules"] = sorted(settings["target_modules"])
        weights = {lora.peft_name(key, self._base): np.ascontiguousarray(params[key]) for key in self.shapes(method)}
        return {
            CONFIG_FILE: json.dumps(settings, indent=2, sort_keys=True, default=str).encode(),
            WEIGHTS_FILE: save_safetensors(weights, metadata={"format": "pt"}),
        }

    def load(self, files: Mapping[str, bytes], span: Span) -> tuple[LoraMethod, Parameters]:
        """Read PEFT's files and keep the span's part.

        Raises CodecError (files that do not parse) and UnsupportedModel (an adapter of another
        method, or for another model).
        """
        method = _read_config(files[CONFIG_FILE])
        try:
            tensors = load_safetensors(files[WEIGHTS_FILE])
        except SafetensorError as error:
            raise CodecError("the adapter's weights are not a safetensors file") from error
        found = {lora.key_of(name, self._base): array for name, array in tensors.items()}
        expected = self.shapes(method)
        if {key: array.shape for key, array in found.items()} != expected:
            raise UnsupportedModel("the adapter's tensors do not fit this model")
        wanted = self.span_shapes(method, span)
        return method, {key: found[key].astype(np.float32) for key in wanted}

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


def _read_config(data: bytes) -> LoraMethod:
    try:
        raw = json.loads(data)
        if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
            raise UnsupportedModel("the adapter is not a LoRA adapter")
        special = [name for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern") if raw.get(name)]
        if special:
            raise UnsupportedModel(f"the adapter uses {', '.join(special)}, which is not served yet")
        return LoraMethod(r=raw["r"], alpha=raw["lora_alpha"], targets=tuple(raw["target_modules"]))
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise CodecError("the adapter's configuration does not parse") from error
