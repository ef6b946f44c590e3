"""Bytes that KV caches take, from the configuration alone: what admission and placement count with. Pure."""

from __future__ import annotations

from typing import Any

import torch

from swarm.ids import Span


def cache_bytes(config: Any, span: Span, dtype: torch.dtype, length: int) -> int:
    """What `length` columns of one row take in the caches of a span's blocks."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * heads * head_dim * dtype.itemsize * length * len(span))
