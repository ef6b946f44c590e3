"""Pings between real peers, and whom a node pings."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from swarm.errors import PeerLost, ProtocolError
from swarm.ids import Span
from swarm.net.p2p import Peer
from swarm.net.ping import (
    PROBE_BYTES,
    PROTOCOL,
    measure,
    measure_many,
    median_bytes_per_s,
    serve_pings,
    worth_measuring,
)
from swarm.net.view import NodeInfo
from swarm.wire.frames import FrameStream
from swarm.wire.v1 import records_pb2 as pb

StartPeer = Callable[[str], Awaitable[Peer]]


def info(peer: Peer) -> NodeInfo:
    return NodeInfo(peer_id=peer.peer_id, span=Span(0, 1), addrs=peer.addrs)


async def test_rtt_and_bandwidth_of_a_peer_on_loopback(start_peer: StartPeer) -> None:
    one, two, silent = await start_peer("one"), await start_peer("two"), await start_peer("silent")
    await serve_pings(two)
    distance = await measure(one, info(two), probe_bytes=PROBE_BYTES)
    assert 0 < distance.rtt_s < 0.5
    assert distance.bytes_per_s > 1e5
    # Oneself is not asked; a peer that does not speak the protocol is left out.
    found = await measure_many(one, [info(one), info(two), info(silent)])
    assert found.keys() == {two.peer_id}
    assert found[two.peer_id].bytes_per_s == 0
    assert median_bytes_per_s(found.values()) == 0
    assert median_bytes_per_s([distance]) == distance.bytes_per_s


async def test_a_peer_that_is_gone_or_answers_nonsense(start_peer: StartPeer) -> None:
    one, two, gone = await start_peer("one"), await start_peer("two"), await start_peer("gone")
    left = info(gone)
    await gone.stop()
    with pytest.raises(PeerLost, match=gone.peer_id):
        await measure(one, left, timeout_s=2.0)

    async def nonsense(stream: FrameStream[pb.PingFrame]) -> None:
        while await stream.receive() is not None:
            await stream.send(pb.PingFrame(number=99))

    await two.serve(PROTOCOL, pb.PingFrame, nonsense)
    with pytest.raises(ProtocolError, match="answered ping 99"):
        await measure(one, info(two))


async def test_a_stream_is_answered_so_often_and_no_more(start_peer: StartPeer) -> None:
    one, two = await start_peer("one"), await start_peer("two")
    await serve_pings(two)
    stream = await one.dial(two.peer_id, two.addrs, PROTOCOL, pb.PingFrame)
    answers = 0
    for number in range(100):
        try:
            await stream.send(pb.PingFrame(number=number))
            received = await stream.receive()
        except PeerLost:
            break
        if received is None:
            break
        answers += 1
    assert answers == 32


def test_neighbours_in_a_chain_are_worth_measuring() -> None:
    def node(name: str, start: int, end: int, **status: object) -> NodeInfo:
        return NodeInfo(peer_id=name, span=Span(start, end), **status)  # type: ignore[arg-type]

    own = node("own", 4, 8)
    nodes = [
        own,
        node("next", 8, 12),
        node("busy", 8, 12, sessions=9),
        node("before", 0, 4),
        node("overlaps", 6, 10),
        node("same", 4, 8),
        node("far", 9, 12),
        node("leaving", 8, 12, state="draining"),
    ]
    assert [n.peer_id for n in worth_measuring(own, nodes)] == ["before", "next", "busy", "overlaps"]
    assert len(worth_measuring(own, nodes, count=2)) == 2
