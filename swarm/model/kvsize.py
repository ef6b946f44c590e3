"""Bytes that KV caches take, from the configuration alone: what admission and placement count with. Pure.

Each block adds what its kind keeps. Full attention: keys and values of every token. A sliding
window: of the last window - 1. Latent attention: the compressed keys and values and the rotary part,
for all heads together. Blocks that choose tokens: an index key more. Linear attention and short
convolutions: a state that does not grow. Blocks that use an earlier block's keys: nothing.

After a step of many tokens a window keeps the memory of the whole step until the next one.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import get_layer_types_and_kwargs

from swarm.errors import UnsupportedModel
from swarm.ids import Span
from swarm.model.families import n_blocks

_FLOAT32 = 4
_FULL = frozenset({"full_attention", "indexed_attention", "minimax_m3_sparse", "hybrid"})
_SLIDING = frozenset({"sliding_attention", "chunked_attention", "hybrid_sliding"})


@dataclass(frozen=True)
class Layer:
    """What one cache layer keeps of one row."""

    per_token: int = 0
    """Numbers."""
    per_token_float32: int = 0
    cap: int | None = None
    """Tokens it keeps at most."""
    state: int = 0
    """Numbers that do not depend on the length."""
    state_float32: int = 0

    def nbytes(self, dtype: torch.dtype, length: int) -> int:
        tokens = length if self.cap is None else min(length, self.cap)
        growing = tokens * (self.per_token * dtype.itemsize + self.per_token_float32 * _FLOAT32)
        return growing + (self.state * dtype.itemsize + self.state_float32 * _FLOAT32 if length else 0)


def cache_bytes(config: Any, span: Span, dtype: torch.dtype, length: int) -> int:
    """What `length` columns of one row take in the caches of a span's blocks. Raises UnsupportedModel."""
    layers = cache_layers(config)
    each = len(layers) // n_blocks(config)
    return sum(layer.nbytes(dtype, length) for layer in layers[span.start * each : span.end * each])


_known: dict[int, tuple[weakref.ref[Any], list[Layer]]] = {}
_MAX_KNOWN = 64


def cache_layers(config: Any) -> list[Layer]:
    """Every cache layer of the whole model, in order. Raises UnsupportedModel.

    Reading a configuration of 80 layers takes 2 ms and admission asks before every step: answers are
    kept by the configuration's identity, which is not changed once a checkpoint is open.
    """
    known = _known.get(id(config))
    if known is None or known[0]() is not config:
        if len(_known) >= _MAX_KNOWN:
            _known.clear()
        known = _known[id(config)] = (weakref.ref(config), _read_layers(config))
    return known[1]


def _read_layers(config: Any) -> list[Layer]:
    kinds, settings = get_layer_types_and_kwargs(config)
    return [
        _layer(config, each, index, kind, setting.get("sliding_window"))
        for index, (kind, setting, each) in enumerate(zip(kinds, settings, config.per_layer_config, strict=True))
    ]


def _layer(config: Any, each: Any, index: int, kind: str, window: int | None) -> Layer:
    """config: of the model; each: of this layer, where they differ."""
    if kind == "dummy":
        return Layer()
    if kind == "linear_attention":
        return _linear(each)
    if kind not in _FULL | _SLIDING:
        raise UnsupportedModel(f"model type '{config.model_type}' has layers of a kind unknown here: {kind}")
    if config.model_type == "minimax":
        window = None  # its own cache keeps everything
    cap = None if window is None else window - 1
    per_token, index_float32 = _attention(each, sliding=kind in _SLIDING), 0
    if kind == "indexed_attention" and (getattr(config, "indexer_types", None) or {index: ""})[index] != "shared":
        if config.model_type == "dots3_note_text":
            index_float32 = each.index_head_dim
        else:
            per_token += each.index_head_dim
    if kind == "minimax_m3_sparse":
        per_token += each.index_head_dim
    state = 0
    if kind in ("hybrid", "hybrid_sliding"):  # Inkling: convolutions over keys, values, and both residual inputs
        state = (per_token + 2 * each.hidden_size) * each.sconv_kernel_size
    return Layer(per_token, index_float32, cap, state_float32=state)


def _attention(each: Any, *, sliding: bool) -> int:
    """Numbers that keys and values of one token have in a layer."""
    if getattr(each, "kv_lora_rank", None) and getattr(each, "qk_rope_head_dim", None):
        return int(each.kv_lora_rank + each.qk_rope_head_dim)
    heads = getattr(each, "num_key_value_heads", None) or each.num_attention_heads
    head_dim = getattr(each, "head_dim", None) or each.hidden_size // each.num_attention_heads
    value_dim = head_dim
    if each.model_type == "falcon":
        # Grouped heads are repeated before they are cached.
        heads = 1 if each.multi_query and not each.new_decoder_architecture else each.num_attention_heads
    if each.model_type == "mimo_v2_flash":
        heads, value_dim = heads * (2 if sliding else 1), each.v_head_dim
    if each.model_type == "inkling_text" and sliding:
        heads, value_dim = each.swa_num_key_value_heads, each.swa_head_dim
        head_dim = value_dim
    return int(heads * (head_dim + value_dim))


def _linear(each: Any) -> Layer:
    """Gated delta networks and their like: a convolution's window and a matrix per head, which is float32."""
    if each.model_type == "minimax":
        head_dim = getattr(each, "head_dim", None) or each.hidden_size // each.num_attention_heads
        return Layer(state=each.num_attention_heads * head_dim**2)
    if hasattr(each, "linear_num_heads"):
        width = each.linear_num_heads * each.linear_head_dim
        return Layer(
            state=3 * width * each.linear_conv_kernel_dim, state_float32=each.linear_num_heads * each.linear_head_dim**2
        )
    keys = each.linear_num_key_heads * each.linear_key_head_dim
    values = each.linear_num_value_heads * each.linear_value_head_dim
    return Layer(
        state=(2 * keys + values) * each.linear_conv_kernel_dim,
        state_float32=each.linear_num_value_heads * each.linear_key_head_dim * each.linear_value_head_dim,
    )
