"""Continuous batching: every step of a session that is ready when the blocks are free joins one batch.

While the compute thread runs a batch, steps that arrive wait for the next one (Orca; Yu et al., 2022);
`swarm.gather` says when it starts. One new column a session joins a batch; several columns (prefill
chunks, speculated tokens) are a piece of their own, chunks behind decoding and fair between clients.
Sessions whose family cannot be batched run one after the other within the piece.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from node.fair import FairClock
from node.serving import CHUNK_COLUMNS, NodeModel, ServingSession
from swarm.compute import Compute, Priority, as_out_of_memory
from swarm.errors import SwarmError
from swarm.gather import Gatherer
from swarm.ids import Span
from swarm.model.rows import Row, forward_rows
from swarm.wire.masks import unpack_mask
from swarm.wire.tensors import pack, unpack
from swarm.wire.v1 import chain_pb2 as pb
from swarm.wire.v1 import common_pb2

MOST_ROWS = 64
"""Of a batch; more that are ready take turns."""
_DECODE_COLUMNS = 16
"""Up to so many columns of few rows count as decoding (speculated tokens), not as a prefill chunk."""

Packed = tuple[common_pb2.TensorMeta, bytes]


@dataclass(eq=False)
class Step:
    """One forward of one session."""

    session: ServingSession
    message: pb.Forward
    payload: bytes
    encoding: str
    tail: int | None
    """Columns to send back on the last hop; None: all, as every other hop needs."""
    rank: float = 0.0
    done: asyncio.Future[Packed | None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def columns(self) -> int:
        return int(self.message.tensor.shape[1])


Outcomes = list[tuple[Step, Packed | None, Exception | None]]


class Batcher:
    """Runs the steps of all sessions of one node."""

    def __init__(self, model: NodeModel, compute: Compute) -> None:
        self._model = model
        self._compute = compute
        self._fair = FairClock()
        self._lanes: dict[Span, Gatherer[Step]] = {}
        self.batches = 0
        self.steps = 0
        """Batches and steps in them so far; their ratio is the mean batch."""

    async def run(self, step: Step) -> Packed | None:
        """The session's output, packed; None if no column of it is wanted. Raises SwarmError.

        Runs to its end even if the caller is cancelled: a session's cache never stops halfway.
        """
        rows = int(step.message.tensor.shape[0])
        step.rank = self._fair.start(step.session.opener, rows * step.columns)
        if step.columns == 1:
            self._lane(step.session.view.span).add(step, step.session.session_id)
            return await asyncio.shield(step.done)
        return await self._long(step)

    def _lane(self, span: Span) -> Gatherer[Step]:
        """Where the steps through a span gather."""
        if span not in self._lanes:
            loop = asyncio.get_running_loop()

            def start() -> None:
                self._compute.post(Priority.DECODE, lambda: self._batch(lane, loop))

            lane = self._lanes[span] = Gatherer[Step](start, MOST_ROWS)
        return self._lanes[span]

    def _batch_done(self, lane: Gatherer[Step], outcomes: Outcomes, took_s: float) -> None:
        self.batches += 1
        self.steps += len(outcomes)
        _deliver(outcomes)
        lane.finished(took_s)

    async def _long(self, step: Step) -> Packed | None:
        decode = step.columns <= _DECODE_COLUMNS
        priority = Priority.DECODE if decode else Priority.PREFILL
        hidden, positions = await self._compute.run(priority, self._begin, step, rank=step.rank)
        parts = []
        for start in range(0, step.columns, CHUNK_COLUMNS):
            self._fair.began(step.rank)
            end = min(start + CHUNK_COLUMNS, step.columns)
            parts.append(
                await self._compute.run(
                    priority, self._chunk, step, hidden[:, start:end], positions[:, start:end], rank=step.rank
                )
            )
        return await self._compute.run(priority, self._finish, step, parts, rank=step.rank)

    # Compute thread from here on.

    def _begin(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        message, cache = step.message, step.session.cache
        shard = self._model.shard
        hidden_BTD = unpack(message.tensor, step.payload, shard.dtype, shard.device)
        batch, time, _ = hidden_BTD.shape
        step.session.broken = True  # until the step is whole
        cache.prepare(message.position, time, list(message.rows), unpack_mask(message.mask, batch, time))
        if message.position_ids:
            positions = torch.tensor(list(message.position_ids)).reshape(batch, time)
        else:
            positions = cache.positions(time)
        return hidden_BTD, positions

    def _chunk(self, step: Step, hidden_BTD: torch.Tensor, positions_BT: torch.Tensor) -> torch.Tensor:
        session, time = step.session, hidden_BTD.shape[1]
        cache = session.cache
        mask_BS = None
        if cache.mask_BS is not None:
            mask_BS = cache.mask_BS[:, : cache.length + time].to(hidden_BTD.device)
        with torch.inference_mode(), session.view.bank.rows([session.adapter_id] * cache.batch):
            output = session.view.view.forward(
                hidden_BTD,
                cache.length,
                cache.kv,
                mask_BS=mask_BS,
                positions_BT=positions_BT.to(hidden_BTD.device),
            )
        cache.grew(time)
        return output

    def _finish(self, step: Step, parts: Sequence[torch.Tensor]) -> Packed | None:
        step.session.broken = False
        if step.tail == 0:
            return None
        output = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
        return pack(output if step.tail is None else output[:, -step.tail :], step.encoding)

    def _one(self, step: Step) -> Packed | None:
        hidden, positions = self._begin(step)
        return self._finish(step, [self._chunk(step, hidden, positions)])

    def _batch(self, lane: Gatherer[Step], loop: asyncio.AbstractEventLoop) -> None:
        ready = lane.take(self._leave)
        began_s = time.perf_counter()
        outcomes: Outcomes = []
        view = ready[0].session.view
        if len(ready) == 1 or not view.batches:
            for step in ready:
                try:
                    outcomes.append((step, self._one(step), None))
                except Exception as error:
                    outcomes.append((step, None, error))
        else:
            outcomes = self._together(ready)
        loop.call_soon_threadsafe(self._batch_done, lane, outcomes, time.perf_counter() - began_s)

    def _leave(self, ready: list[Step]) -> list[Step]:
        """Take from `ready` the steps that this batch has no room for, by rank."""
        ready.sort(key=lambda step: step.rank)
        rows = 0
        for index, step in enumerate(ready):
            rows += int(step.message.tensor.shape[0])
            if rows > MOST_ROWS and index:
                rest = ready[index:]
                del ready[index:]
                break
        else:
            rest = []
        self._fair.began(ready[-1].rank)
        return rest

    def _together(self, steps: list[Step]) -> Outcomes:
        outcomes: Outcomes = []
        good, hiddens, positions = [], [], []
        for step in steps:
            try:
                hidden, position = self._begin(step)
            except Exception as error:  # one session's bad input is its own
                outcomes.append((step, None, error))
                continue
            good.append(step)
            hiddens.append(hidden)
            positions.append(position)
        if not good:
            return outcomes
        rows = [Row(step.session.cache.kv, step.session.cache.batch, step.session.cache.mask_BS) for step in good]
        adapters = [step.session.adapter_id for step in good for _ in range(step.session.cache.batch)]
        view = good[0].session.view
        try:
            with torch.inference_mode(), view.bank.rows(adapters):
                hidden_N1D = torch.cat(hiddens)
                output = forward_rows(view.view, hidden_N1D, torch.cat(positions).to(hidden_N1D.device), rows)
        except Exception as error:
            return [*outcomes, *((step, None, error) for step in good)]
        start = 0
        for step, row in zip(good, rows, strict=True):
            step.session.cache.grew(1)
            try:
                outcomes.append((step, self._finish(step, [output[start : start + row.batch]]), None))
            except Exception as error:
                outcomes.append((step, None, error))
            start += row.batch
        return outcomes


def _deliver(outcomes: Outcomes) -> None:
    for step, result, error in outcomes:
        if step.done.done():
            continue
        if error is None:
            step.done.set_result(result)
        else:
            step.done.set_exception(error if isinstance(error, SwarmError) else as_out_of_memory(error) or error)
            step.done.exception()  # the caller may be gone
