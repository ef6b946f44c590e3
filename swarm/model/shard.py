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
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar, cast

import structlog
import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from swarm.errors import OutOfMemory, UnsupportedModel
from swarm.ids import Span
from swarm.model.arena import Arena
from swarm.model.blocks import assign, skeleton_of, whole_of
from swarm.model.checkpoint import Checkpoint
from swarm.model.families import OWN_CACHES, Parts, cuts, n_blocks
from swarm.model.few_rows import try_few_rows, use_few_rows
from swarm.model.head import Head
from swarm.model.names import cook
from swarm.model.norms import use_norm_rows
from swarm.model.quantize import QuantizedWeight, Scheme, plan_of, quantize_weight, replace_linears

T = TypeVar("T")
log = structlog.get_logger()

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
    "head_blocks",
    "head_bytes",
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

    def __init__(
        self,
        checkpoint: Checkpoint,
        span: Span,
        dtype: torch.dtype,
        device: torch.device,
        scheme: Scheme = "none",
    ) -> None:
        """Load only the span's tensors; `scheme`: how linear layers are held.

        Raises UnsupportedModel, SpanError, CorruptData, OutOfMemory.
        """
        self.checkpoint = checkpoint
        self.span = span
        self.dtype = dtype
        self.device = device
        self.scheme = scheme
        self.parts = Parts.of(checkpoint.config)
        self.narrow: dict[str, QuantizedWeight] = {}
        """Quantized weights by the local path of their linear layer; they are not in `frozen`."""
        self._few_rows = False
        self.frozen = self._load()
        self._few_rows = scheme == "none" and self._try_few_rows()

    def _load(self) -> FrozenTensors:
        whole = whole_of(self.checkpoint, self.dtype)
        skeleton = skeleton_of(self.checkpoint, self.span, self.dtype)
        wanted = []
        for recipe in whole.recipes:
            block = whole.block_of(recipe.target)
            if block is not None and block in self.span:
                wanted.append(recipe)
        # All at once: how a source gets a file depends on how much of it is needed.
        self.checkpoint.source.ensure({name for recipe in wanted for name, _ in recipe.sources})
        layers, start = self.parts.layers + ".", len(whole.layers)
        narrowed = set(plan_of(skeleton, self.scheme).narrowed)
        frozen, arena = {}, Arena()
        # Block by block, so that no more than one block is here unquantized.
        for index in range(self.span.start, self.span.end):
            try:
                loaded = cook(
                    self.checkpoint,
                    whole.model,
                    [recipe for recipe in wanted if whole.block_of(recipe.target) == index],
                    self.dtype,
                    self.device,
                )
            except torch.OutOfMemoryError as error:
                raise OutOfMemory(f"blocks {self.span} do not fit on {self.device}") from error
            for name, tensor in loaded.items():
                _, rest = name[start:].split(".", 1)
                local = f"{layers}{index - self.span.start}.{rest}"
                path = local.removesuffix(".weight")
                if path in narrowed and path != local:
                    narrow = quantize_weight(tensor, self.scheme)
                    codes, scales = arena.place(narrow.codes), arena.place(narrow.scales)
                    self.narrow[path] = replace(narrow, codes=codes, scales=scales)
                else:
                    frozen[local] = arena.place(tensor)
        here = {*frozen, *(f"{path}.weight" for path in self.narrow)}
        missing = [name for name, _ in skeleton.named_parameters() if name not in here]
        if missing:
            raise UnsupportedModel(
                f"the checkpoint {self.checkpoint.name} has nothing for '{missing[0]}' of {self.span}"
            )
        return frozen

    @property
    def weight_bytes(self) -> int:
        narrow = sum(weight.nbytes for weight in self.narrow.values())
        return narrow + sum(tensor.nbytes for tensor in self.frozen.values())

    def _try_few_rows(self) -> bool:
        trial = try_few_rows(self.view().model)
        if trial is not None:
            log.info(
                "few_rows",
                pays=trial.pays,
                error=trial.error,
                plain_ms=round(1e3 * trial.plain_s, 2),
                few_rows_ms=round(1e3 * trial.few_rows_s, 2),
            )
        return trial is not None and trial.pays

    def view(self, span: Span | None = None) -> View:
        """New modules over the shared tensors, for the whole span or a part of it. Raises SpanError."""
        span = span or self.span
        model = skeleton_of(self.checkpoint, span, self.dtype)
        assign(model, self._part(self.frozen, span))
        replace_linears(model, self._part(self.narrow, span), self.dtype)
        model.to(self.device)  # buffers such as rotary frequencies; the shared tensors are there already
        if self._few_rows:
            use_few_rows(model)
        if self._few_rows or self.narrow:
            use_norm_rows(model)
        return View(model, span, self.parts, self.checkpoint.config)

    def _part(self, tensors: Mapping[str, T], span: Span) -> dict[str, T]:
        """What belongs to a part of the span, by the part's own local names."""
        layers, shift = self.parts.layers + ".", span.start - self.span.start
        found = {}
        for name, tensor in tensors.items():
            index, rest = name[len(layers) :].split(".", 1)
            if 0 <= int(index) - shift < len(span):
                found[f"{layers}{int(index) - shift}.{rest}"] = tensor
        return found


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


class _Seen(Exception):
    """What was looked for has been seen; the rest of the pass is not needed."""


class View:
    """A runnable stack of blocks. Not thread-safe: one of the computing threads alone calls it."""

    def __init__(self, model: nn.Module, span: Span, parts: Parts, config: Any) -> None:
        self.model = model.eval().requires_grad_(False)
        self.span = span
        self.parts = parts
        self._config = config
        self._hidden_size = int(config.hidden_size)
        self._given: torch.Tensor | None = None
        self._taken: torch.Tensor | None = None
        self.blocks[0].register_forward_pre_hook(self._enter, with_kwargs=True)
        self.blocks[-1].register_forward_hook(self._leave)

    @property
    def blocks(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.model.get_submodule(self.parts.layers))

    @cached_property
    def width(self) -> int:
        """Numbers a token's hidden state has between blocks: more than `hidden_size` where several residual
        streams travel side by side. What the base model hands to its first block tells."""
        found = []

        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append((args[0] if args else kwargs["hidden_states"])[0, 0].numel())
            raise _Seen

        first = cast(nn.ModuleList, self.model.get_submodule(self.parts.layers))[0]
        handle = first.register_forward_pre_hook(look, with_kwargs=True, prepend=True)
        parameter = next(self.model.parameters())
        embeds = torch.zeros((1, 1, self._hidden_size), dtype=parameter.dtype, device=parameter.device)
        try:
            with torch.no_grad(), suppress(_Seen):
                positions = torch.zeros((1, 1), dtype=torch.long, device=parameter.device)
                self.model(inputs_embeds=embeds, position_ids=positions, use_cache=False)
        finally:
            handle.remove()
        return int(found[0])

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
        positions_BT: position ids, else position, position + 1, …; without cache and mask, ids that start
        again mark sequences packed into one row, which do not see each other, as everywhere in transformers.
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


def block_bytes(checkpoint: Checkpoint, dtype: torch.dtype, scheme: Scheme = "none") -> list[int]:
    """Bytes of each block at a dtype and scheme, from shapes alone. Raises UnsupportedModel."""
    whole = whole_of(checkpoint, dtype)
    sizes = [0] * n_blocks(checkpoint.config)
    for recipe in whole.recipes:
        block = whole.block_of(recipe.target)
        if block is not None:
            entries = (checkpoint.tensors[name] for name, _ in recipe.sources)
            sizes[block] += sum(math.prod(entry.shape) for entry in entries) * dtype.itemsize
    if scheme != "none":
        for block in range(len(sizes)):
            skeleton = skeleton_of(checkpoint, Span(block, block + 1), dtype)
            sizes[block] = plan_of(skeleton, scheme).nbytes(skeleton, dtype)
    return sizes


def head_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Bytes of embedding, final norm and LM head at a dtype, from shapes alone; tied ones are in a checkpoint once.

    Raises UnsupportedModel."""
    whole = whole_of(checkpoint, dtype)
    sources = {name for recipe in whole.recipes if whole.block_of(recipe.target) is None for name, _ in recipe.sources}
    return sum(math.prod(checkpoint.tensors[name].shape) for name in sources) * dtype.itemsize


def head_blocks(checkpoint: Checkpoint) -> float:
    """What the LM head costs in training, in average blocks: by the weights each multiplies with."""
    head = int(checkpoint.config.vocab_size) * int(checkpoint.config.hidden_size) * torch.float32.itemsize
    sizes = block_bytes(checkpoint, torch.float32)
    return head * len(sizes) / sum(sizes)
