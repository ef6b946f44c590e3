"""The swarm as plain values: what discovery reads and routing decides on."""

from __future__ import annotations

from dataclasses import dataclass

from swarm.ids import Span


@dataclass(frozen=True)
class NodeInfo:
    """A node as its record describes it."""

    peer_id: str
    span: Span
    addrs: tuple[str, ...]
    dtype: str
    sessions: int
    state: str


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
