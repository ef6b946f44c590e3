"""Serving hops: a session with a KV cache, stateless passes, and passes whose input gradient is wanted."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import torch

from node.batching import Packed, Step
from node.hop import ChainHop, tell
from node.serving import ServingSession, ServingView
from node.sessions import Carrier
from swarm.compute import Priority
from swarm.errors import ContextTooLong, Preempted, ProtocolError
from swarm.model.shard import View
from swarm.net.view import FileInfo
from swarm.wire.masks import pack_mask, unpack_mask
from swarm.wire.tensors import pack, payload_size, unpack
from swarm.wire.v1 import chain_pb2 as pb

_MOST_ROWS = 256
_MOST_IN_FLIGHT = 64
_TELL_S = 1.0


class _AdaptedHop(ChainHop):
    """What serving hops share: the adapter that the opener asked for, and the context's end."""

    async def adapter(self) -> tuple[bytes, dict[str, bytes] | None]:
        """The adapter's id (b"" for the base model) and its files. Raises AdapterNotFound."""
        if not self.request.HasField("adapter"):
            return b"", None
        wanted = tuple(FileInfo(f.name, f.sha256, f.size) for f in self.request.adapter.files)
        files = await self.server.adapters.files(self.request.adapter.name, wanted)
        return b"".join(sorted(f.sha256 for f in wanted)), files

    async def shared_view(self) -> tuple[ServingView, bytes]:
        """The view to compute with, the adapter loaded into it."""
        adapter_id, files = await self.adapter()

        def load() -> ServingView:
            view = self.server.model.view(self.hop.span)
            if files is not None:
                view.load(adapter_id, self.server.model.adapters, files)
            return view

        view = await self.server.compute.run(Priority.PREFILL, load)
        view.in_use[adapter_id] = view.in_use.get(adapter_id, 0) + 1
        return view, adapter_id

    def check_context(self, columns: int) -> None:
        limit = self.server.model.context_length
        if columns > limit:
            raise ContextTooLong(f"{columns} tokens are more than the model's context of {limit}")

    def placed(self, message: pb.Forward, rows: int, columns: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The mask [B, T] and the position ids [B, T] of a step without a cache, where it has any."""
        device = self.server.model.shard.device
        mask = unpack_mask(message.mask, rows, columns)
        positions = None
        if message.position_ids:
            positions = torch.tensor(list(message.position_ids)).reshape(rows, columns)
        elif mask is not None:
            positions = (mask.long().cumsum(dim=1) - 1).clamp_(min=0)
        return (
            None if mask is None else mask.to(device),
            None if positions is None else positions.to(device),
        )

    def check_step(self, message: pb.Forward, payload: bytes) -> tuple[int, int]:
        """(rows, columns) of a step that fits. Raises ProtocolError, ContextTooLong."""
        rows, columns = self.check_hidden(message.tensor, payload)
        self.check_context(message.position + columns)
        if message.position_ids and len(message.position_ids) != rows * columns:
            raise ProtocolError(f"{len(message.position_ids)} position ids for {rows} rows of {columns} columns")
        return rows, columns


class ServeHop(_AdaptedHop, Carrier):
    """A session's steps on this node, and the rebuilding of its neighbours' caches."""

    _session: ServingSession | None = None
    _step: asyncio.Task[Packed | None] | None = None
    _released = False

    async def prepare(self) -> pb.HopState:
        request = self.request
        if not 1 <= request.rows <= _MOST_ROWS:
            raise ProtocolError(f"a session has 1 to {_MOST_ROWS} rows, not {request.rows}")
        adapter_id, files = await self.adapter()
        self._session = await self.server.sessions.open(
            self,
            request.session_id,
            self.opener,
            self.hop.span,
            adapter_id,
            files,
            request.rows,
            min(request.expected_tokens, self.server.model.context_length),
            request.admission_s,
            self.tell_queued,
        )
        return pb.HopState(held=self._session.held, logged_from=self._logged_from())

    def _logged_from(self) -> int:
        session = self._require()
        return session.log.start if session.log.end >= session.held else session.held

    async def on_forward(self, message: pb.Forward, payload: bytes) -> None:
        session = self._require()
        rows, columns = self.check_step(message, payload)
        end = message.position + columns
        if message.refill and self.request.index >= message.refill:
            return  # neither this hop nor those behind it lost anything
        expected = len(message.rows) or session.cache.batch
        if rows != expected:
            raise ProtocolError(f"a step of {rows} rows for a session of {expected}")
        await self.server.sessions.charge(session, max(end, session.held), max(rows, session.cache.batch))
        session.received = message.seq
        tail = None
        if self.last:
            tail = message.tail if message.HasField("tail") else columns
        step = Step(session, message, payload, self.encoding, tail)
        # A task of its own: whoever takes the session over waits for its end.
        self._step = asyncio.create_task(self.server.batcher.run(step))
        try:
            packed = await asyncio.shield(self._step)
        except ProtocolError as error:
            raise self.blame_sender(error) from error
        if packed is not None:
            await self._send(session, message, packed)
        session.sent = message.seq

    async def _send(self, session: ServingSession, message: pb.Forward, packed: Packed) -> None:
        meta, data = packed
        reply = pb.Forward(seq=message.seq, position=message.position, tensor=meta)
        if not self.last:
            reply.rows.extend(message.rows)
            reply.mask = message.mask
            reply.position_ids.extend(message.position_ids)
            reply.refill = message.refill
            if message.HasField("tail"):
                reply.tail = message.tail
            if message.rows or message.position_ids:
                # Rows that move, and positions of the opener's own, are the opener's to replay.
                session.log.clear(message.position + int(meta.shape[1]))
            else:
                session.log.add(message.position, meta, data)
            self.server.sessions.charge_log(session)
        await self.send_on(pb.Frame(forward=reply), data)

    async def on_other(self, frame: pb.Frame) -> None:
        if frame.WhichOneof("kind") != "refill":
            await super().on_other(frame)
        order, session = frame.refill, self._require()
        if order.first != self.request.index + 1:
            await self.send_on(frame)
            return
        log = session.log
        if not log.start <= order.start < order.end <= log.end:
            raise ProtocolError(f"columns {order.start}-{order.end} are no longer in this hop's log")
        mask_BS = session.cache.mask_BS
        for position, meta, data in await asyncio.to_thread(lambda: list(log.frames(order.start, order.end))):
            columns = int(meta.shape[1])
            mask = b"" if mask_BS is None else pack_mask(mask_BS[:, position : position + columns])
            message = pb.Forward(position=position, tensor=meta, mask=mask, tail=0, refill=order.last + 1)
            await self.send_on(pb.Frame(forward=message), data)

    async def release(self, error: Preempted | None) -> None:
        self._released = True
        if error is not None:
            # A client that hangs must not keep the memory that others wait for.
            with suppress(TimeoutError):
                async with asyncio.timeout(_TELL_S):
                    await tell(self._upstream, error.blaming(self.server.peer.peer_id))
        await self.stop_reading()
        await self._idle()

    async def _idle(self) -> None:
        if self._step is not None:
            await asyncio.gather(self._step, return_exceptions=True)

    async def on_close(self) -> None:
        await self._idle()
        self._step = None
        if self._session is None or self._released:
            return
        if self.closed_by_opener or self.server.draining:
            self.server.sessions.end(self.request.session_id, self)
        else:
            self.server.sessions.park(self.request.session_id, self)

    def _require(self) -> ServingSession:
        assert self._session is not None
        return self._session


class StatelessHop(_AdaptedHop):
    """Forward passes that leave nothing behind (scoring, evaluation)."""

    _view: ServingView | None = None
    _adapter_id = b""

    async def prepare(self) -> pb.HopState:
        self._view, self._adapter_id = await self.shared_view()
        return pb.HopState()

    async def on_forward(self, message: pb.Forward, payload: bytes) -> None:
        rows, columns = self.check_step(message, payload)
        self.admit(message.seq, rows * columns)
        shard, view = self.server.model.shard, self._view
        assert view is not None

        def compute() -> Packed:
            hidden = unpack(message.tensor, payload, shard.dtype, shard.device)
            mask, positions = self.placed(message, rows, columns)
            with view.bank.rows([self._adapter_id] * rows):
                return pack(self.run_blocks(message.seq, view.view, hidden, mask, positions), self.encoding)

        try:
            meta, data = await self.server.compute.run(Priority.PREFILL, compute)
        except ProtocolError as error:
            raise self.blame_sender(error) from error
        reply = pb.Forward(seq=message.seq, tensor=meta)
        if not self.last:
            reply.mask = message.mask
            reply.position_ids.extend(message.position_ids)
        await self.send_on(pb.Frame(forward=reply), data)

    def admit(self, seq: int, tokens: int) -> None:
        """Charge what a step will keep: nothing."""

    def run_blocks(
        self,
        seq: int,
        view: View,
        hidden_BTD: torch.Tensor,
        mask_BT: torch.Tensor | None,
        positions_BT: torch.Tensor | None,
    ) -> torch.Tensor:
        """The blocks' output. Compute thread only."""
        with torch.inference_mode():
            return view.forward(hidden_BTD, mask_BS=mask_BT, positions_BT=positions_BT)

    async def on_close(self) -> None:
        if self._view is not None:
            in_use = self._view.in_use
            in_use[self._adapter_id] -= 1
            if not in_use[self._adapter_id]:
                del in_use[self._adapter_id]


class GradientHop(StatelessHop):
    """Forward passes that keep their graph until the gradient of their output comes back.

    Nothing on this node is trained: the gradient of the input goes on to the hop before, and in the
    end to a client that trains what it put in (soft prompts, embeddings).
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self._graphs: dict[int, tuple[torch.Tensor, torch.Tensor, int]] = {}

    @property
    def _owner(self) -> str:
        return f"gradients {self.request.session_id}"

    def _charge(self) -> None:
        config = self.server.model.checkpoint.config
        hidden = self.server.model.width
        inner = getattr(config, "intermediate_size", None) or 4 * hidden
        # What autograd keeps of a block: about ten tensors of the hidden and four of the inner width.
        per_token = (10 * hidden + 4 * inner) * self.server.model.shard.dtype.itemsize * len(self.hop.span)
        columns = sum(size for _, _, size in self._graphs.values())
        self.server.ledger.charge("activations", self._owner, columns * per_token)

    def admit(self, seq: int, tokens: int) -> None:
        """Charge a graph before it is made. Raises ProtocolError (too many wait), OutOfMemory."""
        if len(self._graphs) >= _MOST_IN_FLIGHT:
            raise ProtocolError(
                f"{_MOST_IN_FLIGHT} batches wait for their gradients", "send gradients before more batches"
            )
        empty = torch.empty(0)
        self._graphs[seq] = (empty, empty, tokens)
        self._charge()

    def run_blocks(
        self,
        seq: int,
        view: View,
        hidden_BTD: torch.Tensor,
        mask_BT: torch.Tensor | None,
        positions_BT: torch.Tensor | None,
    ) -> torch.Tensor:
        hidden_BTD.requires_grad_(True)
        with torch.enable_grad():
            output = view.forward(hidden_BTD, mask_BS=mask_BT, positions_BT=positions_BT)
        self._graphs[seq] = (hidden_BTD, output, hidden_BTD.shape[0] * hidden_BTD.shape[1])
        return output

    async def on_backward(self, message: pb.Backward, payload: bytes) -> None:
        payload_size(message.tensor)
        kept = self._graphs.pop(message.seq, None)
        if kept is None or tuple(kept[1].shape) != tuple(message.tensor.shape):
            raise ProtocolError(f"a gradient for batch {message.seq}, which does not wait for one of that shape")
        hidden, output, _ = kept
        shard = self.server.model.shard

        def compute() -> Packed:
            grad = unpack(message.tensor, payload, shard.dtype, shard.device)
            (of_input,) = torch.autograd.grad(output, hidden, grad)
            return pack(of_input, self.encoding, scaled=self.scaled)

        meta, data = await self.server.compute.run(Priority.PREFILL, compute)
        self._charge()
        await self.send_back(pb.Frame(backward=pb.Backward(seq=message.seq, tensor=meta)), data)

    async def on_close(self) -> None:
        await super().on_close()
        self._graphs.clear()
        self.server.ledger.release(self._owner)
