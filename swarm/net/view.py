"""The swarm as plain values: what discovery reads and routing decides on."""

from __future__ import annotations

from dataclasses import dataclass

from swarm.ids import Span

STATES = ("choosing", "joining", "serving", "draining")
MAX_NEIGHBOURS = 16


@dataclass(frozen=True, kw_only=True)
class NodeStatus:
    """What a node says of itself. A speed of 0 was not measured."""

    span: Span
    state: str = "serving"
    """choosing: it would take this span unless others do; joining: it loads the span; serving: sessions
    may be opened; draining: it hands its sessions over and leaves the span. Others are never routed to."""
    reason: str = ""
    """Why it is in that state, for people."""
    dtype: str = "float32"
    quantization: str = "none"
    """none, int8, int4 or nf4: how its weights are held."""
    batching: str = "rows"
    """rows: steps of all sessions run as one batch; one: sessions take turns."""
    decode_s_per_block: float = 0.0
    """Seconds of one decode step of one row, through one block."""
    decode8_s_per_block: float = 0.0
    """The same for eight rows at once."""
    prefill_tokens_per_s: float = 0.0
    """Through the whole span."""
    link_bytes_per_s: float = 0.0
    """The median over the neighbours it measured."""
    sessions: int = 0
    queue: int = 0
    """Sessions that wait for admission."""
    kv_free_bytes: int = 0
    kv_total_bytes: int = 0
    """Bytes that caches may take; 0: not told."""
    epoch: int = 0
    """Grows with every start and every move; caches of an older epoch are gone."""
    settled_s: float = 0.0
    """How long it has served this span."""
    pinned: bool = False
    """It does not move: its volunteer chose the span, or a job uses it."""
    next_span: Span | None = None
    """Where it is about to move, while it still serves, or is on the way to."""
    rtts_s: tuple[tuple[str, float], ...] = ()
    """(peer id, round trip in seconds) of a few neighbours."""


@dataclass(frozen=True, kw_only=True)
class NodeInfo(NodeStatus):
    """A node as its record describes it."""

    peer_id: str
    addrs: tuple[str, ...] = ()
    version: str = ""


@dataclass(frozen=True)
class FileInfo:
    name: str
    sha256: bytes
    size: int


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter that at least one node announces: its files by hash, and who holds them."""

    name: str
    job_id: str
    round: int
    files: tuple[FileInfo, ...]
    holders: tuple[tuple[str, tuple[str, ...]], ...]
    """(peer id, addresses) of each node that serves exactly these files."""


@dataclass(frozen=True)
class SwarmView:
    """One moment's view of the swarm."""

    nodes: tuple[NodeInfo, ...]
    adapters: tuple[AdapterInfo, ...]

    def adapter(self, name: str) -> AdapterInfo | None:
        """The newest announced round of that name; the one most nodes hold, if they disagree."""
        same = [adapter for adapter in self.adapters if adapter.name == name]
        return max(same, key=lambda a: (a.round, len(a.holders), a.job_id), default=None)


@dataclass(frozen=True)
class Hop:
    """One stage of a chain: the node and the blocks it computes (a part of its span)."""

    peer_id: str
    span: Span
    addrs: tuple[str, ...]
