"""The router against brute force on small swarms, and what a route never does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import BlocksMissing
from swarm.ids import Span, missing_blocks
from swarm.net.routing import Route, RouteTerms, block_s, enter_s, find_replacement, find_route
from swarm.net.view import Hop, NodeInfo

N = 6
SPEEDS = [0.001, 0.003, 0.02, 0.1]
RTTS = [0.001, 0.02, 0.1, 0.4]


def node(name: str, start: int, end: int, **status: object) -> NodeInfo:
    return NodeInfo(peer_id=name, span=Span(start, end), addrs=(f"/ip4/127.0.0.1/tcp/1/p2p/{name}",), **status)  # type: ignore[arg-type]


@st.composite
def swarms(draw: st.DrawFn, most: int = 5) -> list[NodeInfo]:
    names = [f"n{i}" for i in range(draw(st.integers(0, most)))]
    nodes = []
    for name in names:
        start = draw(st.integers(0, N - 1))
        neighbours = draw(st.lists(st.sampled_from(names), unique=True, max_size=3))
        nodes.append(
            node(
                name,
                start,
                draw(st.integers(start + 1, N)),
                state=draw(st.sampled_from(["serving"] * 5 + ["draining", "joining"])),
                quantization=draw(st.sampled_from(["none", "none", "int8"])),
                decode_s_per_block=draw(st.sampled_from(SPEEDS)),
                decode8_s_per_block=draw(st.sampled_from(SPEEDS)),
                prefill_tokens_per_s=draw(st.sampled_from([0.0, 50.0, 4000.0])),
                sessions=draw(st.sampled_from([0, 1, 3, 12])),
                queue=draw(st.sampled_from([0, 0, 2])),
                kv_free_bytes=draw(st.integers(0, 200)),
                kv_total_bytes=draw(st.sampled_from([0, 200])),
                batching=draw(st.sampled_from(["rows", "one"])),
                rtts_s=tuple((peer, draw(st.sampled_from(RTTS))) for peer in neighbours),
            )
        )
    return nodes


@st.composite
def terms_of(draw: st.DrawFn) -> RouteTerms:
    return RouteTerms(
        rtts_s=draw(st.dictionaries(st.sampled_from([f"n{i}" for i in range(5)]), st.sampled_from(RTTS))),
        guessed_rtt_s=draw(st.sampled_from([0.0, 0.02, 0.1])),
        prefer_exact=draw(st.booleans()),
        kv_bytes=draw(st.sampled_from([0, 300])),
        prompt_tokens=draw(st.sampled_from([0, 64])),
        new_tokens=draw(st.sampled_from([1, 64])),
    )


def usable(nodes: Sequence[NodeInfo], terms: RouteTerms, avoid: Sequence[str] = ()) -> list[NodeInfo]:
    exact = [n for n in nodes if not terms.prefer_exact or n.quantization == "none"]
    return [n for n in exact if n.state == "serving" and n.peer_id not in avoid]


def cost_s(hops: Sequence[tuple[NodeInfo, Span]], terms: RouteTerms) -> float:
    """The prediction spelled out, apart from the search."""
    first, last = hops[0][0], hops[-1][0]
    total = (
        terms.rtts_s.get(first.peer_id, terms.guessed_rtt_s) + terms.rtts_s.get(last.peer_id, terms.guessed_rtt_s)
    ) / 2
    for holder, span in hops:
        total += enter_s(holder, N, terms) + len(span) * block_s(holder, terms)
    for (a, _), (b, _) in pairwise(hops):
        told = [*(s for p, s in a.rtts_s if p == b.peer_id), *(s for p, s in b.rtts_s if p == a.peer_id)]
        total += min(told, default=terms.guessed_rtt_s) / 2
    return total


def every_chain(nodes: Sequence[NodeInfo], start: int = 0) -> Iterator[list[tuple[NodeInfo, Span]]]:
    if start == N:
        yield []
    for holder in nodes:
        if start in holder.span:
            for end in range(start + 1, holder.span.end + 1):
                for rest in every_chain([n for n in nodes if n is not holder], end):
                    yield [(holder, Span(start, end)), *rest]


def check_chain(hops: Sequence[Hop], nodes: Sequence[NodeInfo]) -> None:
    by_id = {n.peer_id: n for n in nodes}
    assert [b for h in hops for b in range(h.span.start, h.span.end)] == list(range(N))
    assert len({h.peer_id for h in hops}) == len(hops)
    assert all(by_id[h.peer_id].span.covers(h.span) for h in hops)


@given(swarms(), terms_of(), st.lists(st.sampled_from(["n0", "n1"]), max_size=1))
def test_no_chain_is_faster_than_the_route(nodes: list[NodeInfo], terms: RouteTerms, avoid: list[str]) -> None:
    candidates = usable(nodes, terms, avoid)
    best = min((cost_s(chain, terms) for chain in every_chain(candidates)), default=None)
    if best is None:
        assert missing_blocks((n.span for n in candidates), N)
        with pytest.raises(BlocksMissing):
            find_route(nodes, N, terms, avoid=avoid)
        return
    route = find_route(nodes, N, terms, avoid=avoid)
    check_chain(route.hops, candidates)
    by_id = {n.peer_id: n for n in nodes}
    assert route.token_s == pytest.approx(best)
    assert cost_s([(by_id[h.peer_id], h.span) for h in route.hops], terms) == pytest.approx(best)


@given(swarms(), st.randoms())
def test_the_order_of_records_does_not_matter(nodes: list[NodeInfo], random: object) -> None:
    shuffled = list(nodes)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert _try(nodes) == _try(shuffled)


def _try(nodes: Sequence[NodeInfo], terms: RouteTerms | None = None) -> Route | str:
    try:
        return find_route(nodes, N, terms)
    except BlocksMissing as error:
        return error.cause


@given(swarms(), terms_of(), st.integers(0, 4), st.sampled_from(["decode_s_per_block", "decode8_s_per_block"]))
def test_a_faster_node_never_makes_the_prediction_worse(
    nodes: list[NodeInfo], terms: RouteTerms, which: int, speed: str
) -> None:
    before = _try(nodes, terms)
    if isinstance(before, str) or which >= len(nodes):
        return
    faster = list(nodes)
    faster[which] = replace(nodes[which], **{speed: getattr(nodes[which], speed) / 3})
    after = _try(faster, terms)
    assert isinstance(after, Route)
    assert after.token_s <= before.token_s + 1e-12


@given(swarms(), terms_of(), st.data())
def test_a_replacement_keeps_every_surviving_hop(nodes: list[NodeInfo], terms: RouteTerms, data: st.DataObject) -> None:
    route = _try(nodes, terms)
    if isinstance(route, str):
        return
    lost = data.draw(st.sets(st.sampled_from([h.peer_id for h in route.hops]), min_size=1))
    rest = [n for n in usable(nodes, terms) if n.peer_id not in lost]
    kept = [h for h in route.hops if h.peer_id not in lost]
    # What the nodes alone allow, by brute force: chains that contain every kept hop.
    fills = [
        chain
        for chain in every_chain(rest)
        if all((k.peer_id, k.span) in [(n.peer_id, s) for n, s in chain] for k in kept)
    ]
    try:
        found = find_replacement(nodes, N, route.hops, lost, terms)
    except BlocksMissing:
        assert missing_blocks((n.span for n in rest), N)
        return
    check_chain(found.route.hops, rest)
    assert bool(found.kept) == bool(kept and fills)
    if found.kept:
        assert list(found.kept) == kept
        assert all(hop in found.route.hops for hop in kept)


def test_a_fill_may_take_several_nodes_and_keeps_hops_without_a_record() -> None:
    hops = (Hop("a", Span(0, 2), ("x",)), Hop("b", Span(2, 5), ()), Hop("c", Span(5, 6), ("y",)))
    # c drains and a's record is gone: both still hold the session's caches.
    nodes = [node("c", 4, 6, state="draining"), node("d", 0, 4), node("e", 3, 6)]
    found = find_replacement(nodes, 6, hops, {"b"})
    assert [(h.peer_id, str(h.span)) for h in found.route.hops] in (
        [("a", "0:2"), ("d", "2:3"), ("e", "3:5"), ("c", "5:6")],
        [("a", "0:2"), ("d", "2:4"), ("e", "4:5"), ("c", "5:6")],
    )
    assert found.route.hops[0] == hops[0]
    assert found.reason == "2 of 3 hops kept"


def test_without_a_fill_the_whole_route_is_new_and_says_so() -> None:
    hops = (Hop("a", Span(0, 3), ()), Hop("b", Span(3, 6), ()))
    # Only a itself could fill b's blocks, but its hop stays as it is.
    found = find_replacement([node("a", 0, 6), node("b", 3, 6)], 6, hops, {"b"})
    assert [(h.peer_id, str(h.span)) for h in found.route.hops] == [("a", "0:6")]
    assert found.kept == ()
    assert found.reason == "nobody else fills blocks 3:6: a whole new route"
    with pytest.raises(BlocksMissing, match="blocks 3-5"):
        find_replacement([node("a", 0, 3), node("b", 3, 6)], 6, hops, {"b"})


def test_fewest_hops_then_least_load() -> None:
    nodes = [node("a", 0, 3), node("b", 3, 6), node("c", 0, 6, sessions=5), node("d", 0, 6, sessions=1)]
    assert [h.peer_id for h in find_route(nodes, N).hops] == ["d"]
    assert [h.peer_id for h in find_route(nodes, N, avoid={"d"}).hops] == ["c"]
    halves = find_route(nodes, N, avoid={"c", "d"}).hops
    assert [(h.peer_id, str(h.span)) for h in halves] == [("a", "0:3"), ("b", "3:6")]


def test_measured_links_beat_fewer_hops_elsewhere() -> None:
    near = [node("a", 0, 3, rtts_s=(("b", 0.002),)), node("b", 3, 6)]
    far = [node("c", 0, 6)]
    terms = RouteTerms(rtts_s={"a": 0.002, "b": 0.002, "c": 0.2})
    assert [h.peer_id for h in find_route([*near, *far], N, terms).hops] == ["a", "b"]


def test_a_full_node_is_used_last_and_named() -> None:
    full = node("full", 0, 6, kv_free_bytes=10, kv_total_bytes=100)
    roomy = node("roomy", 0, 6, kv_free_bytes=90, kv_total_bytes=100, sessions=2)
    terms = RouteTerms(kv_bytes=50)
    assert find_route([full, roomy], N, terms).may_wait == ()
    assert find_route([full, roomy], N, terms, avoid={"roomy"}).may_wait == ("full",)


def test_missing_blocks_are_named() -> None:
    with pytest.raises(BlocksMissing, match="no node holds blocks 0-1, 4"):
        find_route([node("a", 2, 4), node("b", 5, 6)], N)
    with pytest.raises(BlocksMissing, match="block 5"):
        find_route([node("a", 0, 5), node("b", 0, 6, state="draining")], N)
    with pytest.raises(BlocksMissing, match="no unquantized node holds block 5"):
        find_route([node("a", 0, 5), node("b", 0, 6, quantization="int8")], N, RouteTerms(prefer_exact=True))
    with pytest.raises(BlocksMissing, match="blocks 0-5"):
        find_route([], N)
