"""Span records: what survives the wire, what is refused, and how fast a dead node is gone."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from hypothesis import given
from hypothesis import strategies as st

from swarm.ids import Span
from swarm.net.discovery import (
    MAX_RECORD_BYTES,
    RECORD_TTL_S,
    REFRESH_S,
    node_info,
    publish_status,
    snapshot,
    span_record,
)
from swarm.net.p2p import Peer
from swarm.net.view import NodeStatus
from swarm.wire.v1 import common_pb2, records_pb2

StartPeer = Callable[[str], Awaitable[Peer]]
MODEL = b"\x01" * 32
STATUS = NodeStatus(
    span=Span(3, 9),
    state="joining",
    reason="loading the weights",
    dtype="bfloat16",
    quantization="int8",
    batching="one",
    decode_s_per_block=0.5,
    decode8_s_per_block=0.75,
    prefill_tokens_per_s=1024.0,
    link_bytes_per_s=2.0**20,
    sessions=3,
    queue=2,
    kv_free_bytes=2**33,
    kv_total_bytes=2**34,
    epoch=7,
    settled_s=64.0,
    pinned=True,
    next_span=Span(0, 6),
    rtts_s=(("12D3KooWa", 0.015625), ("12D3KooWb", 0.25)),
)


def test_a_status_comes_back_as_it_was() -> None:
    record = span_record(STATUS, ["/ip4/1.2.3.4/tcp/1"]).SerializeToString()
    node = node_info("me", record)
    assert node is not None
    assert node.peer_id == "me"
    assert node.addrs == ("/ip4/1.2.3.4/tcp/1",)
    assert {name: getattr(node, name) for name in vars(STATUS)} == vars(STATUS)


def test_the_largest_record_stays_under_its_limit() -> None:
    rtts = tuple((f"12D3KooW{i:044d}", 0.1 + i) for i in range(40))
    status = NodeStatus(span=Span(0, 10**6), reason="ü" * 500, rtts_s=rtts, kv_free_bytes=2**60, kv_total_bytes=2**60)
    addrs = ["/ip4/255.255.255.255/tcp/65535/p2p/12D3KooW" + "x" * 110] * 20
    record = span_record(status, addrs).SerializeToString()
    assert len(record) < MAX_RECORD_BYTES
    node = node_info("me", record)
    assert node is not None
    assert node.rtts_s[0][0] == rtts[0][0]
    assert len(node.rtts_s) == 16
    assert node_info("me", record + bytes(MAX_RECORD_BYTES)) is None


@given(st.binary(max_size=200), st.sampled_from([float("nan"), float("inf"), -1.0]))
def test_hostile_records_are_left_out_or_made_harmless(garbage: bytes, number: float) -> None:
    node_info("x", garbage)
    span = common_pb2.Span(start=0, end=4)
    hostile = records_pb2.SpanRecord(
        span=span,
        state="serving",
        decode_s_per_block=number,
        prefill_tokens_per_s=number,
        neighbours=[records_pb2.Neighbour(peer_id="y", rtt_ms=number)],
    )
    node = node_info("x", hostile.SerializeToString())
    assert node is not None
    assert (node.decode_s_per_block, node.prefill_tokens_per_s, node.rtts_s) == (0.0, 0.0, ())
    for record in (
        records_pb2.SpanRecord(span=span, state="great"),
        records_pb2.SpanRecord(span=common_pb2.Span(start=4, end=4), state="serving"),
    ):
        assert node_info("x", record.SerializeToString()) is None


def test_the_times_leave_room_for_clocks_and_lost_writes() -> None:
    """See docs/adr/0004."""
    skew_s = 3.0
    assert RECORD_TTL_S + skew_s <= 10.0
    assert RECORD_TTL_S - skew_s >= 2 * REFRESH_S
    assert RECORD_TTL_S >= 3 * REFRESH_S


LEAVING = NodeStatus(span=Span(3, 9), state="draining", reason="the node is shutting down")


async def test_records_are_seen_at_once_and_dead_nodes_leave_in_time(start_peer: StartPeer) -> None:
    reader, node, dying = await start_peer("reader"), await start_peer("node"), await start_peer("dying")
    assert await publish_status(node, MODEL, STATUS)
    assert await publish_status(dying, MODEL, NodeStatus(span=Span(0, 3), sessions=1))
    died_s = time.monotonic()
    await dying.stop()
    view = await snapshot(reader, MODEL)
    assert {n.peer_id: n.span for n in view.nodes} == {node.peer_id: Span(3, 9), dying.peer_id: Span(0, 3)}
    # A node that leaves says so, and its older record does not come back.
    assert await publish_status(node, MODEL, LEAVING)
    states = {n.peer_id: (n.state, n.reason) for n in (await snapshot(reader, MODEL)).nodes}
    assert states[node.peer_id] == ("draining", "the node is shutting down")
    # Nothing tells of an expiry: looking is the only way to see it.
    while dying.peer_id in {n.peer_id for n in (await snapshot(reader, MODEL)).nodes}:
        assert time.monotonic() - died_s < 2 * RECORD_TTL_S
    assert RECORD_TTL_S - 1.5 < time.monotonic() - died_s < 10.0


async def test_a_node_that_was_started_again_is_one_node_to_others(start_peer: StartPeer) -> None:
    """Else it would be sent every record twice, refuse the second, and look as if it had none."""
    reader, node, again = await start_peer("reader"), await start_peer("node"), await start_peer("again")
    assert await publish_status(again, MODEL, STATUS)
    for _ in range(2):
        await again.stop()
        again = await start_peer("again")
        for peer in (reader, node, again):
            assert await publish_status(peer, MODEL, STATUS)
    for peer in (reader, node):
        known = [found.to_base58() for found in peer._dht.protocol.routing_table.uid_to_peer_id.values()]
        assert known.count(again.peer_id) == 1
    assert len((await snapshot(node, MODEL)).nodes) == 3
