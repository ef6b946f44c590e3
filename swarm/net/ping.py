"""How far other peers are: round trips and bandwidth, measured over a libp2p stream.

In: a running `Peer`. Out: seconds and bytes a second, as this process sees them now; a peer that does not
answer in time has none. It measures, and decides nothing. A frame is answered by one with its number; the
payload of a frame is what bandwidth is measured with, and goes one way only.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass

from swarm.errors import PeerLost, ProtocolError, SwarmError
from swarm.net.p2p import Peer
from swarm.net.view import MAX_NEIGHBOURS, NodeInfo
from swarm.wire.frames import FrameStream
from swarm.wire.v1 import records_pb2 as pb

PROTOCOL = "/swarm/ping/1"
PROBE_BYTES = 256 * 1024
_ROUNDS = 5
_MAX_FRAMES = 32
"""Of one stream, that a peer answers: a measurement takes a handful."""
_STREAM_S = 30.0
_MAX_STREAMS = 64
_AT_ONCE = 8
_TIMEOUT_S = 3.0
Stream = FrameStream[pb.PingFrame]


@dataclass(frozen=True)
class Distance:
    """What one measurement found."""

    rtt_s: float
    """The least of a few: what the way takes when nothing else is in it."""
    bytes_per_s: float
    """One way, from here; 0 if it was not asked for."""


async def serve_pings(peer: Peer) -> None:
    """Answer others. Bounded: streams beyond a cap, frames beyond a count and slow streams are closed."""
    open_streams = 0

    async def handle(stream: Stream) -> None:
        nonlocal open_streams
        if open_streams >= _MAX_STREAMS:
            return
        open_streams += 1
        try:
            async with asyncio.timeout(_STREAM_S):
                for _ in range(_MAX_FRAMES):
                    received = await stream.receive()
                    if received is None or len(received[1]) > PROBE_BYTES:
                        return
                    await stream.send(pb.PingFrame(number=received[0].number))
        except TimeoutError:
            return
        finally:
            open_streams -= 1

    await peer.serve(PROTOCOL, pb.PingFrame, handle, max_received_bytes=PROBE_BYTES)


async def measure(peer: Peer, node: NodeInfo, *, probe_bytes: int = 0, timeout_s: float = _TIMEOUT_S) -> Distance:
    """Measure one node; with `probe_bytes` (at most 256 KiB), the bandwidth too. Raises PeerLost, ProtocolError."""
    try:
        async with asyncio.timeout(timeout_s):
            stream: Stream = await peer.dial(node.peer_id, node.addrs, PROTOCOL, pb.PingFrame, timeout_s=timeout_s)
            try:
                # The first exchange also pays for opening the stream, so it does not count.
                await _exchange(stream, 0)
                rtt_s = min([await _exchange(stream, number) for number in range(1, _ROUNDS)])
                if not probe_bytes:
                    return Distance(rtt_s, 0.0)
                probe = bytes(min(probe_bytes, PROBE_BYTES))
                whole_s = await _exchange(stream, _ROUNDS, probe)
                return Distance(rtt_s, len(probe) / max(whole_s - rtt_s, 1e-6))
            finally:
                stream.close()
    except TimeoutError as error:
        raise PeerLost(f"node {node.peer_id} did not answer pings within {timeout_s:g} s") from error


async def _exchange(stream: Stream, number: int, payload: bytes = b"") -> float:
    start_s = time.perf_counter()
    await stream.send(pb.PingFrame(number=number), payload)
    received = await stream.receive()
    if received is None:
        raise PeerLost(f"node {stream.peer} closed its ping stream")
    if received[0].number != number:
        raise ProtocolError(f"node {stream.peer} answered ping {received[0].number} instead of {number}")
    return time.perf_counter() - start_s


async def measure_many(
    peer: Peer, nodes: Iterable[NodeInfo], *, probe_bytes: int = 0, timeout_s: float = _TIMEOUT_S
) -> dict[str, Distance]:
    """Measure several nodes, a few at a time, by peer id. Nodes that do not answer are left out."""
    turn = asyncio.Semaphore(_AT_ONCE)

    async def one(node: NodeInfo) -> tuple[str, Distance] | None:
        async with turn:
            try:
                return node.peer_id, await measure(peer, node, probe_bytes=probe_bytes, timeout_s=timeout_s)
            except SwarmError:
                return None

    found = await asyncio.gather(*(one(node) for node in nodes if node.peer_id != peer.peer_id))
    return dict(pair for pair in found if pair is not None)


def worth_measuring(own: NodeInfo, nodes: Iterable[NodeInfo], count: int = MAX_NEIGHBOURS) -> list[NodeInfo]:
    """The nodes whose distance a route may ask for: those that can precede or follow this one in a chain.

    Those that meet the span's ends come first, then the less loaded; pure, in a fixed order.
    """

    def order(node: NodeInfo) -> tuple[bool, int, str]:
        return node.span.start != own.span.end and node.span.end != own.span.start, node.sessions, node.peer_id

    joins = [
        n
        for n in nodes
        if n.peer_id != own.peer_id
        and n.state == "serving"
        and n.span.start <= own.span.end
        and own.span.start <= n.span.end
        and n.span != own.span
    ]
    return sorted(joins, key=order)[:count]


def median_bytes_per_s(distances: Iterable[Distance]) -> float:
    """A node's own link, for its record; 0 if nothing was measured."""
    return statistics.median([d.bytes_per_s for d in distances if d.bytes_per_s] or [0.0])
