"""One optimizer step of a pipeline, as its lead drives it: microbatches through the chain and back.

Three loops run side by side, each through the microbatches in order, so that every stage adds up its
gradients in the same order whatever arrives when:

    feed     embed → the lead's own blocks → the chain          as many microbatches under way as `node.turns` says
    head     the chain's output → loss → gradient → the chain
    settle   the chain's gradient → the lead's own blocks

What the head does comes first on the compute thread, because the other nodes wait for it; then backward
passes, which free memory; then forward passes. Once the last gradient is back the lead knows the norm
over all blocks and tells every stage to step, with what to scale by, or to skip. That message needs no
answer: it travels ahead of the next step's first activations, so nobody waits for it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from node.loss import label_loss
from node.stage import AdapterStage
from node.turns import Room, window
from swarm.compute import Compute, Priority
from swarm.data.batch import Batch
from swarm.data.microbatch import Microbatch
from swarm.errors import ProtocolError
from swarm.model.shard import Head
from swarm.net.chain import Chain, Packed
from swarm.wire.tensors import is_finite

RANK_HEAD, RANK_BACKWARD, RANK_FORWARD = 0.0, 1.0, 2.0
"""Of pieces on the compute thread of a lead or a stage: lower runs first."""
_CLIP_EPSILON = 1e-6
"""As in torch.nn.utils.clip_grad_norm_."""


@dataclass(frozen=True)
class StepResult:
    loss: float
    """Mean over the step's labelled tokens."""
    norm: float
    """Of the gradient, over the adapters of all blocks, before clipping."""
    taken: bool
    """False: the loss or the gradient was not finite, and every stage dropped the step."""


def clip_scale(norm: float, clip: float | None) -> float:
    """What gradients of this norm are multiplied by."""
    return 1.0 if clip is None else min(1.0, clip / (norm + _CLIP_EPSILON))


class StepDriver:
    """Takes a lead's optimizer steps over one chain, or over its own blocks alone."""

    def __init__(self, head: Head, stage: AdapterStage, compute: Compute, chain: Chain | None) -> None:
        self._head = head
        self._stage = stage
        self._compute = compute
        self._chain = chain

    async def step(self, parts: Sequence[Microbatch], lr: float, clip: float | None = None) -> StepResult:
        """Raises PeerLost, OutOfMemory, and whatever a stage reports."""
        loss, norm = await self.gradient(parts)
        taken = math.isfinite(loss) and math.isfinite(norm)
        scale = clip_scale(norm, clip) if taken else 1.0
        if self._chain is not None:
            await self._chain.step(lr, scale, skip=not taken)
        if taken:
            await self._compute.run(Priority.TRAIN, self._stage.step, lr, scale, rank=RANK_BACKWARD)
        else:
            await self._compute.run(Priority.TRAIN, self._stage.skip, rank=RANK_BACKWARD)
        return StepResult(loss, norm, taken)

    async def gradient(self, parts: Sequence[Microbatch]) -> tuple[float, float]:
        """Add up the gradient of every stage. Returns the loss and the norm over all stages, NaN or infinity if
        one met a number that is not finite."""
        return await _Pass(self._head, self._stage, self._compute, self._chain, parts).run()


_Sent = torch.Tensor | Packed
"""What goes from one loop to the next: packed over a chain, which the compute thread does, not the loop."""


class _Pass:
    """The forward and backward passes of one step."""

    def __init__(
        self, head: Head, stage: AdapterStage, compute: Compute, chain: Chain | None, parts: Sequence[Microbatch]
    ) -> None:
        self._head = head
        self._stage = stage
        self._compute = compute
        self._chain = chain
        self._parts = parts
        self._room = Room(window(1 if chain is None else len(chain.hops) + 1, 0))
        self._outputs: asyncio.Queue[asyncio.Task[tuple[int, _Sent | None]]] = asyncio.Queue()
        self._gradients: asyncio.Queue[asyncio.Task[tuple[_Sent | None, float]]] = asyncio.Queue()
        self._losses: list[float] = []
        self._squared_norm = 0.0

    async def run(self) -> tuple[float, float]:
        """(loss, norm of the gradient); NaN or infinity if a stage met one."""
        try:
            async with asyncio.TaskGroup() as group:
                for loop in (self._feed(group), self._heads(group), self._settle()):
                    group.create_task(loop)
        except ExceptionGroup as failures:
            raise first_failure(failures) from failures
        self._stage.give_back()
        # In the order of the microbatches: a sum of floats depends on it.
        return sum(self._losses), math.sqrt(self._squared_norm)

    async def _feed(self, group: asyncio.TaskGroup) -> None:
        for number, part in enumerate(self._parts):
            shape = self._shape(part)
            await self._room.forward(partial(self._stage.fits, shape))
            self._stage.admit(number, shape)

            def forward(number: int = number, batch: Batch = part.batch) -> _Sent | None:
                hidden = self._head.embed(batch.input_ids_BT, batch.positions_BT).detach()
                output = self._stage.forward(number, hidden, batch.positions_BT, input_grad=False)
                return self._pack(output) if is_finite(output) else None

            output = await self._on_thread(forward, RANK_FORWARD)
            # Tasks start in the order in which they are made, and sending is first come first served.
            await self._outputs.put(group.create_task(self._through(output, part.batch.positions_BT)))

    def _pack(self, tensor: torch.Tensor) -> _Sent:
        return tensor if self._chain is None else self._chain.pack(tensor)

    def _pack_gradient(self, tensor: torch.Tensor) -> _Sent:
        return tensor if self._chain is None else self._chain.pack_gradient(tensor)

    def _shape(self, part: Microbatch) -> tuple[int, ...]:
        """[B, T, D] of what a microbatch is everywhere between the embedding and the head."""
        return (*part.batch.input_ids_BT.shape, self._head.width)

    def _unpack(self, sent: _Sent, part: Microbatch) -> torch.Tensor:
        """Raises ProtocolError, naming who sent what does not fit."""
        if isinstance(sent, torch.Tensor):
            return sent
        assert self._chain is not None
        return self._chain.unpack(sent, self._shape(part))

    async def _through(self, output: _Sent | None, positions_BT: torch.Tensor | None) -> tuple[int, _Sent | None]:
        if self._chain is None:
            return 0, output
        assert not isinstance(output, torch.Tensor)
        position_ids = () if positions_BT is None else positions_BT.flatten().tolist()
        return await self._chain.train_forward(output, position_ids)

    async def _heads(self, group: asyncio.TaskGroup) -> None:
        for number, part in enumerate(self._parts):
            seq, output = await (await self._outputs.get())
            loss, gradient = math.nan, None
            if output is not None:
                loss, gradient = await self._on_thread(partial(self._loss_of, output, part), RANK_HEAD)
            self._losses.append(loss)
            last = number == len(self._parts) - 1
            await self._gradients.put(group.create_task(self._back(seq, gradient, last)))

    def _loss_of(self, sent: _Sent, part: Microbatch) -> tuple[float, _Sent | None]:
        """The loss and its gradient; NaN or infinity and None if one of them is not finite."""
        stage, output = self._stage, self._unpack(sent, part)
        loss, gradient = label_loss(
            self._head, output, part.batch.labels_BT, part.share, stage.precision, stage.give_way
        )
        if not math.isfinite(loss):
            return loss, None
        return (loss, self._pack_gradient(gradient)) if is_finite(gradient) else (math.nan, None)

    async def _back(self, seq: int, gradient: _Sent | None, last: bool) -> tuple[_Sent | None, float]:
        if self._chain is None:
            return gradient, 0.0
        assert not isinstance(gradient, torch.Tensor)
        back, squared_norm = await self._chain.train_backward(seq, gradient, last)
        if squared_norm < 0:
            raise ProtocolError(f"a squared norm of {squared_norm}").blaming(self._chain.hops[0].peer_id)
        return back, squared_norm

    async def _settle(self) -> None:
        for number, part in enumerate(self._parts):
            gradient, squared_norm = await (await self._gradients.get())

            def backward(number: int = number, part: Microbatch = part, gradient: _Sent | None = gradient) -> float:
                if gradient is None:
                    self._stage.drop(number)
                else:
                    self._stage.backward(number, self._unpack(gradient, part))
                last = number == len(self._parts) - 1
                return self._stage.squared_norm() if last else 0.0

            self._squared_norm += squared_norm + await self._on_thread(backward, RANK_BACKWARD)
            if gradient is None:
                self._squared_norm = math.nan
            await self._room.backward()

    async def _on_thread(self, piece: Any, rank: float) -> Any:
        return await self._compute.run(Priority.TRAIN, piece, rank=rank)


def first_failure(failures: ExceptionGroup[Exception]) -> Exception:
    """The first error of a group that stands for itself: the others are its consequences."""
    first = failures.exceptions[0]
    return first_failure(first) if isinstance(first, ExceptionGroup) else first
