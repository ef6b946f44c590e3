"""Which chain of nodes to use: the one with the least predicted time per token. Pure.

In: `NodeInfo`s, the number of blocks, and what the session needs. Out: hops with their prediction, or a
typed error that names what is missing. Never touches the network, the clock or a random source; nodes in
another order give the same answer.

The time of a token is the link to the first node, at each node its blocks times its seconds per block
under its present load, the links between nodes, and the link back. Round trips come from the client's own
pings and the nodes' records; a pair that nobody measured counts with a guess.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swarm.errors import BlocksMissing
from swarm.ids import Span, ranges_text
from swarm.net.cheapest import Floats, Links, Problem, cheapest
from swarm.net.view import Hop, NodeInfo

GUESSED_RTT_S = 0.1
"""Between volunteers that never measured each other: home lines of one continent."""
GUESSED_DECODE_S = 0.01
"""A block's step on a node that tells no speed: slower than what is served in earnest."""
_GUESSED_ROWS8 = 2.0
"""Eight rows against one: memory-bound decoding takes 1.7 times as long (FINDINGS, one CPU thread)."""
_GUESSED_PREFILL = 1 / 16
"""A prefilled token against a decoded one."""
_QUEUE_S = 2.0
"""What one session ahead in a node's admission queue is expected to cost, once per session."""
_FULL_S = 10.0
"""The same for a node whose free cache memory is too small for the session."""


@dataclass(frozen=True)
class RouteTerms:
    """What a session needs and what its client knows."""

    rtts_s: Mapping[str, float] = field(default_factory=dict)
    """Round trips from the client to nodes, by peer id."""
    guessed_rtt_s: float = GUESSED_RTT_S
    prefer_exact: bool = False
    """Only nodes whose weights are not quantized."""
    kv_bytes: int = 0
    """Cache bytes of the session over all blocks, for the tokens it expects."""
    prompt_tokens: int = 0
    new_tokens: int = 128
    """One-time costs (prefill, waiting for admission) are spread over so many tokens."""


@dataclass(frozen=True)
class Route:
    hops: tuple[Hop, ...]
    token_s: float
    """Predicted seconds per new token."""
    may_wait: tuple[str, ...] = ()
    """Peers of the chain that have a queue or too little free cache memory: opening may take a while."""


@dataclass(frozen=True)
class Replacement:
    route: Route
    kept: tuple[Hop, ...]
    """Hops that stay as they were, with their caches. Empty: a whole new route."""
    reason: str


def find_route(
    nodes: Sequence[NodeInfo], n_blocks: int, terms: RouteTerms | None = None, *, avoid: Collection[str] = ()
) -> Route:
    """The chain over all blocks with the least predicted time per token.

    `avoid`: peers that are not used. A node may be entered in the middle of its span and left before its
    end; none is used twice. Raises BlocksMissing, naming the blocks that no usable node holds.
    """
    terms = terms or RouteTerms()
    table = _table(nodes, n_blocks)
    holds_BN = table.holds_BN & table.usable(terms, avoid)
    missing = np.flatnonzero(~holds_BN.any(axis=1)).tolist()
    if missing:
        which = "unquantized " if terms.prefer_exact else ""
        raise BlocksMissing(f"no {which}node holds block{'s' if len(missing) > 1 else ''} {ranges_text(missing)}")
    route = _search(table, terms, holds_BN, ())
    if route is None:
        # Every block is held, and of nodes that hold all blocks the furthest-reaching ones make a chain.
        raise BlocksMissing("the nodes' spans do not join into one chain")
    return route


def find_replacement(
    nodes: Sequence[NodeInfo],
    n_blocks: int,
    hops: Sequence[Hop],
    lost: Collection[str],
    terms: RouteTerms | None = None,
    *,
    avoid: Collection[str] = (),
) -> Replacement:
    """A chain in place of `hops`, whose peers in `lost` are gone.

    Every other hop stays exactly as it is (same peer, same span: its caches are there), even if its record
    is missing or says that it drains; the spans of the lost ones are filled by other nodes, together the
    cheapest. Only if nothing fills them, a whole new route. Raises BlocksMissing if there is none either.
    """
    terms = terms or RouteTerms()
    gone = {*lost, *avoid}
    kept = tuple(hop for hop in hops if hop.peer_id not in lost)
    if kept:
        known = {node.peer_id for node in nodes}
        strangers = [
            NodeInfo(peer_id=hop.peer_id, addrs=hop.addrs, span=hop.span) for hop in kept if hop.peer_id not in known
        ]
        table = _table((*nodes, *strangers) if strangers else nodes, n_blocks)
        holds_BN = table.holds_BN & table.usable(terms, gone)
        mine = [table.index[hop.peer_id] for hop in kept]
        holds_BN[:, mine] = False
        for hop, node in zip(kept, mine, strict=True):
            holds_BN[hop.span.start : hop.span.end] = False
            holds_BN[hop.span.start : hop.span.end, node] = True
        route = _search(table, terms, holds_BN, mine)
        if route is not None:
            same = {hop.peer_id: hop for hop in kept}
            route = replace(route, hops=tuple(same.get(hop.peer_id, hop) for hop in route.hops))
            return Replacement(route, kept, f"{len(kept)} of {len(hops)} hops kept")
    holes = ", ".join(str(hop.span) for hop in hops if hop.peer_id in lost)
    reason = f"nobody else fills blocks {holes}: a whole new route" if kept else "no hop is left: a whole new route"
    return Replacement(find_route(nodes, n_blocks, terms, avoid=gone), (), reason)


def block_s(node: NodeInfo, terms: RouteTerms) -> float:
    """Predicted seconds per new token and block, with one more session than the node has now."""
    return _step_s(node) + _prefill_s(node) * terms.prompt_tokens / terms.new_tokens


def enter_s(node: NodeInfo, n_blocks: int, terms: RouteTerms) -> float:
    """Predicted wait for admission per new token. The node is taken to compute all of its span."""
    full = node.kv_total_bytes > 0 and node.kv_free_bytes < terms.kv_bytes * len(node.span) / n_blocks
    return (node.queue * _QUEUE_S + full * _FULL_S) / terms.new_tokens


def _step_s(node: NodeInfo) -> float:
    """Up to eight rows are interpolated between the two speeds that the node measured; more are taken to cost
    in proportion, which is true where a step is bound by arithmetic."""
    one_s = node.decode_s_per_block or GUESSED_DECODE_S
    rows = node.sessions + 1
    if node.batching != "rows":
        return one_s * rows
    eight_s = max(one_s, node.decode8_s_per_block or one_s * _GUESSED_ROWS8)
    return one_s + (eight_s - one_s) * (rows - 1) / 7 if rows <= 8 else eight_s * rows / 8


def _prefill_s(node: NodeInfo) -> float:
    if node.prefill_tokens_per_s:
        return 1 / (node.prefill_tokens_per_s * len(node.span))
    return (node.decode_s_per_block or GUESSED_DECODE_S) * _GUESSED_PREFILL


class _Index(dict[str, int]):
    def __missing__(self, peer: str) -> int:
        return -1


class _Table:
    """What the search reads of one snapshot, as arrays over its nodes in the order of peer ids, so that ties
    break alike whatever order the records came in."""

    def __init__(self, nodes: Sequence[NodeInfo], n_blocks: int) -> None:
        self.n_blocks = n_blocks
        self.nodes = nodes = sorted(nodes, key=attrgetter("peer_id"))
        self.index = index = {node.peer_id: i for i, node in enumerate(nodes)}
        starts = np.array([n.span.start for n in nodes], dtype=np.int64)
        ends = np.array([n.span.end for n in nodes], dtype=np.int64)
        blocks = np.arange(n_blocks)[:, None]
        self.holds_BN = (starts <= blocks) & (blocks < ends)
        self._serving_N = np.array([n.state == "serving" for n in nodes], dtype=bool) & (ends <= n_blocks)
        self._exact_N = np.array([n.quantization == "none" for n in nodes], dtype=bool)
        self.step_s_N = np.array([_step_s(n) for n in nodes])
        self.prefill_s_N = np.array([_prefill_s(n) for n in nodes])
        self._queue_N = np.array([n.queue for n in nodes])
        self._share_N = (ends - starts) / n_blocks
        self._free_N = np.array([n.kv_free_bytes if n.kv_total_bytes else np.inf for n in nodes])
        one = np.repeat(np.arange(len(nodes)), [len(n.rtts_s) for n in nodes])
        flat: list[Any] = list(chain.from_iterable(chain.from_iterable(n.rtts_s for n in nodes)))
        two = np.fromiter(map(_Index(index).__getitem__, flat[::2]), np.int64, len(one))
        links_s = np.fromiter(flat[1::2], np.float64, len(one)) / 2
        # Only of nodes that can follow each other in a chain.
        meet = (two >= 0) & (starts[two] <= ends[one]) & (starts[one] <= ends[two])
        self.links = Links(len(nodes), one[meet], two[meet], links_s[meet])

    def usable(self, terms: RouteTerms, avoid: Collection[str]) -> NDArray[np.bool_]:
        usable_N = self._serving_N & self._exact_N if terms.prefer_exact else self._serving_N.copy()
        usable_N[[self.index[peer] for peer in avoid if peer in self.index]] = False
        return usable_N

    def enter_s(self, terms: RouteTerms) -> Floats:
        full_N = self._free_N < terms.kv_bytes * self._share_N
        wait_s_N: Floats = self._queue_N * _QUEUE_S + full_N * _FULL_S
        return wait_s_N / terms.new_tokens


_last: tuple[object, int, _Table] | None = None


def _table(nodes: Sequence[NodeInfo], n_blocks: int) -> _Table:
    """The table of these nodes. That of the last tuple is kept: a snapshot is routed over many times."""
    global _last
    last = _last
    if last is not None and last[0] is nodes and last[1] == n_blocks:
        return last[2]
    table = _Table(nodes, n_blocks)
    if isinstance(nodes, tuple):
        _last = (nodes, n_blocks, table)
    return table


def _search(table: _Table, terms: RouteTerms, holds_BN: NDArray[np.bool_], admitted: Sequence[int]) -> Route | None:
    """The cheapest chain over `holds_BN`; `admitted` nodes have the session already and do not queue it."""
    nodes = table.nodes
    guess_s = terms.guessed_rtt_s / 2
    to_client_s = np.full(len(nodes), guess_s)
    for peer, rtt_s in terms.rtts_s.items():
        if peer in table.index:
            to_client_s[table.index[peer]] = rtt_s / 2
    enter_s_N = table.enter_s(terms)
    enter_s_N[list(admitted)] = 0.0
    seconds_N = table.step_s_N + table.prefill_s_N * (terms.prompt_tokens / terms.new_tokens)
    problem = Problem(
        block_s_BN=np.where(holds_BN, seconds_N, np.inf),
        enter_s_N=enter_s_N,
        first_s_N=to_client_s,
        last_s_N=to_client_s,
        links=table.links,
        guess_s=guess_s,
    )
    found = cheapest(problem)
    if found is None:
        return None
    token_s, pieces = found
    hops = tuple(Hop(nodes[i].peer_id, Span(start, end), nodes[i].addrs) for i, start, end in pieces)
    waits = tuple(nodes[i].peer_id for i, _, _ in pieces if enter_s_N[i] > 0)
    return Route(hops, token_s, waits)
