"""A training chain's hop: what the coordinator assigned, computed by this node's trainer."""

from __future__ import annotations

from typing import Protocol

import torch

from node.hop import ChainHop
from swarm.compute import Priority
from swarm.errors import SessionError
from swarm.wire.tensors import pack, payload_size, unpack
from swarm.wire.v1 import chain_pb2 as pb
from swarm.wire.v1 import common_pb2


class TrainStage(Protocol):
    """What this node's trainer offers to a lead's chain."""

    def admit(self, shape_BTD: tuple[int, ...], position: int) -> None: ...
    def train_forward(self, seq: int, hidden_BTD: torch.Tensor) -> torch.Tensor: ...
    def train_backward(self, seq: int, grad_BTD: torch.Tensor) -> torch.Tensor: ...
    def step(self, lr: float) -> None: ...
    async def begin_round(self, round: int) -> None: ...
    def end_round(self, message: pb.EndRound) -> None: ...
    def close(self) -> None: ...


class TrainHop(ChainHop):
    """Forward, backward and the round's beginning and end."""

    _stage: TrainStage | None = None

    async def prepare(self) -> pb.HopState:
        if self.server.trainer is None:
            raise SessionError("this node takes no part in training")
        self._stage = await self.server.trainer.accept(self.opener, self.request)
        return pb.HopState()

    async def on_forward(self, message: pb.Forward, payload: bytes) -> None:
        stage = self._ready()
        shape = (*self.check_hidden(message.tensor, payload), self.server.model.width)
        stage.admit(shape, message.position)
        shard = self.server.model.shard

        def compute() -> tuple[common_pb2.TensorMeta, bytes]:
            hidden = unpack(message.tensor, payload, shard.dtype, shard.device)
            return pack(stage.train_forward(message.seq, hidden), self.encoding)

        meta, data = await self.server.compute.run(Priority.TRAIN, compute)
        await self.send_on(pb.Frame(forward=pb.Forward(seq=message.seq, tensor=meta)), data)

    async def on_backward(self, message: pb.Backward, payload: bytes) -> None:
        stage = self._ready()
        payload_size(message.tensor)
        shard = self.server.model.shard

        def compute() -> tuple[common_pb2.TensorMeta, bytes]:
            grad = unpack(message.tensor, payload, shard.dtype, shard.device)
            return pack(stage.train_backward(message.seq, grad), self.encoding)

        meta, data = await self.server.compute.run(Priority.TRAIN, compute)
        reply = pb.Backward(seq=message.seq, tensor=meta, step=message.step, lr=message.lr)
        # The gradient leaves first: the hop before computes while this one steps its optimizer.
        await self.send_back(pb.Frame(backward=reply), data)
        if message.step:
            await self.server.compute.run(Priority.TRAIN, stage.step, message.lr)

    async def on_other(self, frame: pb.Frame) -> None:
        kind = frame.WhichOneof("kind")
        if kind == "begin_round":
            await self._ready().begin_round(frame.begin_round.round)
        elif kind == "end_round":
            self._ready().end_round(frame.end_round)
        else:
            await super().on_other(frame)
        await self.send_on(frame)

    async def on_close(self) -> None:
        if self._stage is not None:
            self._stage.close()

    def _ready(self) -> TrainStage:
        assert self._stage is not None
        return self._stage
