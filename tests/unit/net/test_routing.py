from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import BlocksMissing
from swarm.ids import Span, missing_blocks
from swarm.net.routing import choose_span, find_chain
from swarm.net.view import NodeInfo

N = 12


def node(name: str, start: int, end: int, sessions: int = 0, state: str = "serving") -> NodeInfo:
    return NodeInfo(name, Span(start, end), (f"/ip4/127.0.0.1/tcp/1/p2p/{name}",), "float32", sessions, state)


spans = st.tuples(st.integers(0, N - 1), st.integers(1, N)).filter(lambda pair: pair[0] < pair[1])
swarms = st.lists(st.tuples(spans, st.integers(0, 3), st.sampled_from(["serving", "draining"])), max_size=8).map(
    lambda rows: [node(f"n{i}", *span, sessions, state) for i, (span, sessions, state) in enumerate(rows)]
)


def test_fewest_hops_then_least_load() -> None:
    nodes = [node("a", 0, 6), node("b", 6, 12), node("c", 0, 12, sessions=5), node("d", 0, 12, sessions=1)]
    assert [h.peer_id for h in find_chain(nodes, N)] == ["d"]
    assert [h.peer_id for h in find_chain(nodes, N, avoid={"d"})] == ["c"]
    halves = find_chain(nodes, N, avoid={"c", "d"})
    assert [(h.peer_id, str(h.span)) for h in halves] == [("a", "0:6"), ("b", "6:12")]


def test_overlapping_spans_are_trimmed_to_join() -> None:
    hops = find_chain([node("a", 0, 8), node("b", 4, 12)], N)
    assert [str(h.span) for h in hops] == ["0:8", "8:12"]


def test_missing_blocks_are_named() -> None:
    with pytest.raises(BlocksMissing, match="blocks 0-1, 5, 9-11"):
        find_chain([node("a", 2, 5), node("b", 6, 9)], N)
    with pytest.raises(BlocksMissing, match="block 11"):
        find_chain([node("a", 0, 11), node("b", 0, 12, state="draining")], N)


@given(swarms)
def test_a_chain_covers_every_block_once_with_nodes_that_hold_them(nodes: list[NodeInfo]) -> None:
    usable = {n.peer_id: n for n in nodes if n.state == "serving"}
    missing = missing_blocks((n.span for n in usable.values()), N)
    if missing:
        with pytest.raises(BlocksMissing):
            find_chain(nodes, N)
        return
    hops = find_chain(nodes, N)
    assert [b for h in hops for b in range(h.span.start, h.span.end)] == list(range(N))
    assert len({h.peer_id for h in hops}) == len(hops)
    assert all(usable[h.peer_id].span.covers(h.span) for h in hops)


@given(swarms, st.integers(1, 20))
def test_the_chosen_span_holds_the_least_covered_block(nodes: list[NodeInfo], capacity: int) -> None:
    span = choose_span(nodes, N, capacity)
    assert len(span) == min(capacity, N)
    coverage = [sum(b in n.span for n in nodes if n.state == "serving") for b in range(N)]
    assert min(coverage[span.start : span.end]) == min(coverage)


def test_an_empty_swarm_is_filled_from_the_left() -> None:
    assert choose_span([], N, 5) == Span(0, 5)
    assert choose_span([node("a", 0, 5)], N, 5) == Span(5, 10)
