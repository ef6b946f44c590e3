"""Which span a node should hold, and when it should move to another. Pure and deterministic.

In: the nodes' records, the number of blocks, what fits on the node. Out: a span, or a move with its
reason. Never touches the network, the clock or a random source: every node that sees the same records
comes to the same conclusion about every other, which is what keeps them from moving at once.

A block's throughput is what its holders can give it if each spreads its speed evenly over its span; the
swarm's is its weakest block's (the rule of Petals, Borzunov et al. 2023, section 3.2). A joining node raises
the weakest blocks. A rebalance differs from Petals' in what its users complained of: decisions on records that
were about to change, and servers that moved at once. Here a whole plan is simulated, only its first move
may be made, only by the node it names, only while others hold all of its blocks; the mover says so first,
waits until everybody can have read it, and looks again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from swarm.errors import SpanError
from swarm.ids import Span
from swarm.net.cheapest import Floats, Ints
from swarm.net.view import NodeInfo

GUESSED_BLOCKS_S = 100.0
"""Blocks a second of a node that tells no speed."""
SETTLE_S = 6.0
"""From announcing a span or a move until it is acted on: three refreshes of a record, so that whoever else
had the same idea is seen."""
COOLDOWN_S = 120.0
"""A node that just settled stays: loading its weights again costs minutes."""
MIN_GAIN = 0.05
"""A plan must raise the swarm's throughput by this share; closer to what a plan would give, a swarm is left alone."""
_MAX_PLAN_MOVES = 128
_SHARPNESS = 30.0
"""Of the potential that stands for "the weakest block first": a block 10% under the mean counts e^3 times one at it."""


@dataclass(frozen=True)
class Move:
    span: Span
    before: float
    """Tokens a second through the weakest block now, and after the plan that the move begins."""
    after: float

    @property
    def reason(self) -> str:
        return f"the weakest block serves {self.before:.3g} tokens/s, {self.after:.3g} after moves that begin with this"


@dataclass(frozen=True)
class Decision:
    """What a node does about moving: stay, announce (publish `next_span`), withdraw it, or go."""

    kind: str
    reason: str
    span: Span | None = None


def blocks_per_s(node: NodeInfo) -> float:
    """A node's speed: blocks times rows that it decodes a second at the better of one and eight rows."""
    if not node.decode_s_per_block:
        return GUESSED_BLOCKS_S
    one = 1 / node.decode_s_per_block
    return max(one, 8 / node.decode8_s_per_block) if node.batching == "rows" and node.decode8_s_per_block else one


def choose_span(
    nodes: Sequence[NodeInfo], n_blocks: int, capacity: int, speed_blocks_s: float = GUESSED_BLOCKS_S
) -> Span:
    """The span for a joining node: as many blocks as fit, where it raises the weakest blocks most.

    Nodes that are still choosing or loading count as if they served. Of equally good spans the leftmost.
    Raises SpanError if not one block fits.
    """
    if capacity < 1:
        raise SpanError("not one block fits on this node", "raise --vram, or use a narrower --dtype")
    return _best_span(_throughputs(nodes, n_blocks), min(capacity, n_blocks), speed_blocks_s)


def settle_span(own: str, nodes: Sequence[NodeInfo], n_blocks: int) -> Span:
    """The span that a choosing node ends up with, `SETTLE_S` after it announced its choice.

    Several nodes may have chosen on the same records. All of them replay the choices in the order of peer
    ids, so that each comes to a span of its own. `nodes` holds the own record. Raises SpanError without it.
    """
    throughput_B = _throughputs([n for n in nodes if n.state != "choosing"], n_blocks)
    for node in sorted((n for n in nodes if n.state == "choosing"), key=lambda n: n.peer_id):
        span = _best_span(throughput_B, min(len(node.span), n_blocks), blocks_per_s(node))
        if node.peer_id == own:
            return span
        throughput_B[span.start : span.end] += blocks_per_s(node) / len(span)
    raise SpanError("this node's own record is not in the swarm yet", "wait until it is")


def consider_move(own: str, nodes: Sequence[NodeInfo], n_blocks: int, announced_for_s: float | None = None) -> Decision:
    """What node `own` does now; `announced_for_s`: for how long it has announced its `next_span`, if it has.

    Call every few seconds with fresh records. After "go" the node drains, then loads the new span with
    `next_span` still set, and clears it when it serves.
    """
    move = plan_move(own, nodes, n_blocks)
    mine = next((n for n in nodes if n.peer_id == own), None)
    if announced_for_s is None or mine is None or mine.next_span is None:
        return Decision("stay", "in a good place") if move is None else Decision("announce", move.reason, move.span)
    if move is None or move.span != mine.next_span:
        return Decision("withdraw", "the swarm changed: the announced move is not the best any more")
    if announced_for_s < SETTLE_S:
        return Decision("stay", "the move is announced; waiting whether others move", move.span)
    return Decision("go", move.reason, move.span)


def plan_move(
    own: str,
    nodes: Sequence[NodeInfo],
    n_blocks: int,
    *,
    min_gain: float = MIN_GAIN,
    cooldown_s: float = COOLDOWN_S,
) -> Move | None:
    """The move that node `own` should make, or None. `nodes` holds its own record.

    None unless the best plan for the whole swarm begins with this node, raises the weakest block by
    `min_gain` (or gives missing blocks a holder), and others serve all of its blocks already. While a
    node is choosing its span or another one is moving, nobody else begins; of two that announced a
    move, the lower peer id goes. A swarm with missing blocks does not wait for cooldowns.
    """
    mine = next((n for n in nodes if n.peer_id == own), None)
    if mine is None or not _may_begin(mine, nodes):
        return None
    # The plan is made as if nobody had announced anything: the announced move is what it must come to.
    nodes = sorted(
        (replace(n, next_span=None) if n.state == "serving" else n for n in nodes if n.span.end <= n_blocks),
        key=lambda n: n.peer_id,
    )
    throughput_B = _throughputs(nodes, n_blocks)
    missing = int((throughput_B <= 0).sum())
    movable = [n for n in nodes if n.state == "serving" and not n.pinned and (missing or n.settled_s >= cooldown_s)]
    if own not in {n.peer_id for n in movable}:
        return None
    plan = _Plan(movable, throughput_B, _holders(nodes, n_blocks))
    before = float(throughput_B.min())
    first: Span | None = None
    for _ in range(_MAX_PLAN_MOVES):
        step = plan.step()
        if step is None:
            return None
        peer_id, span = step
        if first is None:
            if peer_id != own:
                return None
            first = span
        after = float(plan.throughput_B.min())
        if int((plan.throughput_B <= 0).sum()) < missing or (not missing and after >= before * (1 + min_gain)):
            return Move(first, before, after)
    return None


def _may_begin(mine: NodeInfo, nodes: Sequence[NodeInfo]) -> bool:
    if mine.state != "serving" or mine.pinned:
        return False
    for other in nodes:
        if other.peer_id == mine.peer_id:
            continue
        if other.state == "choosing":
            return False
        if other.next_span is not None:
            under_way = other.state != "serving"
            if under_way or mine.next_span is None or other.peer_id < mine.peer_id:
                return False
    return True


def _throughputs(nodes: Sequence[NodeInfo], n_blocks: int) -> Floats:
    """Tokens a second that each block will get once all announced spans are served."""
    result = np.zeros(n_blocks)
    # Sorted: sums of floats must not depend on the order in which records came in.
    for node in sorted(nodes, key=lambda n: n.peer_id):
        span = node.next_span or (node.span if node.state != "draining" else None)
        if span is not None:
            result[span.start : span.end] += blocks_per_s(node) / len(span)
    return result


def _holders(nodes: Sequence[NodeInfo], n_blocks: int) -> Ints:
    """How many nodes serve each block now."""
    result = np.zeros(n_blocks, dtype=np.int64)
    for node in nodes:
        if node.state == "serving":
            result[node.span.start : node.span.end] += 1
    return result


def _best_span(throughput_B: Floats, length: int, speed_blocks_s: float) -> Span:
    """Where adding the node makes the sorted list of blocks' throughputs largest, weakest first."""
    n_blocks = len(throughput_B)
    starts = np.arange(n_blocks - length + 1)[:, None]
    blocks = np.arange(n_blocks)
    added_SB = np.where((blocks >= starts) & (blocks < starts + length), speed_blocks_s / length, 0.0)
    # Rounded: the last bits of a sum must not decide between equal places.
    scale = max(float(throughput_B.max()), speed_blocks_s / length)
    outcomes = np.sort(np.round((throughput_B + added_SB) / scale, 9), axis=1).tolist()
    start = max(range(len(outcomes)), key=lambda s: (outcomes[s], -s))
    return Span(start, start + length)


class _Plan:
    """A rebalance under simulation: one greedy move after the other.

    The measure is the sum over blocks of -exp(-sharpness x throughput / mean): it grows with every
    move that helps weak blocks more than it costs strong ones, also while several blocks are equally weak
    and no single move lifts them all. It grows strictly, so that a plan never goes in circles.
    """

    def __init__(self, movable: Sequence[NodeInfo], throughput_B: Floats, holders_B: Ints) -> None:
        self._peers = [n.peer_id for n in movable]
        self._starts = np.array([n.span.start for n in movable])
        self._lengths = np.array([len(n.span) for n in movable])
        self._share_N = np.array([blocks_per_s(n) for n in movable]) / self._lengths
        self._holders_B = holders_B.copy()
        self.throughput_B = throughput_B.copy()
        self._scale = max(float(throughput_B.mean()), 1e-12) / _SHARPNESS

    def step(self) -> tuple[str, Span] | None:
        """Make the best safe move in the simulation; None if none helps."""
        n_blocks = len(self.throughput_B)
        blocks = np.arange(n_blocks)
        starts, lengths = self._starts[:, None], self._lengths[:, None]
        own_NB = (blocks >= starts) & (blocks < starts + lengths)
        safe_N = ~(own_NB & (self._holders_B < 2)).any(axis=1)
        share = self._share_N[:, None]
        without_NB = np.maximum(self.throughput_B - share * own_NB, 0.0) / self._scale
        gain_NB = np.exp(-without_NB) * (1 - np.exp(-share / self._scale))
        total = np.concatenate((np.zeros((len(self._peers), 1)), np.cumsum(gain_NB, axis=1)), axis=1)
        ends = np.minimum(blocks + lengths, n_blocks)
        window_NS = np.take_along_axis(total, ends, axis=1) - total[:, :-1]
        window_NS[blocks + lengths > n_blocks] = -np.inf
        stay_N = np.take_along_axis(window_NS, starts, axis=1)
        better_NS = np.where(safe_N[:, None], window_NS - stay_N, -np.inf)
        # Peers are sorted and argmax takes the first: ties go to the lower peer id, then to the left.
        node, start = divmod(int(better_NS.argmax()), n_blocks)
        if better_NS[node, start] <= 1e-9 * abs(float(stay_N[node, 0])):
            return None
        length, old = int(self._lengths[node]), int(self._starts[node])
        self.throughput_B[old : old + length] -= self._share_N[node]
        self.throughput_B[start : start + length] += self._share_N[node]
        # Sums that came back to nothing must be nothing.
        self.throughput_B[np.abs(self.throughput_B) < 1e-9 * self._scale] = 0.0
        self._holders_B[old : old + length] -= 1
        self._holders_B[start : start + length] += 1
        self._starts[node] = start
        return self._peers[node], Span(start, start + length)
