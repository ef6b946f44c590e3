"""This node's end of the chains it is part of: accept, dial on, push forward, push back.

One `ChainSession` per open chain. Its upstream is the stream it was opened on; its downstream is the
stream it dialled to the next hop, or, on the last hop, the one the opener attached. Frames of a
stream are handled in order; forward frames of a chain are computed in order by construction.

Any failure is told upstream as an error frame and ends the session on this node; the hop behind
notices the closed stream and frees its part. A hop that vanishes is reported by its predecessor,
which names its blocks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from typing import Protocol

import structlog
import torch

from node.compute import Compute, Priority
from node.memory import Ledger
from node.serving import NodeModel, ServingStage
from swarm.errors import PeerLost, ProtocolError, SessionError, SpanError, SwarmError
from swarm.ids import Span
from swarm.net.chain import PROTOCOL, lost_hop
from swarm.net.p2p import Peer
from swarm.net.view import FileInfo, Hop
from swarm.wire.frames import FrameStream
from swarm.wire.tensors import pack, payload_size, unpack
from swarm.wire.v1 import chain_pb2 as pb
from swarm.wire.v1 import common_pb2
from swarm.wire.version import check_hello

MAX_SESSIONS = 256
ATTACH_TIMEOUT_S = 30.0
log = structlog.get_logger()
Stream = FrameStream[pb.Frame]


class Stage(Protocol):
    """What a session computes with: a serving or a training stage."""

    def admit(self, shape_BTD: tuple[int, ...], position: int) -> None: ...
    def forward(self, hidden_BTD: torch.Tensor, position: int) -> torch.Tensor: ...
    def close(self) -> None: ...


class TrainStage(Protocol):
    """A stage that trains: what this node's trainer offers to a lead's chain."""

    def admit(self, shape_BTD: tuple[int, ...], position: int) -> None: ...
    def train_forward(self, seq: int, hidden_BTD: torch.Tensor) -> torch.Tensor: ...
    def train_backward(self, seq: int, grad_BTD: torch.Tensor) -> torch.Tensor: ...
    def step(self, lr: float) -> None: ...
    async def begin_round(self, round: int) -> None: ...
    def end_round(self, message: pb.EndRound) -> None: ...
    def close(self) -> None: ...


class TrainerGate(Protocol):
    async def accept(self, caller: str, request: pb.Open) -> TrainStage:
        """The stage for a training chain, if the coordinator assigned exactly this one. Raises SessionError."""


class AdapterFiles(Protocol):
    async def files(self, name: str, wanted: tuple[FileInfo, ...]) -> dict[str, bytes]:
        """An adapter's files, fetched from peers if need be. Raises AdapterNotFound."""


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
        self.sessions: dict[str, ChainSession] = {}

    async def start(self) -> None:
        await self.peer.serve(PROTOCOL, pb.Frame, self._handle, self.count)

    async def _handle(self, stream: Stream) -> None:
        try:
            received = await stream.receive()
            if received is None:
                return
            frame, _ = received
            kind = frame.WhichOneof("kind")
            if kind == "open":
                check_hello(frame.open.hello, self.model.checkpoint.model_hash)
                await self._open(stream, frame.open)
            elif kind == "attach":
                check_hello(frame.attach.hello, self.model.checkpoint.model_hash)
                session = self.sessions.get(frame.attach.session_id)
                if session is None or session.opener != stream.peer:
                    raise SessionError("no such session on this node")
                await session.attach(stream)
            else:
                raise ProtocolError(f"a chain stream starts with open or attach, not '{kind}'")
        except SwarmError as error:
            await tell(stream, error)

    async def _open(self, stream: Stream, request: pb.Open) -> None:
        if len(self.sessions) >= MAX_SESSIONS:
            raise SessionError(f"this node already serves {MAX_SESSIONS} sessions", "try again later")
        if request.session_id in self.sessions or not 8 <= len(request.session_id) <= 64:
            raise SessionError("the session id is taken or malformed")
        hops = [Hop(h.peer_id, Span(h.span.start, h.span.end), tuple(h.addrs)) for h in request.hops]
        if not 0 <= request.index < len(hops) or hops[request.index].peer_id != self.peer.peer_id:
            raise SessionError("the chain names another node at this place")
        for before, after in pairwise(hops):
            if before.span.end != after.span.start:
                raise SpanError(f"the chain's spans {before.span} and {after.span} do not join")
        session = ChainSession(self, stream, request, hops)
        self.sessions[request.session_id] = session
        try:
            await session.run()
        finally:
            self.sessions.pop(request.session_id, None)
            await session.close()


class ChainSession:
    """One chain's part on this node."""

    def __init__(self, server: ChainServer, upstream: Stream, request: pb.Open, hops: list[Hop]) -> None:
        self._server = server
        self._upstream = upstream
        self._request = request
        self._hops = hops
        self._hop = hops[request.index]
        self._last = request.index == len(hops) - 1
        self._downstream: Stream | None = None
        self._attached = asyncio.Event()
        self._finished = asyncio.Event()
        self._serving: ServingStage | None = None
        self._training: TrainStage | None = None
        self._encoding = request.activation_encoding

    @property
    def opener(self) -> str:
        """The peer that opened the chain's first stream and may attach to its end. In a training
        chain that is hop 0, the lead; in a session, whoever dialled the first hop."""
        if self._request.mode == pb.MODE_TRAIN:
            return self._hops[0].peer_id
        return self._request.opener or self._upstream.peer

    async def run(self) -> None:
        """Serve until the chain ends. Raises SwarmError, after which the chain is told and closed."""
        await self._prepare_stage()
        readers = [asyncio.create_task(self._read_upstream())]
        try:
            if not self._last:
                await self._open_next()
                readers.append(asyncio.create_task(self._read_downstream()))
            await self._upstream.send(pb.Frame(opened=pb.Opened()))
            if self._last:
                readers.append(asyncio.create_task(self._read_attached()))
            done, _ = await asyncio.wait(readers, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in readers:
                task.cancel()
            await asyncio.gather(*readers, return_exceptions=True)

    async def _prepare_stage(self) -> None:
        request, server = self._request, self._server
        if request.mode == pb.MODE_TRAIN:
            if server.trainer is None:
                raise SessionError("this node takes no part in training")
            self._training = await server.trainer.accept(self.opener, request)
            return
        if request.mode not in (pb.MODE_CACHED, pb.MODE_STATELESS):
            raise ProtocolError("the chain asks for a mode unknown here")
        adapter_id, files = b"", None
        if request.HasField("adapter"):
            wanted = tuple(FileInfo(f.name, f.sha256, f.size) for f in request.adapter.files)
            files = await server.adapters.files(request.adapter.name, wanted)
            adapter_id = b"".join(sorted(f.sha256 for f in wanted))
        view = await server.compute.run(Priority.BACKGROUND, server.model.view, self._hop.span, adapter_id, files)
        cached = request.mode == pb.MODE_CACHED
        self._serving = ServingStage(server.model, view, request.session_id, server.ledger, cached=cached)

    async def _open_next(self) -> None:
        request = pb.Open()
        request.CopyFrom(self._request)
        request.index += 1
        request.opener = self.opener
        following = self._hops[request.index]
        server = self._server
        stream = await server.peer.dial(following.peer_id, following.addrs, PROTOCOL, pb.Frame, count=server.count)
        self._downstream = stream
        await stream.send(pb.Frame(open=request))
        received = await stream.receive()
        if received is None:
            raise lost_hop(following)
        frame, _ = received
        if frame.WhichOneof("kind") == "error":
            raise SwarmError.from_code(frame.error.code, frame.error.cause, frame.error.fix)

    async def attach(self, stream: Stream) -> None:
        """The opener's output stream arrived; keep it until the session ends."""
        if not self._last or self._downstream is not None:
            raise SessionError("this hop takes no output stream")
        self._downstream = stream
        await stream.send(pb.Frame(opened=pb.Opened()))
        self._attached.set()
        await self._finished.wait()

    async def _read_upstream(self) -> None:
        while True:
            received = await self._upstream.receive()
            if received is None or received[0].WhichOneof("kind") == "close":
                return
            frame, payload = received
            kind = frame.WhichOneof("kind")
            if kind == "forward":
                await self._forward(frame.forward, payload)
            elif kind == "begin_round" and self._training is not None:
                await self._training.begin_round(frame.begin_round.round)
                await self._send_on(frame)
            elif kind == "end_round" and self._training is not None:
                self._training.end_round(frame.end_round)
                await self._send_on(frame)
            else:
                raise ProtocolError(f"unexpected frame '{kind}' from upstream")

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
                if self._last:
                    # The opener closed its end. Said upstream, so that this clean end, which may overtake
                    # the opener's own Close, is not taken for a hop that went away.
                    with suppress(SwarmError):
                        await self._upstream.send(pb.Frame(close=pb.Close()))
                    return
                raise lost_hop(self._hops[self._request.index + 1])
            frame, payload = received
            kind = frame.WhichOneof("kind")
            if kind == "backward":
                await self._backward(frame.backward, payload)
            elif kind == "close":
                with suppress(SwarmError):
                    await self._upstream.send(frame)
                return
            elif kind == "error":
                raise SwarmError.from_code(frame.error.code, frame.error.cause, frame.error.fix)
            else:
                raise ProtocolError(f"unexpected frame '{kind}' from downstream")

    async def _forward(self, message: pb.Forward, payload: bytes) -> None:
        payload_size(message.tensor)  # refuses shapes that are not allowed before anything is computed from them
        shape = tuple(message.tensor.shape)
        hidden_size = self._server.model.checkpoint.config.hidden_size
        if len(shape) != 3 or shape[2] != hidden_size:
            raise ProtocolError(f"hidden states of shape {list(shape)} do not fit a model of width {hidden_size}")
        stage = self._training or self._serving
        assert stage is not None
        stage.admit(shape, message.position)
        dtype, device = self._server.model.shard.dtype, self._server.model.shard.device

        def compute() -> tuple[common_pb2.TensorMeta, bytes]:
            hidden = unpack(message.tensor, payload, dtype, device)
            if self._training is not None:
                output = self._training.train_forward(message.seq, hidden)
            else:
                assert self._serving is not None
                output = self._serving.forward(hidden, message.position)
            return pack(output, self._encoding)

        if self._training is not None:
            priority = Priority.TRAIN
        else:
            priority = Priority.DECODE if shape[1] == 1 else Priority.PREFILL
        meta, data = await self._server.compute.run(priority, compute)
        reply = pb.Forward(seq=message.seq, position=message.position, tensor=meta)
        await self._send_on(pb.Frame(forward=reply), data)

    async def _backward(self, message: pb.Backward, payload: bytes) -> None:
        training = self._training
        if training is None:
            raise ProtocolError("a gradient came into a session that does not train")
        payload_size(message.tensor)
        dtype, device = self._server.model.shard.dtype, self._server.model.shard.device

        def compute() -> tuple[common_pb2.TensorMeta, bytes]:
            grad = unpack(message.tensor, payload, dtype, device)
            return pack(training.train_backward(message.seq, grad), self._encoding)

        meta, data = await self._server.compute.run(Priority.TRAIN, compute)
        reply = pb.Backward(seq=message.seq, tensor=meta, step=message.step, lr=message.lr)
        # The gradient leaves first: the hop before computes while this one steps its optimizer.
        await self._upstream.send(pb.Frame(backward=reply), data)
        if message.step:
            await self._server.compute.run(Priority.TRAIN, training.step, message.lr)

    async def _send_on(self, frame: pb.Frame, payload: bytes = b"") -> None:
        if self._downstream is None:
            raise ProtocolError("the opener sent a step before it attached to the end of its chain")
        await self._downstream.send(frame, payload)

    async def close(self) -> None:
        self._finished.set()
        if self._downstream is not None:
            self._downstream.close()
        for stage in (self._serving, self._training):
            if stage is not None:
                stage.close()


async def tell(stream: Stream, error: SwarmError) -> None:
    """Report an error on a stream that may already be gone."""
    log.warning("chain_failed", peer=stream.peer, error=str(error))
    wire = common_pb2.Error(code=error.code, cause=error.cause, fix=error.fix)
    with suppress(SwarmError):
        await stream.send(pb.Frame(error=wire))
