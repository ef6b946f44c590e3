"""Which nodes are there: registrations, liveness, and what each last said of itself.

In: calls of nodes, with monotonic times. Out: who is there, who fell silent for too long and when
somebody next could. A node inside a long poll is not silent; a node known from before a restart
gets a longer grace. Holds memory only; whoever registers or drops a node stores that first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from coordinator.records import NodeRecord
from swarm.wire.v1 import coordinator_pb2 as pb


@dataclass
class Node:
    record: NodeRecord
    silent_since_s: float
    """May lie ahead: the end of a long poll that is under way, or of the grace after a restart."""
    last_call_s: float
    joined_s: float
    """Since when it has been here without a break."""
    doubted: bool = False
    """A lead could not reach it, and it has not called since: it is given no work."""
    progress: pb.TrainProgress | None = None
    traffic: pb.Traffic = field(default_factory=pb.Traffic)


class Nodes:
    """The registered nodes by peer id."""

    def __init__(self, known: Iterable[NodeRecord], now_s: float, *, silent_s: float, recovery_grace_s: float) -> None:
        self._silent_s = silent_s
        since_s = now_s + max(0.0, recovery_grace_s - silent_s)
        self._nodes = {record.peer: Node(record, since_s, now_s, now_s) for record in known}

    def __len__(self) -> int:
        return len(self._nodes)

    def get(self, peer: str) -> Node | None:
        return self._nodes.get(peer)

    def all(self) -> list[Node]:
        """By peer id."""
        return [self._nodes[peer] for peer in sorted(self._nodes)]

    def register(self, record: NodeRecord, now_s: float) -> None:
        before = self._nodes.get(record.peer)
        joined_s = before.joined_s if before is not None else now_s
        self._nodes[record.peer] = Node(record, now_s, now_s, joined_s)

    def drop(self, peer: str) -> None:
        self._nodes.pop(peer, None)

    def heard(self, peer: str, now_s: float, wait_s: float = 0.0) -> None:
        """A call began, or, with the default, ended; `wait_s` is how long it may go on."""
        node = self._nodes.get(peer)
        if node is not None:
            node.silent_since_s = now_s + wait_s
            node.last_call_s = now_s

    def doubt(self, peer: str) -> None:
        """Somebody says that it is gone. Before it would be given up for its silence, this decides placement only."""
        node = self._nodes.get(peer)
        if node is not None:
            node.doubted = True

    def called(self, peer: str) -> bool:
        """A call of its begins: it is there. Whether it was doubted."""
        node = self._nodes.get(peer)
        if node is None or not node.doubted:
            return False
        node.doubted = False
        return True

    def silent(self, now_s: float) -> list[str]:
        """Nodes to give up now."""
        return [node.record.peer for node in self.all() if now_s - node.silent_since_s > self._silent_s]

    def next_check_s(self) -> float | None:
        """Time from which on a node could be silent for too long; None without nodes."""
        since_s = min((node.silent_since_s for node in self._nodes.values()), default=None)
        return None if since_s is None else since_s + self._silent_s
