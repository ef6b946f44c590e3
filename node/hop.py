"""One open chain's part on this node: its streams, and the order of what travels on them.

Upstream is the stream the chain was opened on; downstream is the stream dialled to the next hop, or,
on the last hop, the one the opener attached. Frames of a stream are handled in order. What a hop
computes is its subclass's business: `node.hop_serve` and `node.hop_train`.

Any failure is told upstream as an error frame and ends the chain on this node; the hop behind notices
the closed stream. A hop that vanishes is reported by its predecessor, which names it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from swarm.errors import PeerLost, ProtocolError, SessionError, SwarmError
from swarm.net.chain import PROTOCOL, SCALED_GRADIENTS, error_from_proto, error_to_proto, expect_opened, lost_hop
from swarm.net.view import Hop
from swarm.wire.frames import FrameStream
from swarm.wire.tensors import payload_size
from swarm.wire.v1 import chain_pb2 as pb
from swarm.wire.v1 import common_pb2

if TYPE_CHECKING:
    from node.chains import ChainServer

ATTACH_TIMEOUT_S = 30.0
LINGER_S = 5.0
"""For an opener to read an error and close; it does so at once."""
T = TypeVar("T")
log = structlog.get_logger()
Stream = FrameStream[pb.Frame]


class Left(Exception):
    """The opener went away, or closed, while the chain was opening."""


class ChainHop:
    """One chain's part on this node."""

    def __init__(self, server: ChainServer, upstream: Stream, request: pb.Open, hops: list[Hop]) -> None:
        self.server = server
        self.request = request
        self.hops = hops
        self.hop = hops[request.index]
        self.last = request.index == len(hops) - 1
        self.encoding = request.activation_encoding
        self.scaled = SCALED_GRADIENTS in request.hello.required
        """Whether gradients travel with an exponent: not to an opener of an older release."""
        self.closed_by_opener = False
        """Whether the opener said that it is done, rather than vanish."""
        self._upstream = upstream
        self._downstream: Stream | None = None
        self._attached = asyncio.Event()
        self._finished = asyncio.Event()
        self._next: asyncio.Task[tuple[pb.Frame, bytes] | None] | None = None
        self._readers: list[asyncio.Task[None]] = []
        self._telling: set[asyncio.Task[None]] = set()

    # What subclasses do.

    async def prepare(self) -> pb.HopState:
        """Get ready to compute. Raises SwarmError."""
        raise NotImplementedError

    async def on_forward(self, message: pb.Forward, payload: bytes) -> None:
        raise NotImplementedError

    async def on_backward(self, message: pb.Backward, payload: bytes) -> None:
        raise ProtocolError("a gradient came into a session that does not train")

    async def on_other(self, frame: pb.Frame) -> None:
        """A frame from upstream of another kind."""
        raise ProtocolError(f"unexpected frame '{frame.WhichOneof('kind')}' from upstream")

    async def on_close(self) -> None:
        """The chain ended here."""

    # What all hops share.

    @property
    def opener(self) -> str:
        """The peer that opened the chain's first stream and may attach to its end. In a training
        chain that is hop 0, the lead; in a session, whoever dialled the first hop."""
        if self.request.mode == pb.MODE_TRAIN:
            return self.hops[0].peer_id
        return self.request.opener or self._upstream.peer

    async def run(self) -> None:
        """Serve until the chain ends. Raises SwarmError, after which the chain is told and closed."""
        self._next = asyncio.create_task(self._upstream.receive())
        try:
            state = await self._unless_left(self.prepare())
            behind: tuple[pb.HopState, ...] = ()
            if not self.last:
                behind = await self._unless_left(self._open_next())
                self._readers.append(asyncio.create_task(self._read_downstream()))
            await self._upstream.send(pb.Frame(opened=pb.Opened(hops=[state, *behind])))
            if self.server.draining:
                await self.ask_to_leave()
            if self.last:
                self._readers.append(asyncio.create_task(self._read_attached()))
            self._readers.append(asyncio.create_task(self._read_upstream()))
            done, _ = await asyncio.wait(self._readers, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if not task.cancelled():
                    task.result()
        except Left:
            pass
        finally:
            await self.stop_reading()

    async def stop_reading(self) -> None:
        """Take no more frames. Safe to call from another task."""
        tasks = [*self._readers, *self._telling, *([self._next] if self._next is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _unless_left(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which ends early if the opener goes away or closes. Raises Left."""
        task = asyncio.create_task(work)
        assert self._next is not None
        try:
            await asyncio.wait({task, self._next}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done() and self._next.done():
                received = self._next.result()
                if received is None or received[0].WhichOneof("kind") == "close":
                    self.closed_by_opener = True  # nothing was computed yet: there is nothing to keep
                    raise Left
                raise ProtocolError("the opener sent a frame before the chain was open")
            return await task
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def _open_next(self) -> tuple[pb.HopState, ...]:
        request = pb.Open()
        request.CopyFrom(self.request)
        request.index += 1
        request.opener = self.opener
        following = self.hops[request.index]
        server = self.server
        stream = await server.peer.dial(following.peer_id, following.addrs, PROTOCOL, pb.Frame, count=server.count)
        self._downstream = stream
        try:
            await stream.send(pb.Frame(open=request))
            return await expect_opened(stream, self._relay_queued)
        except PeerLost as error:
            raise lost_hop(following) from error

    def _relay_queued(self, position: int, reason: str) -> None:
        task = asyncio.create_task(self.tell_queued(position, reason))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def tell_queued(self, position: int, reason: str) -> None:
        with suppress(SwarmError):
            await self._upstream.send(pb.Frame(queued=pb.Queued(position=position, reason=reason)))

    async def ask_to_leave(self) -> None:
        """Tell the opener that this node wants to go."""
        with suppress(SwarmError):
            await self._upstream.send(pb.Frame(draining=pb.Draining(peer_id=self.server.peer.peer_id)))

    async def attach(self, stream: Stream) -> None:
        """The opener's output stream arrived; keep it until the session ends."""
        if not self.last or self._downstream is not None:
            raise SessionError("this hop takes no output stream")
        self._downstream = stream
        await stream.send(pb.Frame(opened=pb.Opened()))
        self._attached.set()
        await self._finished.wait()

    async def _read_upstream(self) -> None:
        assert self._next is not None
        while True:
            received = await self._next
            if received is None:
                return
            frame, payload = received
            kind = frame.WhichOneof("kind")
            if kind == "close":
                self.closed_by_opener = True
                if self._downstream is not None and not self.last:
                    with suppress(SwarmError):
                        await self._downstream.send(frame)
                return
            if kind == "forward":
                await self.on_forward(frame.forward, payload)
            else:
                await self.on_other(frame)
            self._next = asyncio.create_task(self._upstream.receive())

    async def _read_attached(self) -> None:
        try:
            async with asyncio.timeout(ATTACH_TIMEOUT_S):
                await self._attached.wait()
        except TimeoutError as error:
            raise PeerLost("the opener never attached to the end of its chain") from error
        await self._read_downstream()

    async def _read_downstream(self) -> None:
        assert self._downstream is not None
        while True:
            received = await self._downstream.receive()
            if received is None:
                if self.last:
                    # The opener closed its end. Said upstream, so that this clean end, which may overtake
                    # the opener's own Close, is not taken for a hop that went away.
                    with suppress(SwarmError):
                        await self._upstream.send(pb.Frame(close=pb.Close()))
                    return
                raise lost_hop(self.hops[self.request.index + 1])
            frame, payload = received
            kind = frame.WhichOneof("kind")
            if kind == "backward":
                await self.on_backward(frame.backward, payload)
            elif kind in ("close", "draining"):
                with suppress(SwarmError):
                    await self._upstream.send(frame)
                if kind == "close":
                    return
            elif kind == "error":
                raise error_from_proto(frame.error)
            elif kind != "queued":
                raise ProtocolError(f"unexpected frame '{kind}' from downstream")

    def check_hidden(self, tensor: common_pb2.TensorMeta, payload: bytes) -> tuple[int, int]:
        """(rows, columns) of hidden states that fit this model. Raises ProtocolError, naming the sender."""
        try:
            size = payload_size(tensor)  # refuses shapes that are not allowed before anything is computed from them
            shape, width = tuple(tensor.shape), self.server.model.width
            if len(shape) != 3 or shape[2] != width:
                raise ProtocolError(f"hidden states of shape {list(shape)} do not fit a model of width {width}")
            if len(payload) != size:
                raise ProtocolError(f"tensor payload has {len(payload)} bytes, {size} announced")
        except ProtocolError as error:
            raise self.blame_sender(error) from error
        return shape[0], shape[1]

    def blame_sender(self, error: ProtocolError) -> ProtocolError:
        """What came from the hop before is that node's fault; what came from the opener is the opener's own."""
        return error.blaming(self.hops[self.request.index - 1].peer_id) if self.request.index else error

    async def send_on(self, frame: pb.Frame, payload: bytes = b"") -> None:
        if self._downstream is None:
            raise ProtocolError("the opener sent a step before it attached to the end of its chain")
        await self._downstream.send(frame, payload)

    async def send_back(self, frame: pb.Frame, payload: bytes = b"") -> None:
        await self._upstream.send(frame, payload)

    async def close(self) -> None:
        self._finished.set()
        if self._downstream is not None:
            self._downstream.close()
        await self.on_close()
        # Tasks hold frames, and what they were given: nothing waits for the collector to notice.
        self._readers.clear()
        self._next = None


async def tell(stream: Stream, error: SwarmError) -> None:
    """Report an error on a stream that may already be gone."""
    log.warning("chain_failed", peer=stream.peer, error=str(error), blame=error.blame)
    with suppress(SwarmError, TimeoutError):
        await stream.send(pb.Frame(error=error_to_proto(error)))
        # A connection that is closed with unread frames in it is reset, and the error with it: whoever sent
        # several steps ahead would only see that this node went away.
        async with asyncio.timeout(LINGER_S):
            await stream.discard()
