"""Several sessions' next tokens as one batch through a span's blocks.

In: one new column of each session and its own KV cache. The linear layers see all rows at once,
which is what batching is for; attention runs session by session on that session's keys and values,
so caches of different lengths are neither padded nor copied together.

It works where a family's layers take attention from `transformers`' attention interface and its
caches are plain or sliding windows: `supports_rows` says so for a view. Elsewhere (linear
attention states, attention of a family's own) sessions are computed one after the other.
Reference for the idea: Orca (Yu et al., 2022), selective batching.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from swarm.model.shard import View

ATTENTION = "swarm_rows"


@dataclass(frozen=True)
class Row:
    """One session's part of a batch."""

    cache: Any
    """What `View.new_cache` gave; it grows by one column."""
    batch: int
    """Rows of the session itself."""
    mask_BS: torch.Tensor | None
    """[batch, columns with the new one], 0 on padding; None: no padding."""


class _PerRow:
    """Keys or values of all sessions, on their way from the cache to attention."""

    def __init__(self, rows: Sequence[Row], tensors: list[torch.Tensor]) -> None:
        self.rows = rows
        self.tensors = tensors


class _RowsCache(Cache):  # type: ignore[misc]  # transformers has no types
    """Passes each row's new keys and values to its own cache."""

    def __init__(self, rows: Sequence[Row]) -> None:
        super().__init__(layers=[])
        self._rows = rows

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        keys, values, start = [], [], 0
        for row in self._rows:
            end = start + row.batch
            k, v = row.cache.update(key_states[start:end], value_states[start:end], layer_idx)
            keys.append(k)
            values.append(v)
            start = end
        return _PerRow(self._rows, keys), _PerRow(self._rows, values)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(int(row.cache.get_seq_length(layer_idx)) for row in self._rows)


def supports_rows(view: View) -> bool:
    """Whether this view's sessions can be computed as one batch."""
    config = view.model.config
    if getattr(config, "_attn_implementation", "") not in ("sdpa", ATTENTION):
        return False
    layers = list(getattr(view.new_cache(), "layers", ()))
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and not set(kinds) <= {"full_attention", "sliding_attention"}:
        return False
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def prepare_rows(view: View) -> None:
    """Let a view's layers call the attention below; without a batch of rows it is `transformers`' own."""
    for module in view.model.modules():
        config = getattr(module, "config", None)
        if config is not None and getattr(config, "_attn_implementation", "") == "sdpa":
            config._attn_implementation = ATTENTION


def forward_rows(view: View, hidden_N1D: torch.Tensor, positions_N1: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """One new column of every session: hidden states [sum of batches, 1, D] in and out.

    positions_N1: position id of each row's new column. Each row's cache grows by one column.
    """
    # Attention knows each row's mask itself; a mask with four dimensions is taken as it is.
    unused = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=hidden_N1D.device)
    return view.forward(hidden_N1D, cache=_RowsCache(rows), mask_BS=unused, positions_BT=positions_N1)


def _attend(
    module: torch.nn.Module, query: torch.Tensor, key: Any, value: Any, attention_mask: Any, **settings: Any
) -> tuple[torch.Tensor, None]:
    if not isinstance(key, _PerRow):
        return cast(
            tuple[torch.Tensor, None],
            sdpa_attention_forward(module, query, key, value, attention_mask, **settings),
        )
    outputs, start = [], 0
    grouped = query.shape[1] != key.tensors[0].shape[1]
    for row, k, v in zip(key.rows, key.tensors, value.tensors, strict=True):
        mask = None
        if row.mask_BS is not None:
            # A sliding window keeps the last columns only.
            mask = row.mask_BS[:, None, None, -k.shape[2] :].to(query.device)
        outputs.append(
            functional.scaled_dot_product_attention(
                query[start : start + row.batch],
                k,
                v,
                attn_mask=mask,
                scale=settings.get("scaling"),
                enable_gqa=grouped,
            )
        )
        start += row.batch
    return torch.cat(outputs).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
