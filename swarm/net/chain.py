"""The opener's end of a chain of nodes: a client that prompts, or a lead that trains.

Frames go to the first hop, each hop pushes its output straight to the next, and the last hop
answers on a stream of its own (`Attach`). Gradients and errors come back the same way. One
stream a hop lives as long as the chain; a token costs one frame a hop.

    opener ──Forward──▶ hop 1 ──▶ hop 2 ──▶ … ──▶ hop k ──Forward──▶ opener
    opener ◀─Backward── hop 1 ◀── hop 2 ◀── … ◀── hop k ◀─Backward── opener
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from swarm.errors import PeerLost, ProtocolError, SwarmError
from swarm.net.p2p import Peer
from swarm.net.view import AdapterInfo, Hop
from swarm.wire.frames import FrameStream
from swarm.wire.tensors import pack, unpack
from swarm.wire.v1 import chain_pb2 as pb
from swarm.wire.v1 import common_pb2
from swarm.wire.version import hello

SCALED_GRADIENTS = "scaled-gradients"
PROTOCOL = "/swarm/chain/1"
OPEN_TIMEOUT_S = 60.0
"""Opening may load weights into new modules and fetch an adapter; dialling alone has its own limit."""


_ACCOUNT_GRACE_S = 2.0
_ADMISSION_S = 60.0
_CLOSE_TIMEOUT_S = 1.0


@dataclass(frozen=True)
class TrainingBinding:
    """Which job and forming of its pipelines a training chain belongs to."""

    job_id: str
    pipeline_id: int
    generation: int
    packs: bool = False
    """Whether rows may hold several samples."""
    scores: bool = False
    """Whether forward passes are only looked at."""

    @property
    def features(self) -> tuple[str, ...]:
        """What its hops must know."""
        optional = {"packed-rows": self.packs, "score-frames": self.scores}
        return ("step-frames", *(name for name, needed in optional.items() if needed))


def hop_to_proto(hop: Hop) -> common_pb2.Hop:
    span = common_pb2.Span(start=hop.span.start, end=hop.span.end)
    return common_pb2.Hop(peer_id=hop.peer_id, span=span, addrs=hop.addrs)


@dataclass(frozen=True)
class SessionTerms:
    """What a session with a KV cache tells the hops when it is opened."""

    session_id: str = ""
    """Of an earlier chain, to go on with what its hops still hold; empty: a new session."""
    rows: int = 1
    expected_tokens: int = 0
    """Columns it will probably reach; 0: a node's own guess."""
    admission_s: float = _ADMISSION_S
    """How long to wait for room, on each hop."""
    waiting: Callable[[int, str], None] | None = None
    """Called with (position in the queue, reason) while a hop has no room."""


@dataclass(frozen=True)
class StepExtras:
    """What a step of a session may carry besides hidden states (see `Forward` in chain.proto)."""

    rows: tuple[int, ...] = ()
    mask: bytes = b""
    position_ids: tuple[int, ...] = ()
    tail: int | None = None
    refill: int = 0


_NO_EXTRAS = StepExtras()


@dataclass(frozen=True)
class Packed:
    """A tensor as it travels."""

    meta: common_pb2.TensorMeta
    payload: bytes
    sender: str = ""
    """Peer id of the node it came from; empty: it was packed here."""


@dataclass(frozen=True)
class _Answer:
    """What came back for something that was sent."""

    tensor: Packed | None = None
    squared_norm: float = 0.0


def error_to_proto(error: SwarmError) -> common_pb2.Error:
    return common_pb2.Error(code=error.code, cause=error.cause, fix=error.fix, blame=error.blame)


def error_from_proto(error: common_pb2.Error) -> SwarmError:
    return SwarmError.from_code(error.code, error.cause, error.fix, error.blame)


class Chain:
    """An open chain. Make with `open`; always `close`. Every failure is a SwarmError on the awaiting call.

    Calls that prompt pack and unpack on the event loop, those that train leave it to their caller: whole
    microbatches take milliseconds each.
    """

    def __init__(
        self,
        session_id: str,
        hops: Sequence[Hop],
        inputs: FrameStream[pb.Frame],
        encoding: str,
        dtype: torch.dtype,
        device: torch.device,
        timeout_s: float,
    ) -> None:
        self.session_id = session_id
        self.hops = tuple(hops)
        self._inputs = inputs
        self._outputs: FrameStream[pb.Frame] | None = None
        self._encoding = encoding
        self._dtype = dtype
        self._device = device
        self._timeout_s = timeout_s
        self._seq = 0
        self._waiting: dict[tuple[str, int], asyncio.Future[_Answer]] = {}
        self._limits: set[asyncio.Timeout] = set()
        """Of the calls that wait."""
        self._readers: list[asyncio.Task[None]] = []
        self._failure: SwarmError | None = None
        self._failed = asyncio.Event()
        self.states: tuple[pb.HopState, ...] = ()
        """What each hop held of the session when the chain was opened."""
        self.draining: set[str] = set()
        """Peer ids of hops that want to leave."""

    @classmethod
    async def open(
        cls,
        peer: Peer,
        hops: Sequence[Hop],
        mode: pb.Mode.ValueType,
        model_hash: bytes,
        *,
        first: int = 0,
        adapter: AdapterInfo | None = None,
        training: TrainingBinding | None = None,
        encoding: str = "float32",
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        timeout_s: float = 60.0,
        terms: SessionTerms | None = None,
        count: Callable[[int], None] | None = None,
    ) -> Chain:
        """Open every hop from index `first` on.

        encoding: how activations cross the links. dtype, device: of the tensors that calls return.
        timeout_s: the longest that the whole chain may be silent while a call waits: any answer starts it anew, since
        calls of training queue behind one another.
        Raises PeerLost, VersionError, ModelMismatch, SessionError, Busy and what a node's own checks raise.
        """
        terms = terms or SessionTerms()
        session_id = terms.session_id or uuid.uuid4().hex
        features = () if training is None else training.features
        if encoding == "float16" and mode in (pb.MODE_TRAIN, pb.MODE_GRAD):
            features = (*features, SCALED_GRADIENTS)
        message = pb.Open(
            hello=hello(model_hash, ("push", *features)),
            session_id=session_id,
            mode=mode,
            hops=[hop_to_proto(hop) for hop in hops],
            index=first,
            activation_encoding=encoding,
            rows=terms.rows,
            expected_tokens=terms.expected_tokens,
            admission_s=terms.admission_s,
        )
        if adapter is not None:
            files = [common_pb2.FileEntry(name=f.name, sha256=f.sha256, size=f.size) for f in adapter.files]
            message.adapter.CopyFrom(pb.AdapterRef(name=adapter.name, files=files))
        if training is not None:
            message.job_id, message.pipeline_id = training.job_id, training.pipeline_id
            message.generation = training.generation
        head, tail = hops[first], hops[-1]
        inputs = await peer.dial(head.peer_id, head.addrs, PROTOCOL, pb.Frame, count=count)
        chain = cls(session_id, hops[first:], inputs, encoding, dtype, device or torch.device("cpu"), timeout_s)
        opening = asyncio.timeout(OPEN_TIMEOUT_S)

        def queued(position: int, reason: str) -> None:
            # The hop is alive and counts its own deadline.
            opening.reschedule(asyncio.get_running_loop().time() + OPEN_TIMEOUT_S)
            if terms.waiting is not None:
                terms.waiting(position, reason)

        try:
            async with opening:
                await inputs.send(pb.Frame(open=message))
                chain.states = await expect_opened(inputs, queued)
                chain._outputs = await peer.dial(tail.peer_id, tail.addrs, PROTOCOL, pb.Frame, count=count)
                attach = pb.Attach(hello=hello(model_hash), session_id=session_id)
                await chain._outputs.send(pb.Frame(attach=attach))
                await expect_opened(chain._outputs)
        except TimeoutError as error:
            await chain.close()
            raise PeerLost(f"the chain did not open within {OPEN_TIMEOUT_S:.0f} s") from error
        except BaseException:
            await chain.close()
            raise
        for stream in (chain._inputs, chain._outputs):
            chain._readers.append(asyncio.create_task(chain._read(stream)))
        return chain

    async def forward(
        self, hidden_BTD: torch.Tensor, position: int = 0, extras: StepExtras = _NO_EXTRAS
    ) -> tuple[int, torch.Tensor]:
        """Push hidden states through all hops. Returns the step's number (for `backward`) and the output."""
        seq, frame, payload = self._step(self.pack(hidden_BTD), position, extras)
        output = (await self._exchange("forward", seq, self._inputs, frame, payload)).tensor
        if output is None:
            raise ProtocolError("a hop answered without hidden states")
        return seq, self._unpacked(output)

    def pack(self, tensor: torch.Tensor) -> Packed:
        """As it crosses this chain's links. On any thread."""
        return Packed(*pack(tensor, self._encoding))

    def pack_gradient(self, tensor: torch.Tensor) -> Packed:
        """As `pack`, for a gradient, which in float16 needs a scale."""
        return Packed(*pack(tensor, self._encoding, scaled=True))

    def unpack(self, packed: Packed, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """What a hop sent. On any thread. `shape`: what it has to be.

        Raises ProtocolError, naming the hop: malformed, of another shape, or not a number.
        """
        try:
            if shape is not None and tuple(packed.meta.shape) != shape:
                raise ProtocolError(f"a tensor of shape {list(packed.meta.shape)} came back for one of {list(shape)}")
            return unpack(packed.meta, packed.payload, self._dtype, self._device)
        except ProtocolError as error:
            raise error.blaming(packed.sender) from error

    def _unpacked(self, packed: Packed) -> torch.Tensor:
        """On the loop: what is malformed ends the chain."""
        try:
            return self.unpack(packed)
        except ProtocolError as error:
            self._fail(error)
            raise

    async def train_forward(self, hidden: Packed | None, position_ids: Sequence[int] = ()) -> tuple[int, Packed | None]:
        """`forward` of a microbatch in training. None, both ways: there were no finite numbers.

        position_ids: of packed rows, one after the other.
        """
        if hidden is None:
            self._seq += 1
            seq, frame, payload = self._seq, pb.Frame(forward=pb.Forward(seq=self._seq, void=True)), b""
        else:
            seq, frame, payload = self._step(hidden, 0, StepExtras(position_ids=tuple(position_ids)))
        return seq, (await self._exchange("forward", seq, self._inputs, frame, payload)).tensor

    async def score_forward(self, hidden: Packed) -> Packed:
        """`forward` in a training chain whose hops keep nothing: there is no gradient to come."""
        seq, frame, payload = self._step(hidden, 0, _NO_EXTRAS)
        frame.forward.score = True
        output = (await self._exchange("forward", seq, self._inputs, frame, payload)).tensor
        if output is None:
            raise ProtocolError("a hop's hidden states are not finite: there is no loss to score")
        return output

    async def push(self, hidden_BTD: torch.Tensor, position: int, extras: StepExtras) -> None:
        """Send a step that nobody answers (`tail` 0): a prompt's chunk, a refill. Failures show at the next one."""
        if self._failure is not None:
            raise self._failure
        _, frame, payload = self._step(self.pack(hidden_BTD), position, extras)
        await self._inputs.send(frame, payload)

    async def refill(self, first: int, last: int, start: int, end: int) -> None:
        """Let the hop before `first` resend columns [start, end), which hops `first` to `last` lack."""
        order = pb.Refill(first=first, last=last, start=start, end=end)
        await self._inputs.send(pb.Frame(refill=order))

    def _step(self, hidden: Packed, position: int, extras: StepExtras) -> tuple[int, pb.Frame, bytes]:
        self._seq += 1
        message = pb.Forward(
            seq=self._seq,
            position=position,
            tensor=hidden.meta,
            rows=extras.rows,
            mask=extras.mask,
            position_ids=extras.position_ids,
            tail=extras.tail,
            refill=extras.refill,
        )
        return self._seq, pb.Frame(forward=message), hidden.payload

    async def backward(self, seq: int, grad_BTD: torch.Tensor) -> torch.Tensor:
        """Send the gradient of step `seq`'s output; returns that of its input."""
        grad, _ = await self.train_backward(seq, self.pack_gradient(grad_BTD))
        if grad is None:
            raise ProtocolError("a hop answered without a gradient")
        return self._unpacked(grad)

    async def train_backward(
        self, seq: int, gradient: Packed | None, last: bool = False
    ) -> tuple[Packed | None, float]:
        """The gradient of a microbatch's input. None, both ways: there were no finite numbers.

        last: of the optimizer step; then the squared norm of all hops' accumulated gradients comes back too.
        """
        message, payload = pb.Backward(seq=seq, last=last), b""
        if gradient is None:
            message.void = True
        else:
            message.tensor.CopyFrom(gradient.meta)
            payload = gradient.payload
        assert self._outputs is not None
        answer = await self._exchange("backward", seq, self._outputs, pb.Frame(backward=message), payload)
        return answer.tensor, answer.squared_norm

    async def step(self, lr: float, scale: float, *, skip: bool) -> None:
        """Let every hop take an optimizer step with what it has accumulated, or skip it. Nobody answers."""
        if self._failure is not None:
            raise self._failure
        await self._inputs.send(pb.Frame(step=pb.Step(lr=lr, scale=scale, skip=skip)))

    async def begin_round(self, round: int) -> None:
        """Return once every hop holds the parameters that `round` starts from."""
        await self._begin(pb.BeginRound(round=round))

    async def carry_into(self, round: int, pipeline_id: int, generation: int) -> None:
        """As `begin_round`, with what every hop has trained since the end of the round before on top.

        From then on the chain is of the pipeline named, which must have the same nodes.
        """
        await self._begin(pb.BeginRound(round=round, carry=True, pipeline_id=pipeline_id, generation=generation))

    async def _begin(self, message: pb.BeginRound) -> None:
        await self._exchange("begin_round", message.round, self._inputs, pb.Frame(begin_round=message))

    async def end_round(self, message: pb.EndRound) -> None:
        """Tell every hop to contribute its own blocks; returns when all have taken note."""
        await self._exchange("end_round", message.round, self._inputs, pb.Frame(end_round=message))

    @property
    def failure(self) -> SwarmError | None:
        """Why the chain can no longer be used; None while it can."""
        return self._failure

    async def close(self, *, keep: bool = False) -> None:
        """End the streams; nodes drop the session, or keep it for a while (`keep`). Safe to call twice."""
        for task in self._readers:
            task.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        self._fail(PeerLost("the chain was closed", "open a new one"))
        if not keep:
            # A peer that hangs takes nothing any more; the session there ends with its stream.
            with suppress(SwarmError, TimeoutError):
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await self._inputs.send(pb.Frame(close=pb.Close()))
        self._inputs.close()
        if self._outputs is not None:
            self._outputs.close()

    async def _exchange(
        self, kind: str, number: int, stream: FrameStream[pb.Frame], frame: pb.Frame, payload: bytes = b""
    ) -> _Answer:
        if self._failure is not None:
            raise self._failure
        answer: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()
        self._waiting[(kind, number)] = answer
        try:
            async with asyncio.timeout(self._timeout_s) as limit:
                self._limits.add(limit)
                try:
                    await stream.send(frame, payload)
                    return await answer
                finally:
                    self._limits.discard(limit)
        except TimeoutError as error:
            raise PeerLost(f"the chain {self._route()} did not answer within {self._timeout_s:.0f} s") from error
        finally:
            self._waiting.pop((kind, number), None)

    async def _read(self, stream: FrameStream[pb.Frame]) -> None:
        try:
            while True:
                received = await stream.receive()
                if received is None:
                    if stream is self._outputs:
                        # A hop that failed in the middle also ends this stream; its own account of
                        # what happened is on the way back along the chain and says more.
                        with suppress(TimeoutError):
                            async with asyncio.timeout(_ACCOUNT_GRACE_S):
                                await self._failed.wait()
                    raise PeerLost(f"node {stream.peer} went away").blaming(stream.peer)
                self._take(*received, stream.peer)
        except ProtocolError as error:
            # Malformed: whoever sent it here is at fault.
            self._fail(error.blaming(stream.peer))
        except SwarmError as error:
            self._fail(error)

    def _take(self, frame: pb.Frame, payload: bytes, sender: str) -> None:
        kind = frame.WhichOneof("kind")
        value = _Answer()
        if kind == "forward":
            number = frame.forward.seq
            if not frame.forward.void:
                value = _Answer(Packed(frame.forward.tensor, payload, sender))
        elif kind == "backward":
            number = frame.backward.seq
            grad = None if frame.backward.void else Packed(frame.backward.tensor, payload, sender)
            value = _Answer(grad, frame.backward.squared_norm)
        elif kind == "begin_round":
            number = frame.begin_round.round
        elif kind == "end_round":
            number = frame.end_round.round
        elif kind == "draining":
            self.draining.add(frame.draining.peer_id)
            return
        elif kind == "step":
            return  # it has passed every hop; nobody waits for it
        elif kind == "error":
            raise error_from_proto(frame.error)
        elif kind == "close":
            raise PeerLost(f"the chain {self._route()} lost its way back to here")
        else:
            raise ProtocolError(f"unexpected frame '{kind}' from a chain")
        for limit in self._limits:
            if not limit.expired():
                limit.reschedule(asyncio.get_running_loop().time() + self._timeout_s)
        answer = self._waiting.get((kind, number))
        if answer is not None and not answer.done():
            answer.set_result(value)

    def _fail(self, error: SwarmError) -> None:
        # The first failure is the cause; what follows it is noise.
        if self._failure is None:
            self._failure = error
            self._failed.set()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(self._failure)

    def _route(self) -> str:
        return " → ".join(f"{hop.peer_id[-6:]}[{hop.span}]" for hop in self.hops)


async def expect_opened(
    stream: FrameStream[pb.Frame], queued: Callable[[int, str], None] | None = None
) -> tuple[pb.HopState, ...]:
    """Wait until the hop at the other end is ready; the states of it and of all behind it."""
    while True:
        received = await stream.receive()
        if received is None:
            raise PeerLost(f"node {stream.peer} closed the stream while the chain opened").blaming(stream.peer)
        frame, _ = received
        kind = frame.WhichOneof("kind")
        if kind == "error":
            raise error_from_proto(frame.error)
        if kind == "opened":
            return tuple(frame.opened.hops)
        if kind != "queued":
            raise ProtocolError(f"expected 'opened' from {stream.peer}, got '{kind}'").blaming(stream.peer)
        if queued is not None:
            queued(frame.queued.position, frame.queued.reason)


def lost_hop(hop: Hop) -> PeerLost:
    """The error that names a hop which went away."""
    return PeerLost(f"node {hop.peer_id} (blocks {hop.span}) went away").blaming(hop.peer_id)
