"""A span of any decoder, run through `transformers`' own base model.

The model is built with its parameters on the meta device, all blocks but the span's are dropped,
embedding and final norm are taken out, and the rest is called with hidden states as
`inputs_embeds`. Blocks are built by their global index, so that what depends on depth stays
right, and only the cache index is renumbered. `config.base_model_pp_plan` names the parts.

The frozen tensors are kept once (`FrozenTensors`); every *view* is a set of modules that share
them, so a training view with adapters costs modules and adapters, never weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache

from swarm.errors import OutOfMemory, UnsupportedModel
from swarm.ids import Span
from swarm.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class Parts:
    """Names of a base model's parts within it."""

    embed: str
    layers: str
    norm: str

    @classmethod
    def of(cls, config: Any) -> Parts:
        """Read the family's pipeline plan. Raises UnsupportedModel."""
        plan = list(getattr(config, "base_model_pp_plan", None) or ())
        # Some families put a dropout between embedding and blocks; it has no weights and stays where it is.
        if len(plan) < 3 or plan[-2] != "layers":
            raise UnsupportedModel(f"model type '{config.model_type}' publishes no pipeline plan this version knows")
        return cls(plan[0], plan[-2], plan[-1])


def n_blocks(config: Any) -> int:
    return int(config.num_hidden_layers)


def context_length(config: Any) -> int:
    """Tokens a session may hold; a family without a limit says so with a very large number."""
    return int(getattr(config, "max_position_embeddings", 0) or 2**31 - 1)


FrozenTensors = dict[str, torch.Tensor]
"""Frozen weights of a span by local parameter name (`layers.0.self_attn.q_proj.weight`)."""


class Shard:
    """A span's frozen weights on one device, and the views that run them."""

    def __init__(self, checkpoint: Checkpoint, span: Span, dtype: torch.dtype, device: torch.device) -> None:
        """Load only the span's tensors. Raises UnsupportedModel, CorruptData, OutOfMemory."""
        self.checkpoint = checkpoint
        self.span = span
        self.dtype = dtype
        self.device = device
        self.parts = Parts.of(checkpoint.config)
        skeleton = skeleton_of(checkpoint, span, dtype)
        self.frozen = self._load(skeleton)

    def _load(self, skeleton: nn.Module) -> FrozenTensors:
        prefix = base_prefix(self.checkpoint)
        layers = self.parts.layers + "."
        names = {}
        for local, _ in skeleton.named_parameters():
            if not local.startswith(layers):
                raise UnsupportedModel(
                    f"model type '{self.checkpoint.config.model_type}' has a parameter outside its blocks: {local}"
                )
            index, rest = local[len(layers) :].split(".", 1)
            names[local] = f"{prefix}{layers}{int(index) + self.span.start}.{rest}"
        try:
            loaded = self.checkpoint.load(names.values(), self.dtype, self.device)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(f"blocks {self.span} do not fit on {self.device}") from error
        return {local: loaded[name] for local, name in names.items()}

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.frozen.values())

    def view(self, span: Span | None = None) -> View:
        """New modules over the shared tensors, for the whole span or a part of it."""
        span = span or self.span
        model = skeleton_of(self.checkpoint, span, self.dtype)
        layers, shift = self.parts.layers + ".", span.start - self.span.start
        tensors = {}
        for local, _ in model.named_parameters():
            index, rest = local[len(layers) :].split(".", 1)
            tensors[local] = self.frozen[f"{layers}{int(index) + shift}.{rest}"]
        assign(model, tensors)
        model.to(self.device)  # buffers such as rotary frequencies; the shared tensors are there already
        return View(model, span, self.parts)


class View:
    """A runnable stack of blocks. Not thread-safe: the compute thread alone calls it."""

    def __init__(self, model: nn.Module, span: Span, parts: Parts) -> None:
        self.model = model.eval()
        self.span = span
        self.parts = parts

    def new_cache(self) -> DynamicCache:
        """An empty KV cache for this view's blocks."""
        return DynamicCache(config=self.model.config)

    def forward(self, hidden_BTD: torch.Tensor, position: int = 0, cache: DynamicCache | None = None) -> torch.Tensor:
        """Run the blocks. `position`: tokens before these in every row. Rows are right-padded: a
        causal mask is all that real tokens need, padding only ever follows them."""
        time = hidden_BTD.shape[1]
        positions_1T = torch.arange(position, position + time, device=hidden_BTD.device).unsqueeze(0)
        output = self.model(
            inputs_embeds=hidden_BTD,
            position_ids=positions_1T,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return cast(torch.Tensor, output.last_hidden_state)


def skeleton_of(checkpoint: Checkpoint, span: Span, dtype: torch.dtype) -> nn.Module:
    """The base model cut to a span: parameters on meta, buffers real."""
    config = copy.deepcopy(checkpoint.config)
    parts = Parts.of(config)
    total = n_blocks(config)
    with init_empty_weights(include_buffers=False):
        model = AutoModel.from_config(config, dtype=dtype)
    layers = getattr(model, parts.layers)
    kept = nn.ModuleList(layers[i] for i in range(span.start, span.end))
    for module in kept.modules():
        if hasattr(module, "layer_idx"):
            cast(Any, module).layer_idx -= span.start
    setattr(model, parts.layers, kept)
    setattr(model, parts.embed, None)
    setattr(model, parts.norm, nn.Identity())
    # Masks and caches are made from per-layer lists such as `layer_types`.
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == total:
            setattr(config, name, value[span.start : span.end])
    config.num_hidden_layers = len(span)
    model.config = config
    return cast(nn.Module, model.requires_grad_(False))


def assign(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put tensors in the place of a module's meta parameters, sharing their storage."""
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))


def base_prefix(checkpoint: Checkpoint) -> str:
    """What checkpoint names carry before the base model's own names: `model.`, or nothing."""
    layers = Parts.of(checkpoint.config).layers + "."
    for name in checkpoint.tensors:
        at = name.find(layers)
        if at == 0 or (at > 0 and name[at - 1] == "."):
            return name[:at]
    raise UnsupportedModel(f"the checkpoint {checkpoint.name} has no tensor of a block '{layers}0'")


class Head:
    """Token embedding, final norm and LM head: what a client or a pipeline's lead holds."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        """Raises UnsupportedModel, CorruptData, OutOfMemory."""
        self.dtype = dtype
        self.device = device
        parts = Parts.of(checkpoint.config)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(checkpoint.config), dtype=dtype)
        prefix = base_prefix(checkpoint)
        embed = model.get_input_embeddings()
        norm = getattr(model.base_model, parts.norm)
        lm_head = model.get_output_embeddings()
        tied = bool(checkpoint.config.tie_word_embeddings)
        modules = {f"{prefix}{parts.embed}": embed, f"{prefix}{parts.norm}": norm}
        if not tied:
            modules[_lm_head_name(checkpoint, prefix)] = lm_head
        names = [f"{path}.{leaf}" for path, module in modules.items() for leaf, _ in module.named_parameters()]
        try:
            loaded = checkpoint.load(names, dtype, device)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(f"the embedding and LM head do not fit on {device}") from error
        for path, module in modules.items():
            assign(module, {leaf: loaded[f"{path}.{leaf}"] for leaf, _ in list(module.named_parameters())})
        if tied:
            lm_head.weight = embed.weight
        self._embed = embed.requires_grad_(False)
        self._norm = norm.requires_grad_(False).to(device)
        self._lm_head = lm_head

    def embed(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Token ids [B, T] to hidden states [B, T, D]."""
        return cast(torch.Tensor, self._embed(ids_BT.to(self.device)))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., D] after the last block to logits [..., V]."""
        return cast(torch.Tensor, self._lm_head(self._norm(hidden)))


def _lm_head_name(checkpoint: Checkpoint, prefix: str) -> str:
    """Where a checkpoint keeps its LM head: `lm_head` in most families, `embed_out` in GPT-NeoX."""
    if "lm_head.weight" in checkpoint.tensors:
        return "lm_head"
    shape = (checkpoint.config.vocab_size, checkpoint.config.hidden_size)
    found = [
        name.removesuffix(".weight")
        for name, entry in checkpoint.tensors.items()
        if not name.startswith(prefix) and name.endswith(".weight") and entry.shape == shape
    ]
    if len(found) != 1:
        raise UnsupportedModel(f"cannot tell which tensor of {checkpoint.name} is the LM head")
    return found[0]
