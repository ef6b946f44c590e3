"""A span of any decoder, run through `transformers`' own base model.

The base model is cut to the span (`swarm.model.blocks`) and called with hidden states in the place
of embeddings: what it does to embeddings before the first block is replaced by the hidden states
as they came, and what it does after the last block is left out, so that factors, norms and
projections of the head happen once, in the head (`swarm.model.head`).

The frozen tensors are kept once (`FrozenTensors`); every *view* is a set of modules that share
them, so a training view with adapters costs modules and adapters, never weights.
"""

from __future__ import annotations

import math
import sys
from typing import Any, cast

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from swarm.errors import OutOfMemory, UnsupportedModel
from swarm.ids import Span
from swarm.model.blocks import assign, skeleton_of, whole_of
from swarm.model.checkpoint import Checkpoint
from swarm.model.families import OWN_CACHES, Parts, cuts, n_blocks
from swarm.model.head import Head
from swarm.model.names import cook

__all__ = [
    "FrozenTensors",
    "Head",
    "Parts",
    "Shard",
    "View",
    "assign",
    "base_prefix",
    "block_bytes",
    "context_length",
    "cuts",
    "n_blocks",
    "skeleton_of",
]


def context_length(config: Any) -> int:
    """Tokens a session may hold; a family without a limit says so with a very large number."""
    return int(getattr(config, "max_position_embeddings", 0) or 2**31 - 1)


FrozenTensors = dict[str, torch.Tensor]
"""Frozen weights of a span by local name (`layers.0.self_attn.q_proj.weight`): parameters and saved buffers."""


class Shard:
    """A span's frozen weights on one device, and the views that run them."""

    def __init__(self, checkpoint: Checkpoint, span: Span, dtype: torch.dtype, device: torch.device) -> None:
        """Load only the span's tensors. Raises UnsupportedModel, SpanError, CorruptData, OutOfMemory."""
        self.checkpoint = checkpoint
        self.span = span
        self.dtype = dtype
        self.device = device
        self.parts = Parts.of(checkpoint.config)
        self.frozen = self._load()

    def _load(self) -> FrozenTensors:
        whole = whole_of(self.checkpoint, self.dtype)
        skeleton = skeleton_of(self.checkpoint, self.span, self.dtype)
        wanted = []
        for recipe in whole.recipes:
            block = whole.block_of(recipe.target)
            if block is not None and block in self.span:
                wanted.append(recipe)
        try:
            loaded = cook(self.checkpoint, whole.model, wanted, self.dtype, self.device)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(f"blocks {self.span} do not fit on {self.device}") from error
        layers, start = self.parts.layers + ".", len(whole.layers)
        frozen = {}
        for name, tensor in loaded.items():
            index, rest = name[start:].split(".", 1)
            frozen[f"{layers}{int(index) - self.span.start}.{rest}"] = tensor
        missing = [name for name, _ in skeleton.named_parameters() if name not in frozen]
        if missing:
            raise UnsupportedModel(
                f"the checkpoint {self.checkpoint.name} has nothing for '{missing[0]}' of {self.span}"
            )
        return frozen

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.frozen.values())

    def view(self, span: Span | None = None) -> View:
        """New modules over the shared tensors, for the whole span or a part of it. Raises SpanError."""
        span = span or self.span
        model = skeleton_of(self.checkpoint, span, self.dtype)
        layers, shift = self.parts.layers + ".", span.start - self.span.start
        tensors = {}
        for name, tensor in self.frozen.items():
            index, rest = name[len(layers) :].split(".", 1)
            if 0 <= int(index) - shift < len(span):
                tensors[f"{layers}{int(index) - shift}.{rest}"] = tensor
        assign(model, tensors)
        model.to(self.device)  # buffers such as rotary frequencies; the shared tensors are there already
        return View(model, span, self.parts, self.checkpoint.config)


class _Past:
    """What the base model asks a cache when the span's own layers cannot tell: spans of linear attention only."""

    past = 0
    """Tokens before the ones that are being computed."""
    layers: list[Any]

    def _knows(self, layer_idx: int) -> bool:
        layers = self.layers[layer_idx : layer_idx + 1] or self.layers[:1]
        return bool(layers) and isinstance(layers[0], CacheLayerMixin) and bool(layers[0].is_initialized)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(super().get_seq_length(layer_idx)) if self._knows(layer_idx) else self.past  # type: ignore[misc]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        if self._knows(layer_idx):
            return cast(tuple[int, int], super().get_mask_sizes(query_length, layer_idx))  # type: ignore[misc]
        return self.past + query_length, 0


class SpanCache(_Past, DynamicCache):  # type: ignore[misc]  # transformers has no types
    """The KV cache of a span's blocks: one layer a block (LongCat-Flash: two), in the order of the blocks."""


class View:
    """A runnable stack of blocks. Not thread-safe: the compute thread alone calls it."""

    def __init__(self, model: nn.Module, span: Span, parts: Parts, config: Any) -> None:
        self.model = model.eval().requires_grad_(False)
        self.span = span
        self.parts = parts
        self._config = config
        self._hidden_size = int(config.hidden_size)
        self._given: torch.Tensor | None = None
        self._taken: torch.Tensor | None = None
        blocks = cast(nn.ModuleList, model.get_submodule(parts.layers))
        blocks[0].register_forward_pre_hook(self._enter, with_kwargs=True)
        blocks[-1].register_forward_hook(self._leave)

    def new_cache(self) -> DynamicCache:
        """An empty KV cache for this view's blocks."""
        own = OWN_CACHES.get(self._config.model_type)
        if own is not None:
            module = sys.modules[type(self.model).__module__]
            return type(own, (_Past, getattr(module, own)), {})()
        layers = DynamicCache(config=self._config).layers
        each = len(layers) // n_blocks(self._config)
        cache = SpanCache()
        cache.layers = layers[self.span.start * each : self.span.end * each]
        cache.layer_class_to_replicate = None
        return cache

    def forward(
        self,
        hidden_BTD: torch.Tensor,
        position: int = 0,
        cache: Any = None,
        *,
        mask_BS: torch.Tensor | None = None,
        positions_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the blocks: hidden states [B, T, width] in and out.

        position: cached columns before these, the same for every row. mask_BS: [B, position + T], 0 on
        padding columns, or None if there are none to the left (padding to the right needs no
        mask: nothing real attends to what follows it); with four dimensions it is taken as it is.
        positions_BT: position ids, else position, position + 1, …
        """
        if positions_BT is None:
            time = hidden_BTD.shape[1]
            positions_BT = torch.arange(position, position + time, device=hidden_BTD.device).unsqueeze(0)
        if isinstance(cache, _Past):
            cache.past = position
        self._given = hidden_BTD
        try:
            self.model(
                inputs_embeds=hidden_BTD[..., : self._hidden_size],
                attention_mask=mask_BS,
                position_ids=positions_BT,
                past_key_values=cache,
                use_cache=cache is not None,
            )
            return cast(torch.Tensor, self._taken).flatten(2)
        finally:
            self._given = self._taken = None

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the first block: the hidden states as they came, whatever the base model made of them."""
        if self._given is None:
            return None
        if args:
            return (self._given.reshape(args[0].shape), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._given.reshape(kwargs["hidden_states"].shape)}

    def _leave(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        if self._given is not None:
            self._taken = output if isinstance(output, torch.Tensor) else output[0]


def base_prefix(checkpoint: Checkpoint) -> str:
    """What the whole model's names carry before the base model's own: `model.`. Raises UnsupportedModel."""
    return f"{whole_of(checkpoint, torch.float32).model.base_model_prefix}."


def block_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> list[int]:
    """Bytes of each block at a dtype, from the tensor table alone. Raises UnsupportedModel."""
    whole = whole_of(checkpoint, dtype)
    sizes = [0] * n_blocks(checkpoint.config)
    for recipe in whole.recipes:
        block = whole.block_of(recipe.target)
        if block is not None:
            entries = (checkpoint.tensors[name] for name, _ in recipe.sources)
            sizes[block] += sum(math.prod(entry.shape) for entry in entries) * dtype.itemsize
    return sizes
