"""Which nodes train together: disjoint chains that each hold every block. Pure and deterministic.

In: idle nodes with the spans they hold, what is known of each, and the number of blocks. Out: as
many pipelines as can exist at once, made of as few nodes as that number allows, and for every
node that is left over the reason. Of nodes with the same span the steadiest lead, and the faster
ones take part; where spans overlap, the cut is where the slowest stage is fastest. The order of the
input does not matter.

As a flow: every node is an edge from the start to the end of its span with capacity one, and
from any position one may step back for free (spans overlap, the later node is trimmed). A unit
of flow from 0 to n_blocks is a pipeline, so the maximum flow is the largest number of disjoint
pipelines, and successive shortest paths (Busacker and Gowen, 1961) keep the number of nodes at
its minimum on the way.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from swarm.ids import Span, missing_blocks, ranges_text
from swarm.net.split import choose_cuts


@dataclass(frozen=True, order=True)
class Member:
    """A node and the blocks it trains, or, among candidates, holds."""

    peer: str
    span: Span


@dataclass(frozen=True)
class Traits:
    """What the coordinator knows of a node. Links between nodes it does not know."""

    token_block_s: float = 0.0
    """Seconds a token and block, as the node measured it; 0: it did not say."""
    uptime_s: float = 0.0

    @property
    def steadiness(self) -> int:
        """Doublings of the uptime beyond a minute: nodes of a similar age are alike."""
        return max(0, int(self.uptime_s / 60)).bit_length()


@dataclass(frozen=True)
class PipelinePlan:
    """Members in chain order; their spans meet and cover all blocks. The first one leads."""

    members: tuple[Member, ...]


@dataclass(frozen=True)
class Placement:
    pipelines: tuple[PipelinePlan, ...]
    unused: Mapping[str, str]
    """Peer to reason, for every node in no pipeline."""
    missing: str
    """What one more pipeline would need, in words."""


_Edge = Span | int
"""A span's nodes, or the step back from that position to the one before."""


def form_pipelines(
    nodes: Iterable[Member],
    n_blocks: int,
    traits: Mapping[str, Traits] | None = None,
    cuts: Collection[int] | None = None,
    head_blocks: float = 0.0,
) -> Placement:
    """Place the nodes. A peer must not occur twice; `cuts` are the places where the model may be cut, `head_blocks`
    what the head costs its lead, in blocks."""
    unused: dict[str, str] = {}
    by_span: dict[Span, list[str]] = {}
    speeds = _Speeds(traits or {})
    for node in sorted(nodes, key=lambda node: (speeds.of(node.peer), node)):
        if node.span.end > n_blocks:
            unused[node.peer] = f"its span {node.span} ends beyond the model's {n_blocks} blocks"
        else:
            by_span.setdefault(node.span, []).append(node.peer)
    used = _maximum_flow({span: len(peers) for span, peers in by_span.items()}, n_blocks)
    chains = _chains(used, n_blocks)
    # Leads first: they hold the head, and a round ends with them.
    leads = [_take_steadiest(by_span[chain[0]], speeds) for chain in chains]
    pipelines = tuple(
        _pipeline([lead, *(by_span[span].pop(0) for span in chain[1:])], chain, speeds, cuts, head_blocks)
        for lead, chain in zip(leads, chains, strict=True)
    )
    left = {span: peers for span, peers in by_span.items() if peers}
    blocks = missing_blocks(left, n_blocks)
    missing = f"no idle node holds block{'s' if len(blocks) > 1 else ''} {ranges_text(blocks)}"
    for peers in left.values():
        unused.update(dict.fromkeys(peers, f"{missing}, which another pipeline would need"))
    return Placement(pipelines, unused, missing)


def _maximum_flow(capacity: Mapping[Span, int], n_blocks: int) -> Counter[Span]:
    """How many nodes of each span take part."""
    flow: Counter[Span] = Counter()
    # Steps back carry flow too: undoing one is a step forward that the residual graph offers.
    back: Counter[int] = Counter()
    while (path := _shortest_path(capacity, flow, back, n_blocks)) is not None:
        for edge, sign in path:
            if isinstance(edge, Span):
                flow[edge] += sign
            else:
                back[edge] += sign
    return flow


def _shortest_path(
    capacity: Mapping[Span, int], flow: Counter[Span], back: Counter[int], n_blocks: int
) -> list[tuple[_Edge, int]] | None:
    """The cheapest way to send one more unit (Bellman-Ford with a queue), as edges with their sign."""
    outgoing: dict[int, list[tuple[int, int, _Edge, int]]] = {at: [] for at in range(n_blocks + 1)}
    # A longer span first: among equally short chains the one that reaches furthest is tried first.
    for span in sorted(capacity, key=lambda s: (s.start, -s.end)):
        if flow[span] < capacity[span]:
            outgoing[span.start].append((span.end, 1, span, 1))
        if flow[span] > 0:
            outgoing[span.end].append((span.start, -1, span, -1))
    for at in range(1, n_blocks + 1):
        outgoing[at].append((at - 1, 0, at, 1))
        if back[at] > 0:
            outgoing[at - 1].append((at, 0, at, -1))
    cost = {0: 0}
    reached_by: dict[int, tuple[int, _Edge, int]] = {}
    queue = deque([0])
    queued = {0}
    while queue:
        at = queue.popleft()
        queued.discard(at)
        for to, price, edge, sign in outgoing[at]:
            if to not in cost or cost[at] + price < cost[to]:
                cost[to] = cost[at] + price
                reached_by[to] = (at, edge, sign)
                if to not in queued:
                    queue.append(to)
                    queued.add(to)
    if n_blocks not in cost:
        return None
    path: list[tuple[_Edge, int]] = []
    at = n_blocks
    while at != 0:
        at, edge, sign = reached_by[at]
        path.append((edge, sign))
    return path


def _chains(used: Counter[Span], n_blocks: int) -> list[list[Span]]:
    """Split the used spans into chains: each next span starts within the blocks covered so far.

    Sweeping by start and giving every span to the chain that needs it soonest always works,
    because at every cut between two blocks at least as many spans cross as there are chains.
    """
    spans = sorted(used.elements(), key=lambda s: (s.start, s.end))
    chains = [[span] for span in spans if span.start == 0]
    rest = [span for span in spans if span.start > 0]
    for span in rest:
        open_chains = [c for c in chains if c[-1].end < n_blocks]
        shortest = min(open_chains, key=lambda c: c[-1].end)
        shortest.append(span)
    return sorted(chains, key=lambda chain: (len(chain), chain))


class _Speeds:
    """Seconds a token and block by peer; who did not measure is taken for average."""

    def __init__(self, traits: Mapping[str, Traits]) -> None:
        self._traits = traits
        known = [found.token_block_s for found in traits.values() if found.token_block_s > 0]
        self._average = median(known) if known else 1.0

    def of(self, peer: str) -> float:
        return self.known(peer).token_block_s or self._average

    def known(self, peer: str) -> Traits:
        return self._traits.get(peer, Traits())


def _take_steadiest(peers: list[str], speeds: _Speeds) -> str:
    """The peers are in order of speed: of equally steady ones the fastest is taken."""
    lead = max(peers, key=lambda peer: speeds.known(peer).steadiness)
    peers.remove(lead)
    return lead


def _pipeline(
    peers: Sequence[str], chain: Sequence[Span], speeds: _Speeds, cuts: Collection[int] | None, head_blocks: float
) -> PipelinePlan:
    """Cut the overlaps. The ends of spans are always allowed: nodes hold no others."""
    spans = choose_cuts(chain, head_blocks, [speeds.of(peer) for peer in peers], cuts)
    return PipelinePlan(tuple(Member(peer, span) for peer, span in zip(peers, spans, strict=True)))
