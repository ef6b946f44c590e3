"""A stage's side of a training chain: what the lead's frames do to this node's part in the job.

In: frames of the chain, one after the other. Out: tensors for the next hop, and at a round's end its
contribution, which is sent beside the chain. Torch runs on the compute thread only; the methods that
compute are called there. A chain whose pipeline is no more changes nothing.
"""

from __future__ import annotations

from typing import Protocol

import torch

from node.member import Ended, JobMember, Work
from swarm.errors import SessionError
from swarm.wire.v1 import chain_pb2
from swarm.wire.v1 import coordinator_pb2 as pb


class Settler(Protocol):
    """What a chain needs of the worker that holds the node's assignment."""

    def stands(self, assignment: pb.Assignment) -> bool:
        """Whether this pipeline was not formed anew since. From any thread."""
        ...

    async def next_assignment(self, old: pb.Assignment, begin: chain_pb2.BeginRound) -> pb.Assignment: ...

    def settle_later(self, member: JobMember, work: Work, ended: Ended) -> None: ...


class StageSession:
    """A lead's training chain on this node, bound to one assignment at a time."""

    def __init__(self, worker: Settler, member: JobMember, assignment: pb.Assignment) -> None:
        self._worker = worker
        self._member = member
        self._assignment = assignment
        self._use = -1
        """Of the member, by this chain; -1 before its first round."""

    def fits(self, shape_BTD: tuple[int, ...]) -> bool:
        return self._member.stage.fits(shape_BTD)

    def _fence(self) -> None:
        """A lead that lost the coordinator, or was stopped for a while, does not know that its pipeline is no more:
        what it still sends must not move what the new one trains. Raises SessionError."""
        if not self._worker.stands(self._assignment):
            raise SessionError("the pipeline of this training chain was formed anew", "nothing to do: ask what is next")

    def admit(self, seq: int, shape_BTD: tuple[int, ...]) -> None:
        self._member.stage.admit(seq, shape_BTD)

    def give_back(self) -> None:
        self._member.stage.give_back()

    def train_forward(
        self, seq: int, hidden_BTD: torch.Tensor, positions_BT: torch.Tensor | None = None
    ) -> torch.Tensor:
        self._fence()
        return self._member.stage.forward(seq, hidden_BTD, positions_BT, input_grad=True)

    def train_backward(self, seq: int, grad_BTD: torch.Tensor) -> torch.Tensor:
        self._fence()
        grad = self._member.stage.backward(seq, grad_BTD)
        assert grad is not None  # input_grad was asked for in forward
        return grad

    def admit_score(self, shape_BTD: tuple[int, ...]) -> None:
        self._member.stage.admit_score(shape_BTD)

    def score(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        return self._member.stage.score(hidden_BTD)

    def drop(self, seq: int) -> None:
        self._fence()
        self._member.stage.drop(seq)

    def squared_norm(self) -> float:
        return self._member.stage.squared_norm()

    def step(self, lr: float, scale: float) -> None:
        self._fence()
        self._member.stage.step(lr, scale)

    def skip(self) -> None:
        self._fence()
        self._member.stage.skip()

    async def begin_round(self, message: chain_pb2.BeginRound) -> None:
        if message.carry:
            self._assignment = await self._worker.next_assignment(self._assignment, message)
            await self._member.carry(message.round, self._assignment.base_hash)
            return
        self._fence()
        # A lead that scores a committed round asks for what the next one starts from.
        scores = message.round != self._assignment.round
        base_hash = b"" if scores else self._assignment.base_hash
        await self._member.prepare(message.round, base_hash, self._assignment.lineage, to_score=scores)
        self._use = self._member.uses

    async def end_round(self, message: chain_pb2.EndRound) -> None:
        self._fence()
        work = Work(
            round=message.round,
            generation=self._assignment.generation,
            pipeline_id=self._assignment.pipeline_id,
            inner_steps=message.inner_steps,
            tokens=message.tokens,
            lease_id=message.lease_id,
            skipped_steps=message.skipped_steps,
        )
        # Now: what follows on the chain may be the next round's first steps.
        self._worker.settle_later(self._member, work, await self._member.end_steps())

    async def close(self) -> None:
        """The chain ended; the member stays for the next one."""
        await self._member.leave(self._use)
