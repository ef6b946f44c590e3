"""What this node runs for others: the frozen span, its serving views, and one session's state.

`NodeModel` owns the shard and one view per part of the span, whose linear layers an adapter bank
extends, so that sessions with different adapters share a batch. `ServingSession` is what this node
holds of a session, whether a stream carries it at the moment or not. Charging the ledger happens
on the loop, before memory is taken.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import structlog
import torch

from node.kv import SessionCache
from node.memory import Ledger
from node.sentlog import SentLog
from swarm.adapters.bank import AdapterBank
from swarm.adapters.registry import ModelAdapters
from swarm.errors import SpanError
from swarm.ids import Span
from swarm.model.checkpoint import Checkpoint
from swarm.model.kvsize import cache_bytes
from swarm.model.quantize import Scheme
from swarm.model.rows import prepare_rows, supports_rows
from swarm.model.shard import Shard, View, block_bytes, context_length

CHUNK_COLUMNS = 256
"""A longer step is computed in pieces of so many columns, so that decoding gets its turn between them."""
_MAX_VIEWS = 8
_MAX_ADAPTERS = 64
_LOG_SHARE = 16
log = structlog.get_logger()


class ServingView:
    """A view that sessions share, and the adapters loaded into it."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.span = view.span
        self.batches = supports_rows(view)
        """Whether its sessions' steps can be one batch."""
        if self.batches:
            prepare_rows(view)
        self.bank = AdapterBank(view)
        self._used: OrderedDict[bytes, None] = OrderedDict()
        self.in_use: dict[bytes, int] = {}
        """Open sessions by adapter."""

    def load(self, adapter_id: bytes, adapters: ModelAdapters, files: dict[str, bytes]) -> None:
        """Make an adapter's part of these blocks ready. Compute thread only."""
        if adapter_id not in self.bank:
            adapter, values = adapters.load(files, self.span)
            self.bank.add(adapter_id, adapter, values)
        self._used[adapter_id] = None
        self._used.move_to_end(adapter_id)
        unused = [old for old in self._used if old != adapter_id and not self.in_use.get(old)]
        for old in unused[: max(0, len(self._used) - _MAX_ADAPTERS)]:
            del self._used[old]
            self.bank.remove(old)


class NodeModel:
    """The frozen span of this node and the views that serve it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        span: Span,
        dtype: torch.dtype,
        device: torch.device,
        ledger: Ledger,
        scheme: Scheme = "none",
    ) -> None:
        """Loads the weights. Raises OutOfMemory, UnsupportedModel, CorruptData."""
        ledger.charge("weights", "shard", span_bytes(checkpoint, span, dtype, scheme))
        ledger.charge("activations", "serving", workspace_bytes(checkpoint.config, dtype))
        self.checkpoint = checkpoint
        self.span = span
        self.shard = Shard(checkpoint, span, dtype, device, scheme)
        self.adapters = ModelAdapters(checkpoint)
        self.context_length = context_length(checkpoint.config)
        self.width = self.shard.view(Span(span.start, span.start + 1)).width
        """Numbers a token's hidden state has between blocks."""
        self._views: OrderedDict[Span, ServingView] = OrderedDict()

    def view(self, span: Span) -> ServingView:
        """The serving view of a part of the span. Raises SpanError. Compute thread only."""
        if not self.span.covers(span):
            raise SpanError(f"this node holds blocks {self.span}, not {span}", "look up the swarm again")
        if span not in self._views:
            self._views[span] = ServingView(self.shard.view(span))
            for old in [s for s, v in self._views.items() if not v.in_use][: max(0, len(self._views) - _MAX_VIEWS)]:
                del self._views[old]
        self._views.move_to_end(span)
        return self._views[span]

    def kv_bytes(self, span: Span, rows: int, columns: int) -> int:
        """What so many columns of so many rows take in the KV caches of a span."""
        return rows * cache_bytes(self.checkpoint.config, span, self.shard.dtype, columns)


@dataclass(eq=False)
class ServingSession:
    """What this node holds of one session."""

    session_id: str
    opener: str
    """Peer id of the client."""
    view: ServingView
    adapter_id: bytes
    cache: SessionCache
    log: SentLog
    number: int
    """Counts admissions: a higher number is a younger session."""
    received: int = 0
    sent: int = 0
    """Numbers of the last step that came in and that left: what liveness reports."""
    broken: bool = field(default=False)
    """A step failed halfway: the cache cannot be trusted and is not kept."""

    @property
    def held(self) -> int:
        return self.cache.length


def log_limit(ledger: Ledger) -> int:
    """Bytes that one session's log of sent activations may take."""
    return ledger.budget_bytes // _LOG_SHARE


def workspace_bytes(config: Any, dtype: torch.dtype) -> int:
    """What computing one prefill chunk takes beside weights and caches: about ten tensors of the hidden
    and four of the inner width."""
    hidden = int(config.hidden_size)
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    return CHUNK_COLUMNS * (10 * hidden + 4 * inner) * dtype.itemsize


def span_bytes(checkpoint: Checkpoint, span: Span, dtype: torch.dtype, scheme: Scheme = "none") -> int:
    """Bytes that a span's weights take at a dtype and scheme, from shapes alone."""
    return sum(block_bytes(checkpoint, dtype, scheme)[span.start : span.end])


def fitting_blocks(checkpoint: Checkpoint, dtype: torch.dtype, budget_bytes: int, scheme: Scheme = "none") -> int:
    """How many blocks fit, leaving a third of the budget to caches and training."""
    largest = max(block_bytes(checkpoint, dtype, scheme))
    return int(budget_bytes * 2 / 3 // largest)
