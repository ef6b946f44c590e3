"""Running a span for others: sessions with a KV cache, and stateless forward passes.

`NodeModel` owns the shard and one view per (span, adapter); `ServingStage` is one session's part of
a chain on this node. Everything here that computes is called on the compute thread only;
charging the ledger happens before, on the loop.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import torch

from node.memory import Ledger
from swarm.adapters.registry import ModelAdapters, set_values
from swarm.errors import ContextTooLong, SessionError, SpanError
from swarm.ids import Span
from swarm.model.checkpoint import Checkpoint
from swarm.model.shard import Parts, Shard, View, base_prefix, context_length, n_blocks

_MAX_VIEWS = 32


class NodeModel:
    """The frozen span of this node and the views that serve it."""

    def __init__(
        self, checkpoint: Checkpoint, span: Span, dtype: torch.dtype, device: torch.device, ledger: Ledger
    ) -> None:
        """Loads the weights. Raises OutOfMemory, UnsupportedModel, CorruptData."""
        ledger.charge("weights", "shard", span_bytes(checkpoint, span, dtype))
        self.checkpoint = checkpoint
        self.span = span
        self.shard = Shard(checkpoint, span, dtype, device)
        self.adapters = ModelAdapters(checkpoint)
        self.context_length = context_length(checkpoint.config)
        self._views: OrderedDict[tuple[Span, bytes], View] = OrderedDict()

    def view(self, span: Span, adapter_id: bytes = b"", files: dict[str, bytes] | None = None) -> View:
        """The view for a part of the span, with an adapter's files injected if given."""
        if not self.span.covers(span):
            raise SpanError(f"this node holds blocks {self.span}, not {span}", "look up the swarm again")
        key = (span, adapter_id)
        if key not in self._views:
            view = self.shard.view(span)
            if files is not None:
                method, values = self.adapters.load(files, span)
                set_values(self.adapters.attach(view, method), values)
            self._views[key] = view
            while len(self._views) > _MAX_VIEWS:
                self._views.popitem(last=False)
        self._views.move_to_end(key)
        return self._views[key]

    def kv_bytes_per_token(self, span: Span) -> int:
        """What one token of one row adds to the KV caches of a span."""
        config = self.checkpoint.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(2 * heads * head_dim * self.shard.dtype.itemsize * len(span))


class ServingStage:
    """One session on this node. `cached`: whether it keeps KV between steps."""

    def __init__(self, model: NodeModel, view: View, session_id: str, ledger: Ledger, *, cached: bool) -> None:
        self._model = model
        self._view = view
        self._ledger = ledger
        self._session_id = session_id
        self._cache: Any = view.new_cache() if cached else None
        self._kv_bytes_per_token = model.kv_bytes_per_token(view.span)
        self._length = 0

    def admit(self, shape_BTD: tuple[int, ...], position: int) -> None:
        """Check a step and charge what it will take, before any of it is taken.

        Raises ContextTooLong, SessionError (a position that does not follow), OutOfMemory.
        """
        batch, time, _ = shape_BTD
        if position + time > self._model.context_length:
            raise ContextTooLong(
                f"{position + time} tokens are more than the model's context of {self._model.context_length}"
            )
        if self._cache is not None:
            if position != self._length:
                raise SessionError(f"the session holds {self._length} tokens, a step at {position} does not follow")
            size = batch * (position + time) * self._kv_bytes_per_token
            self._ledger.charge("kv", self._session_id, size)
            self._length += time

    def forward(self, hidden_BTD: torch.Tensor, position: int) -> torch.Tensor:
        """Compute thread only."""
        with torch.inference_mode():
            return self._view.forward(hidden_BTD, position, self._cache)

    def close(self) -> None:
        self._cache = None
        self._ledger.release(self._session_id)


def span_bytes(checkpoint: Checkpoint, span: Span, dtype: torch.dtype) -> int:
    """Bytes that a span's weights take at a dtype, from the tensor table alone."""
    return sum(block_bytes(checkpoint, dtype)[span.start : span.end])


def block_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> list[int]:
    """Bytes of each block at a dtype."""
    start = f"{base_prefix(checkpoint)}{Parts.of(checkpoint.config).layers}."
    sizes = [0] * n_blocks(checkpoint.config)
    for name, entry in checkpoint.tensors.items():
        if name.startswith(start):
            sizes[int(name[len(start) :].split(".", 1)[0])] += math.prod(entry.shape) * dtype.itemsize
    return sizes


def fitting_blocks(checkpoint: Checkpoint, dtype: torch.dtype, budget_bytes: int) -> int:
    """How many blocks fit, leaving a third of the budget to caches and training."""
    largest = max(block_bytes(checkpoint, dtype))
    return int(budget_bytes * 2 / 3 // largest)
