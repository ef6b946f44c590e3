"""Pure decisions over a snapshot of the swarm: which chain of nodes to use, which span to hold.

In: `NodeInfo`s and the number of blocks. Out: hops, or a typed error that names what is missing.
Never touches the network, the clock or a random source.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from swarm.errors import BlocksMissing
from swarm.ids import Span, missing_blocks, ranges_text
from swarm.net.view import Hop, NodeInfo


def find_chain(nodes: Sequence[NodeInfo], n_blocks: int, avoid: Collection[str] = ()) -> tuple[Hop, ...]:
    """The chain over all blocks with the fewest hops, then the fewest sessions on its nodes.

    Raises BlocksMissing, naming the blocks that no usable node holds.
    """
    usable = [n for n in nodes if n.state == "serving" and n.peer_id not in avoid and n.span.end <= n_blocks]
    missing = missing_blocks((n.span for n in usable), n_blocks)
    if missing:
        raise BlocksMissing(f"no node holds block{'s' if len(missing) > 1 else ''} {ranges_text(missing)}")
    # best[b]: cheapest way to have computed blocks 0…b-1, as (hops, sessions, peer ids, chain).
    start: tuple[int, int, tuple[str, ...], tuple[Hop, ...]] = (0, 0, (), ())
    best = {0: start}
    for block in range(n_blocks):
        if block not in best:
            continue
        hops, load, names, chain = best[block]
        for node in usable:
            if block in node.span and node.peer_id not in names:
                # A node entered in the middle of its span runs to its end: fewer hops is always cheaper.
                end = node.span.end
                option = (
                    hops + 1,
                    load + node.sessions,
                    (*names, node.peer_id),
                    (*chain, Hop(node.peer_id, Span(block, end), node.addrs)),
                )
                if end not in best or option[:3] < best[end][:3]:
                    best[end] = option
    if n_blocks not in best:
        # Every block is held, so each node joins on to some other; only the one-visit rule can fail.
        raise BlocksMissing("the nodes' spans do not join into one chain")
    return best[n_blocks][3]


def choose_span(nodes: Sequence[NodeInfo], n_blocks: int, capacity: int) -> Span:
    """The span of at most `capacity` blocks that the swarm needs most: lowest coverage, then leftmost.

    Coverage counts the serving nodes that hold a block; the least covered block decides first.
    """
    length = max(1, min(capacity, n_blocks))
    coverage = [sum(block in n.span for n in nodes if n.state == "serving") for block in range(n_blocks)]

    def need(start: int) -> tuple[list[int], int]:
        return sorted(coverage[start : start + length]), start

    start = min(range(n_blocks - length + 1), key=need)
    return Span(start, start + length)
