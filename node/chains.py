"""Accepting chains on a node: who may open one, and which kind of hop carries it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from typing import Any, Protocol

from node.batching import Batcher
from node.hop import ChainHop, Stream, tell
from node.hop_serve import GradientHop, ServeHop, StatelessHop
from node.hop_train import TrainHop
from node.memory import Ledger
from node.serving import NodeModel
from node.sessions import Sessions
from swarm.compute import Compute
from swarm.errors import Busy, OutOfMemory, Preempted, ProtocolError, SessionError, SpanError, SwarmError
from swarm.ids import Span
from swarm.net.chain import PROTOCOL
from swarm.net.p2p import Peer
from swarm.net.view import FileInfo, Hop
from swarm.wire.v1 import chain_pb2 as pb
from swarm.wire.version import check_hello

MAX_CHAINS = 1024
_KINDS: dict[int, type[ChainHop]] = {
    pb.MODE_CACHED: ServeHop,
    pb.MODE_STATELESS: StatelessHop,
    pb.MODE_GRAD: GradientHop,
    pb.MODE_TRAIN: TrainHop,
}


class AdapterFiles(Protocol):
    async def files(self, name: str, wanted: tuple[FileInfo, ...]) -> dict[str, bytes]:
        """An adapter's files, fetched from peers if need be. Raises AdapterNotFound."""


class TrainerGate(Protocol):
    async def accept(self, caller: str, request: pb.Open) -> Any:
        """The stage for a training chain, if the coordinator assigned exactly this one. Raises SessionError."""


class ChainServer:
    """Accepts chain streams for one node."""

    def __init__(
        self,
        peer: Peer,
        compute: Compute,
        model: NodeModel,
        ledger: Ledger,
        adapters: AdapterFiles,
        trainer: TrainerGate | None,
        count: Callable[[int], None],
    ) -> None:
        self.peer = peer
        self.compute = compute
        self.model = model
        self.ledger = ledger
        self.adapters = adapters
        self.trainer = trainer
        self.count = count
        self.draining = False
        """Whether new sessions are refused and present ones asked to leave."""
        self.moving = False
        """Whether there is no model at the moment."""
        self._hops: dict[str, ChainHop] = {}
        self.use(model)

    def use(self, model: NodeModel) -> None:
        """Serve this span from now on; there must be no chains."""
        self.model = model
        self.sessions = Sessions(model, self.ledger, self.compute)
        self.batcher = Batcher(model, self.compute)
        self.draining = self.moving = False

    async def drop_model(self) -> None:
        """End what chains are left and give the weights' memory back; `use` another one next."""
        self.draining = self.moving = True
        for hop in list(self._hops.values()):
            await hop.stop_reading()
        self.sessions.free_all()
        del self.model
        self.ledger.release("shard")
        self.ledger.release("serving")

    async def start(self) -> None:
        await self.peer.serve(PROTOCOL, pb.Frame, self._handle, self.count)

    async def drain(self, deadline_s: float) -> None:
        """Take no new sessions, ask clients to go on elsewhere, and wait for that at most so long."""
        self.draining = True
        for hop in list(self._hops.values()):
            await hop.ask_to_leave()
        with suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                await self.sessions.emptied()

    def health(self, session_id: str) -> pb.HealthReply:
        """How this node is doing, and what it did last for a session."""
        session = self.sessions.find(session_id)
        return pb.HealthReply(
            completed=self.compute.completed,
            waiting=self.compute.waiting,
            known=session is not None,
            received=session.received if session is not None else 0,
            sent=session.sent if session is not None else 0,
            draining=self.draining,
        )

    async def _handle(self, stream: Stream) -> None:
        try:
            received = await stream.receive()
            if received is None:
                return
            if self.moving:
                raise SessionError("this node is moving to other blocks", "look up the swarm again")
            frame, _ = received
            kind = frame.WhichOneof("kind")
            if kind == "open":
                check_hello(frame.open.hello, self.model.checkpoint.model_hash)
                await self._open(stream, frame.open)
            elif kind == "attach":
                check_hello(frame.attach.hello, self.model.checkpoint.model_hash)
                hop = self._hops.get(frame.attach.session_id)
                if hop is None or hop.opener != stream.peer:
                    raise SessionError("no such session on this node")
                await hop.attach(stream)
            else:
                raise ProtocolError(f"a chain stream starts with open or attach, not '{kind}'")
        except SwarmError as error:
            if isinstance(error, (Busy, OutOfMemory, Preempted, SessionError, SpanError)):
                error.blaming(self.peer.peer_id)
            await tell(stream, error)

    async def _open(self, stream: Stream, request: pb.Open) -> None:
        if request.mode not in _KINDS:
            raise ProtocolError("the chain asks for a mode unknown here")
        if len(self._hops) >= MAX_CHAINS:
            raise Busy(f"this node already serves {MAX_CHAINS} chains")
        if not 8 <= len(request.session_id) <= 64:
            raise SessionError("the session id is malformed")
        before = self._hops.get(request.session_id)
        if before is not None and (request.mode != pb.MODE_CACHED or self.sessions.find(request.session_id) is None):
            raise SessionError("the session id is taken")
        hops = [Hop(h.peer_id, Span(h.span.start, h.span.end), tuple(h.addrs)) for h in request.hops]
        if not 0 <= request.index < len(hops) or hops[request.index].peer_id != self.peer.peer_id:
            raise SessionError("the chain names another node at this place")
        if request.mode == pb.MODE_TRAIN and (not request.index or hops[request.index - 1].peer_id != stream.peer):
            # The lead is believed because it is the first of these hops: each answers for the one before it.
            raise SessionError("a training chain is opened by the hop before", "nothing to do: the lead opens it again")
        for first, second in pairwise(hops):
            if first.span.end != second.span.start:
                raise SpanError(f"the chain's spans {first.span} and {second.span} do not join")
        if self.draining and before is None and self.sessions.find(request.session_id) is None:
            raise SessionError("this node is leaving and takes no new sessions", "use another node")
        hop = _KINDS[request.mode](self, stream, request, hops)
        if before is not None and before.opener != hop.opener:
            raise SessionError("the session id is taken")
        self._hops[request.session_id] = hop
        try:
            await hop.run()
        finally:
            if self._hops.get(request.session_id) is hop:
                del self._hops[request.session_id]
            await hop.close()
