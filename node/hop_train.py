"""A training chain's hop: what the coordinator assigned, computed by this node's trainer.

Forward and backward passes take turns as `node.turns` says; backward passes go before forward passes on the
compute thread. What is not finite is never sent: the message says `void` instead, up and down the chain, and
the lead skips the optimizer step on every stage.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch

from node.hop import ChainHop
from node.step import RANK_BACKWARD, RANK_FORWARD
from node.turns import Room, window
from swarm.compute import Priority
from swarm.errors import ProtocolError, SessionError, VersionError
from swarm.wire.tensors import is_finite, pack, payload_size, unpack
from swarm.wire.v1 import chain_pb2 as pb
from swarm.wire.v1 import common_pb2

_Packed = tuple[common_pb2.TensorMeta, bytes]


class TrainStage(Protocol):
    """What this node's trainer offers to a lead's chain."""

    def fits(self, shape_BTD: tuple[int, ...]) -> bool: ...
    def admit(self, seq: int, shape_BTD: tuple[int, ...]) -> None: ...
    def give_back(self) -> None: ...
    def train_forward(
        self, seq: int, hidden_BTD: torch.Tensor, positions_BT: torch.Tensor | None = None
    ) -> torch.Tensor: ...
    def train_backward(self, seq: int, grad_BTD: torch.Tensor) -> torch.Tensor: ...
    def admit_score(self, shape_BTD: tuple[int, ...]) -> None: ...
    def score(self, hidden_BTD: torch.Tensor) -> torch.Tensor: ...
    def drop(self, seq: int) -> None: ...
    def squared_norm(self) -> float: ...
    def step(self, lr: float, scale: float) -> None: ...
    def skip(self) -> None: ...
    async def begin_round(self, message: pb.BeginRound) -> None: ...
    async def end_round(self, message: pb.EndRound) -> None: ...
    async def close(self) -> None: ...


class TrainHop(ChainHop):
    """Forward, backward, the optimizer's step, and the round's beginning and end."""

    _stage: TrainStage | None = None

    async def prepare(self) -> pb.HopState:
        if self.server.trainer is None:
            raise SessionError("this node takes no part in training")
        if "step-frames" not in self.request.hello.required:
            # It would send gradients and never a step: this node would contribute nothing and not notice.
            raise VersionError("the pipeline's lead runs an older release, which steps in another way")
        self._stage = await self.server.trainer.accept(self.opener, self.request)
        self._room = Room(window(len(self.hops), self.request.index))
        return pb.HopState()

    async def on_forward(self, message: pb.Forward, payload: bytes) -> None:
        # Frames behind this one stay in the stream until a gradient has freed a graph.
        packed = None
        if message.score:
            packed = None if message.void else await self._score(message, payload)
        elif message.void:
            await self._room.forward(lambda: True)
        else:
            packed = await self._forward(message, payload)
        if packed is None:
            await self.send_on(pb.Frame(forward=pb.Forward(seq=message.seq, void=True, score=message.score)))
        else:
            reply = pb.Forward(
                seq=message.seq, tensor=packed[0], position_ids=message.position_ids, score=message.score
            )
            await self.send_on(pb.Frame(forward=reply), packed[1])

    async def _forward(self, message: pb.Forward, payload: bytes) -> _Packed | None:
        stage = self._ready()
        rows, columns = self.check_hidden(message.tensor, payload)
        positions_BT = self._positions(message, rows, columns)
        shape = (rows, columns, self.server.model.width)
        await self._room.forward(lambda: stage.fits(shape))
        stage.admit(message.seq, shape)
        shard = self.server.model.shard

        def compute() -> _Packed | None:
            hidden = unpack(message.tensor, payload, shard.dtype, shard.device)
            output = stage.train_forward(message.seq, hidden, positions_BT)
            return pack(output, self.encoding) if is_finite(output) else None

        return await self.server.compute.run(Priority.TRAIN, compute, rank=RANK_FORWARD)

    async def _score(self, message: pb.Forward, payload: bytes) -> _Packed | None:
        """A forward pass that no gradient follows: it keeps nothing, so it waits for no room."""
        stage, shard = self._ready(), self.server.model.shard
        rows, columns = self.check_hidden(message.tensor, payload)
        stage.admit_score((rows, columns, self.server.model.width))

        def compute() -> _Packed | None:
            output = stage.score(unpack(message.tensor, payload, shard.dtype, shard.device))
            return pack(output, self.encoding) if is_finite(output) else None

        try:
            return await self.server.compute.run(Priority.TRAIN, compute, rank=RANK_FORWARD)
        finally:
            stage.give_back()

    def _positions(self, message: pb.Forward, rows: int, columns: int) -> torch.Tensor | None:
        """Position ids [B, T] of packed rows; None: every row is one sample. Raises ProtocolError."""
        ids = list(message.position_ids)
        if not ids:
            return None
        if len(ids) != rows * columns or max(ids) >= columns:
            raise self.blame_sender(ProtocolError(f"{len(ids)} position ids that do not fit {rows} rows of {columns}"))
        return torch.tensor(ids).reshape(rows, columns)

    async def on_backward(self, message: pb.Backward, payload: bytes) -> None:
        try:
            await self._backward(message, payload)
        except ProtocolError as error:
            # Gradients come from the next hop; to the last one they come from the lead, whose own fault they are.
            raise error if self.last else error.blaming(self.hops[self.request.index + 1].peer_id) from error

    async def _backward(self, message: pb.Backward, payload: bytes) -> None:
        stage, shard = self._ready(), self.server.model.shard
        if not self._room.held:
            raise ProtocolError(f"a gradient for batch {message.seq}, which never came")
        if message.squared_norm < 0:
            raise ProtocolError(f"a squared norm of {message.squared_norm}")
        if not message.void:
            payload_size(message.tensor)

        def compute() -> tuple[_Packed | None, float]:
            packed = None
            if message.void:
                stage.drop(message.seq)
            else:
                gradient = stage.train_backward(message.seq, unpack(message.tensor, payload, shard.dtype, shard.device))
                packed = pack(gradient, self.encoding, scaled=self.scaled) if is_finite(gradient) else None
            return packed, stage.squared_norm() if message.last else 0.0

        packed, own = await self.server.compute.run(Priority.TRAIN, compute, rank=RANK_BACKWARD)
        await self._room.backward()
        reply = pb.Backward(seq=message.seq, last=message.last, void=packed is None)
        reply.squared_norm = message.squared_norm + own
        if packed is None:
            await self.send_back(pb.Frame(backward=reply))
        else:
            reply.tensor.CopyFrom(packed[0])
            await self.send_back(pb.Frame(backward=reply), packed[1])

    async def on_other(self, frame: pb.Frame) -> None:
        kind, stage = frame.WhichOneof("kind"), self._ready()
        if kind == "step":
            # The next hop steps at the same time; what follows on this stream waits for this one.
            await self.send_on(frame)
            await self._step(frame.step)
            return
        if kind == "begin_round":
            await stage.begin_round(frame.begin_round)
        elif kind == "end_round":
            await stage.end_round(frame.end_round)
        else:
            await super().on_other(frame)
        await self.send_on(frame)

    async def _step(self, message: pb.Step) -> None:
        stage, run = self._ready(), self.server.compute.run
        if self._room.held:
            raise ProtocolError(f"an optimizer step while {self._room.held} batches wait for their gradients")
        if not (math.isfinite(message.lr) and message.lr >= 0 and 0 <= message.scale <= 1):
            raise ProtocolError(f"an optimizer step at rate {message.lr} and scale {message.scale}")
        stage.give_back()
        if message.skip:
            await run(Priority.TRAIN, stage.skip, rank=RANK_BACKWARD)
        else:
            await run(Priority.TRAIN, stage.step, message.lr, message.scale, rank=RANK_BACKWARD)

    async def on_close(self) -> None:
        if self._stage is not None:
            await self._stage.close()

    def _ready(self) -> TrainStage:
        assert self._stage is not None
        return self._stage
