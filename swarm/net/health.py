"""Is a node alive, and does it get on? Asked over a stream of its own, answered from its event loop.

A frozen process keeps its connections open, and a busy one answers late; only silence here tells them
apart. One stream per node, requests answered in order, so that many sessions can ask at once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from swarm.errors import PeerLost, ProtocolError, SwarmError
from swarm.net.p2p import Peer
from swarm.net.view import Hop
from swarm.wire.frames import FrameStream
from swarm.wire.v1 import chain_pb2 as pb

PROTOCOL = "/swarm/health/1"
_LATE_S = 0.2
Stream = FrameStream[pb.HealthFrame]


async def serve_health(peer: Peer, answer: Callable[[str], pb.HealthReply]) -> None:
    """Answer with `answer(session id)`, as long as the asker's stream lives."""

    async def handle(stream: Stream) -> None:
        while (received := await stream.receive()) is not None:
            await stream.send(pb.HealthFrame(reply=answer(received[0].request.session_id)))

    await peer.serve(PROTOCOL, pb.HealthFrame, handle, max_received_bytes=0)


class _Line:
    """A stream to one node and the answers it owes."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._owed: deque[asyncio.Future[pb.HealthReply]] = deque()
        self.reader = asyncio.create_task(self._read())

    async def ask(self, session_id: str) -> pb.HealthReply:
        answer: asyncio.Future[pb.HealthReply] = asyncio.get_running_loop().create_future()
        self._owed.append(answer)
        await self.stream.send(pb.HealthFrame(request=pb.HealthRequest(session_id=session_id)))
        return await answer

    async def _read(self) -> None:
        error: SwarmError = PeerLost(f"node {self.stream.peer} closed its health stream")
        try:
            while (received := await self.stream.receive()) is not None:
                if not self._owed:
                    raise ProtocolError(f"node {self.stream.peer} answers what nobody asked")
                answer = self._owed.popleft()
                if not answer.done():
                    answer.set_result(received[0].reply)
        except SwarmError as failure:
            error = failure
        for answer in self._owed:
            if not answer.done():
                answer.set_exception(error)
                answer.exception()
        self._owed.clear()


class Health:
    """Asks nodes. Loop only."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._lines: dict[str, _Line] = {}
        self._dialling: dict[str, asyncio.Lock] = {}
        self.rtts_s: dict[str, float] = {}
        """The least round trip seen, by peer id: what routing counts with."""

    async def ask(self, hop: Hop, session_id: str, timeout_s: float) -> pb.HealthReply | None:
        """The node's answer; None if there is none within `timeout_s`."""
        asking = asyncio.create_task(self._answer(hop, session_id))
        try:
            await asyncio.wait({asking}, timeout=timeout_s)
            if not asking.done():
                # If it was our own loop that was held up, the answer may be here without having been looked at.
                await asyncio.wait({asking}, timeout=_LATE_S)
            with suppress(SwarmError):
                if asking.done():
                    return asking.result()
        finally:
            asking.cancel()
        broken = self._lines.pop(hop.peer_id, None)
        if broken is not None:
            broken.stream.close()
            broken.reader.cancel()
        return None

    async def _answer(self, hop: Hop, session_id: str) -> pb.HealthReply:
        line = await self._line(hop)
        began = asyncio.get_running_loop().time()
        reply = await line.ask(session_id)
        rtt_s = asyncio.get_running_loop().time() - began
        self.rtts_s[hop.peer_id] = min(rtt_s, self.rtts_s.get(hop.peer_id, rtt_s))
        return reply

    async def _line(self, hop: Hop) -> _Line:
        async with self._dialling.setdefault(hop.peer_id, asyncio.Lock()):
            line = self._lines.get(hop.peer_id)
            if line is None or line.reader.done():
                stream = await self._peer.dial(hop.peer_id, hop.addrs, PROTOCOL, pb.HealthFrame)
                line = self._lines[hop.peer_id] = _Line(stream)
            return line

    async def ask_all(self, hops: Sequence[Hop], session_id: str, timeout_s: float) -> list[pb.HealthReply | None]:
        """Every node's answer, asked side by side."""
        return list(await asyncio.gather(*(self.ask(hop, session_id, timeout_s) for hop in hops)))

    async def close(self) -> None:
        for line in self._lines.values():
            line.stream.close()
            line.reader.cancel()
        await asyncio.gather(*(line.reader for line in self._lines.values()), return_exceptions=True)
        self._lines.clear()
