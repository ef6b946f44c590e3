"""Which span a node takes and when it moves: single decisions. The long run is in tests/scenario."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import SpanError
from swarm.ids import Span
from swarm.net.placement import SETTLE_S, blocks_per_s, choose_span, consider_move, plan_move, settle_span
from swarm.net.view import NodeInfo

N = 12


def node(name: str, start: int, end: int, **status: object) -> NodeInfo:
    settled = {"settled_s": 1000.0, "decode_s_per_block": 0.01, **status}
    return NodeInfo(peer_id=name, span=Span(start, end), **settled)  # type: ignore[arg-type]


@st.composite
def swarms(draw: st.DrawFn) -> list[NodeInfo]:
    nodes = []
    for index in range(draw(st.integers(0, 7))):
        start = draw(st.integers(0, N - 1))
        end = draw(st.integers(start + 1, N))
        moving = draw(st.sampled_from([False] * 5 + [True]))
        length = end - start
        target = draw(st.integers(0, N - length))
        nodes.append(
            node(
                f"n{index}",
                start,
                end,
                state=draw(st.sampled_from(["serving"] * 6 + ["draining", "joining", "choosing"])),
                decode_s_per_block=draw(st.sampled_from([0.0, 0.002, 0.01, 0.05])),
                pinned=draw(st.sampled_from([False, False, True])),
                settled_s=draw(st.sampled_from([5.0, 1000.0])),
                next_span=Span(target, target + length) if moving else None,
            )
        )
    return nodes


def throughputs(nodes: list[NodeInfo]) -> list[float]:
    return [sum(blocks_per_s(n) / len(n.span) for n in nodes if block in n.span) for block in range(N)]


@given(swarms(), st.integers(1, 20))
def test_the_chosen_span_holds_a_weakest_block(nodes: list[NodeInfo], capacity: int) -> None:
    nodes = [replace(n, next_span=None) for n in nodes if n.state != "draining"]
    span = choose_span(nodes, N, capacity)
    assert len(span) == min(capacity, N)
    weakest = throughputs(nodes)
    assert min(weakest[span.start : span.end]) == pytest.approx(min(weakest))


def test_an_empty_swarm_is_filled_from_the_left() -> None:
    assert choose_span([], N, 5) == Span(0, 5)
    assert choose_span([node("a", 0, 5)], N, 5) == Span(5, 10)
    with pytest.raises(SpanError, match="not one block fits"):
        choose_span([], N, 0)


def test_a_slow_holder_counts_less_than_a_fast_one() -> None:
    nodes = [node("a", 0, 6, decode_s_per_block=0.1), node("b", 6, 12, decode_s_per_block=0.01)]
    assert choose_span(nodes, N, 6) == Span(0, 6)


def test_those_who_load_count_and_those_who_leave_do_not() -> None:
    assert choose_span([node("a", 0, 6, state="joining")], N, 6) == Span(6, 12)
    assert choose_span([node("a", 0, 6, state="draining"), node("b", 6, 12)], N, 6) == Span(0, 6)


def test_nodes_that_chose_on_the_same_records_settle_on_different_spans() -> None:
    swarm = [node("old", 0, 3)]
    choosing = [replace(node(name, 3, 6), state="choosing") for name in ("x", "y", "z")]
    spans = {c.peer_id: settle_span(c.peer_id, [*swarm, *choosing], N) for c in choosing}
    assert sorted(spans.values()) == [Span(3, 6), Span(6, 9), Span(9, 12)]
    with pytest.raises(SpanError, match="own record"):
        settle_span("w", [*swarm, *choosing], N)


def crowded() -> list[NodeInfo]:
    """Three nodes on the left half, one on the right."""
    return [node("a", 0, 6), node("b", 0, 6), node("c", 0, 6), node("d", 6, 12)]


def test_one_node_moves_to_where_it_helps_and_the_others_stay() -> None:
    nodes = crowded()
    moves = {n.peer_id: plan_move(n.peer_id, nodes, N) for n in nodes}
    assert [peer for peer, move in moves.items() if move is not None] == ["a"]
    move = moves["a"]
    assert move is not None
    assert move.span == Span(6, 12)
    assert move.after == pytest.approx(2 * move.before)
    assert "tokens/s" in move.reason


def test_no_move_where_it_would_open_a_gap_or_gain_little() -> None:
    assert plan_move("a", [node("a", 0, 6), node("b", 6, 12, decode_s_per_block=0.1)], N) is None
    balanced = [node("a", 0, 6), node("b", 0, 6), node("c", 6, 12), node("d", 6, 12, decode_s_per_block=0.0108)]
    assert all(plan_move(n.peer_id, balanced, N) is None for n in balanced)


def test_a_missing_block_does_not_wait_for_cooldowns() -> None:
    nodes = [node("a", 0, 6, settled_s=3.0), node("b", 0, 6, settled_s=3.0)]
    assert plan_move("a", nodes, N) is not None
    assert plan_move("a", [replace(n, pinned=True) for n in nodes], N) is None
    crowd = [replace(n, settled_s=3.0) for n in crowded()]
    assert all(plan_move(n.peer_id, crowd, N) is None for n in crowd)


def test_nobody_begins_while_another_moves_or_chooses() -> None:
    nodes = crowded()
    for other in (
        node("e", 0, 3, state="choosing"),
        node("e", 0, 3, next_span=Span(6, 9)),
        node("e", 0, 3, state="draining", next_span=Span(6, 9)),
        node("e", 6, 9, state="joining", next_span=Span(6, 9)),
    ):
        assert plan_move("a", [*nodes, other], N) is None


def test_a_move_is_announced_watched_and_then_made() -> None:
    nodes = crowded()
    first = consider_move("a", nodes, N)
    assert (first.kind, first.span) == ("announce", Span(6, 12))
    nodes[0] = replace(nodes[0], next_span=first.span)
    assert consider_move("a", nodes, N, announced_for_s=1.0).kind == "stay"
    assert consider_move("a", nodes, N, announced_for_s=SETTLE_S).kind == "go"
    # Another node had the same idea on older records: the lower peer id goes, the other takes it back.
    nodes[1] = replace(nodes[1], next_span=first.span)
    assert consider_move("a", nodes, N, announced_for_s=SETTLE_S).kind == "go"
    assert consider_move("b", nodes, N, announced_for_s=SETTLE_S).kind == "withdraw"
    # Somebody joined meanwhile, and there is nothing to gain any more.
    joined = [*nodes[:1], *crowded()[1:], node("e", 6, 12, decode_s_per_block=0.003)]
    assert consider_move("a", joined, N, announced_for_s=SETTLE_S).kind == "withdraw"


@given(swarms())
def test_at_most_one_node_begins_and_its_blocks_stay_held(nodes: list[NodeInfo]) -> None:
    moves = [(n, plan_move(n.peer_id, nodes, N)) for n in nodes]
    begun = [(n, move) for n, move in moves if move is not None]
    assert len(begun) <= 1
    for mover, move in begun:
        assert len(move.span) == len(mover.span)
        others = [n for n in nodes if n is not mover and n.state == "serving"]
        assert all(any(block in n.span for n in others) for block in range(mover.span.start, mover.span.end))
        assert not mover.pinned
