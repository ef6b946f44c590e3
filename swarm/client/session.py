"""A session: token positions and KV cache on a chain of nodes, which it outlives.

When a node of the chain dies, hangs, sends nonsense or wants to leave, the session opens a chain
around it, the caches are rebuilt (`swarm.client.rebuild`), and the step that was under way is taken
again: whoever decodes sees a pause. What cannot be helped is raised as the first cause, with the
session's own state intact: the same call may be made again later.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import structlog
import torch

from swarm.client.history import Columns, History
from swarm.client.rebuild import Held, plan_fills, resume_at
from swarm.client.sampling import Sampler, Sampling
from swarm.errors import (
    BlocksMissing,
    Busy,
    ContextTooLong,
    InputError,
    ModelMismatch,
    OutOfMemory,
    PeerLost,
    Preempted,
    ProtocolError,
    SessionError,
    SwarmError,
    VersionError,
)
from swarm.net.chain import Chain, SessionTerms, StepExtras
from swarm.net.view import AdapterInfo, Hop
from swarm.wire.masks import pack_mask
from swarm.wire.v1 import chain_pb2 as pb

if TYPE_CHECKING:
    from swarm.client.swarm import SwarmClient

CHUNK_COLUMNS = 128
"""A prompt travels in pieces of so many columns: nodes work on them side by side, and decode between them."""
_SILENCE_S = 1.0
"""A step that takes longer makes the client ask whether its nodes are alive."""
_ANSWER_S = 2.5
_STUCK_S = 20.0
_LINK_S = 5.0
_GIVE_UP_S = 60.0
_MISSING_S = 12.0
_NEVER_THERE_S = 4.0
"""How long blocks may be missing: after a failure, and from the beginning. A node writes its record every 2 s."""
_AVOID_S = {PeerLost: 15.0, ProtocolError: 60.0, ModelMismatch: 300.0, VersionError: 300.0}
_AVOID_OTHER_S = 5.0
_RECOVERABLE = (
    PeerLost, ProtocolError, SessionError, Preempted, Busy, OutOfMemory, BlocksMissing, ModelMismatch, VersionError
)  # fmt: skip
T = TypeVar("T")
log = structlog.get_logger()


@dataclass(frozen=True)
class _Step:
    position: int
    columns: int
    rows: tuple[int, ...]
    last_only: bool


class Session:
    """Make with `SwarmClient.session`; always `close`. One call at a time."""

    def __init__(
        self,
        client: SwarmClient,
        *,
        adapter: AdapterInfo | None,
        via: Sequence[Hop],
        batch: int,
        expected_tokens: int,
        waiting: Callable[[int, str], None] | None,
    ) -> None:
        self._client = client
        self._adapter = adapter
        self._via = tuple(via)
        self._expected_tokens = expected_tokens
        self._waiting = waiting
        self._history = History()
        self._chain: Chain | None = None
        self._session_id = uuid.uuid4().hex
        self._fresh = True
        """Whether no node holds anything of the session under its present id."""
        self._lost: set[str] = set()
        self._hops: tuple[Hop, ...] = ()
        self.batch = batch
        self.rebuilt = 0
        """How often the chain was changed under way."""
        self.preempted = 0
        """How often of these because a node's memory went to older sessions."""

    @property
    def length(self) -> int:
        """Columns so far, the same for all rows."""
        return self._history.length

    @property
    def hops(self) -> Sequence[Hop]:
        return self._hops

    async def forward(
        self,
        ids_BT: torch.Tensor,
        *,
        mask_BT: torch.Tensor | None = None,
        positions_BT: torch.Tensor | None = None,
        rows: Sequence[int] | None = None,
        position: int | None = None,
        last_only: bool = False,
    ) -> torch.Tensor:
        """Append columns; hidden states [B, T, D] after the last block ([B, 1, D] with `last_only`).

        position: go back to so many columns first. rows: go on with these rows, in this order; then B
        is their number. mask_BT: 0 on padding. Raises ContextTooLong, BlocksMissing, Busy, PeerLost, ….
        """
        columns = Columns(ids_BT, None, _mask(mask_BT, ids_BT), positions_BT)
        return await self._append(columns, rows, position, last_only)

    async def forward_embeds(
        self,
        hidden_BTD: torch.Tensor,
        *,
        mask_BT: torch.Tensor | None = None,
        positions_BT: torch.Tensor | None = None,
        rows: Sequence[int] | None = None,
        position: int | None = None,
        last_only: bool = False,
    ) -> torch.Tensor:
        """As `forward`, from hidden states in the place of embedded tokens."""
        columns = Columns(None, hidden_BTD.detach(), _mask(mask_BT, hidden_BTD[:, :, 0]), positions_BT)
        return await self._append(columns, rows, position, last_only)

    async def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., D] to logits [..., V], together with other sessions of this process."""
        return await self._client.heads.logits(hidden, self._session_id)

    async def step(self, ids: Sequence[int]) -> torch.Tensor:
        """Append tokens to a session of one row; logits [V] after the last of them."""
        hidden = await self.forward(torch.tensor([list(ids)]), last_only=True)
        return (await self.logits(hidden))[0, 0]

    async def generate(
        self, prompt_ids: Sequence[int], max_new_tokens: int, sampling: Sampling, stop: frozenset[int] = frozenset()
    ) -> AsyncIterator[int]:
        """Yield new tokens one by one; the stop token itself is not yielded."""
        self.check_context(self.length + len(prompt_ids) + max_new_tokens)
        if not self.length:
            self._expected_tokens = self._expected_tokens or len(prompt_ids) + max_new_tokens
        sampler = Sampler(sampling)
        logits = await self.step(prompt_ids)
        for produced in range(1, max_new_tokens + 1):
            token = sampler.pick(logits)
            if token in stop:
                return
            yield token
            if produced < max_new_tokens:
                logits = await self.step([token])

    def check_context(self, columns: int) -> None:
        """Raises ContextTooLong if the model cannot hold so many tokens."""
        if columns > self._client.context_length:
            raise ContextTooLong(f"{columns} tokens are more than the model's context of {self._client.context_length}")

    async def close(self) -> None:
        """End the session; its nodes free their memory."""
        chain, self._chain = self._chain, None
        if chain is not None:
            await chain.close()

    # What a step goes through.

    async def _append(
        self, columns: Columns, rows: Sequence[int] | None, position: int | None, last_only: bool
    ) -> torch.Tensor:
        at = self.length if position is None else position
        if not 0 <= at <= self.length:
            raise InputError(f"the session has {self.length} columns, it cannot go on from {at}")
        if not columns.width:
            raise InputError("there are no tokens to append")
        batch = self.batch if rows is None else len(rows)
        if columns.mask_BT.shape[0] != batch:
            raise InputError(f"{columns.mask_BT.shape[0]} rows were given to a session of {batch}")
        self.check_context(at + columns.width)
        before, self._history = self._history, self._history.copy()
        moved: tuple[int, ...] = ()
        if rows is not None and list(rows) != list(range(self.batch)):
            moved = tuple(rows)
            self._history.select(rows)
        batch_before, self.batch = self.batch, batch
        self._history.truncate(at)
        self._history.append(columns)
        try:
            return await self._persist(_Step(at, columns.width, moved, last_only))
        except BaseException:
            # As if the call had not been made; what nodes computed of it is dropped by the next step.
            self._history, self.batch = before, batch_before
            self._lost.clear()  # who asks again later asks everybody again
            if moved:
                await self._forget_chain()
            raise

    async def _persist(self, step: _Step) -> torch.Tensor:
        """Take the step, on other nodes if need be."""
        started, missing_since, first_error = time.monotonic(), 0.0, None
        rows = step.rows
        while True:
            try:
                chain = self._chain
                if chain is not None and chain.failure is not None:
                    raise chain.failure  # seen since the last step
                if chain is None or chain.draining:
                    if rows:
                        # Nobody knows which of the old chain's hops have moved their rows already.
                        self._start_over()
                    chain, at = await self._new_chain(step)
                    rows = ()  # what was sent before is sent again in the new order
                else:
                    at = step.position
                return await self._watched(self._send(chain, step, at, rows), chain.hops, chain)
            except _RECOVERABLE as error:
                if self._hopeless(error):
                    raise
                first_error = first_error or error
                log.warning("session_interrupted", session=self._session_id[:8], error=str(error), blame=error.blame)
                await self._give_way(error, moved=bool(rows))
                now = time.monotonic()
                if isinstance(error, BlocksMissing):
                    if isinstance(first_error, (Busy, OutOfMemory)):
                        raise first_error from None  # the blocks are there, but not the room
                    missing_since = missing_since or now
                    patience_s = _NEVER_THERE_S if isinstance(first_error, BlocksMissing) else _MISSING_S
                    if now - missing_since > patience_s:
                        raise error from None
                    await self._client.refresh()
                    await asyncio.sleep(0.5)  # for nodes that are about to appear in the DHT
                elif now - started > _GIVE_UP_S:
                    raise first_error from None

    def _hopeless(self, error: SwarmError) -> bool:
        """Whether other nodes would answer the same: what the caller did is at fault."""
        if isinstance(error, (ProtocolError, ModelMismatch, VersionError, OutOfMemory)):
            return not error.blame
        return bool(self._via) and not isinstance(error, Preempted)

    async def _give_way(self, error: SwarmError, *, moved: bool) -> None:
        """Drop the chain, and the node at fault from the ways to go."""
        chain, self._chain = self._chain, None
        if chain is not None:
            self.rebuilt += 1
            self.preempted += isinstance(error, Preempted)
            await chain.close(keep=True)
        if moved or (isinstance(error, SessionError) and not isinstance(error, Preempted)):
            # Rows may have moved on some hops only; or a hop cannot go back, or knows nothing of us.
            self._start_over()
        if error.blame:
            self._lost.add(error.blame)
            # A node without room for this session may have room for the next one, and is no worse for it.
            if not isinstance(error, (Preempted, SessionError, Busy)):
                seconds = next((s for kind, s in _AVOID_S.items() if isinstance(error, kind)), _AVOID_OTHER_S)
                self._client.avoid.add(error.blame, error.cause, seconds)

    async def _forget_chain(self) -> None:
        """Nodes may hold rows in an order that is not ours: begin anew with the next step."""
        chain, self._chain = self._chain, None
        self._start_over()
        if chain is not None:
            await chain.close()

    def _start_over(self) -> None:
        self._session_id = uuid.uuid4().hex
        self._fresh = True

    async def _new_chain(self, step: _Step) -> tuple[Chain, int]:
        """A chain that holds everything before some column of the step, and that column."""
        old = self._chain
        leaving = set(old.draining) if old is not None else set()
        hops = await self._route(leaving)
        if old is not None:
            if leaving:
                self.rebuilt += 1
                log.info("leaving_nodes", session=self._session_id[:8], nodes=[peer[-6:] for peer in leaving])
            self._chain = None
            await old.close(keep=True)
        chain = await self._watched(self._open(hops), hops, None)
        self._chain, self._hops = chain, chain.hops
        self._lost.clear()
        held = [Held(state.held, state.logged_from) for state in chain.states]
        at = step.position
        if step.last_only:
            at = resume_at(held, step.position, step.position + step.columns - 1)
        for fill in plan_fills(held, at):
            if fill.from_client:
                for position, hidden, extras in self._chunks(fill.start, fill.end, fill.last + 1):
                    await chain.push(hidden, position, extras)
            else:
                await chain.refill(fill.first, fill.last, fill.start, fill.end)
        self._fresh = False
        return chain, at

    async def _route(self, leaving: set[str]) -> tuple[Hop, ...]:
        if self._via:
            return self._via
        return await self._client.find_hops(() if self._fresh else self._hops, self._lost | leaving)

    async def _open(self, hops: Sequence[Hop]) -> Chain:
        terms = SessionTerms(
            session_id=self._session_id,
            rows=self.batch,
            expected_tokens=max(self._expected_tokens, self.length),
            admission_s=self._client.admission_s,
            waiting=self._waiting,
        )
        return await self._client.open_chain(hops, pb.MODE_CACHED, self._adapter, terms)

    async def _send(self, chain: Chain, step: _Step, at: int, rows: tuple[int, ...]) -> torch.Tensor:
        end = step.position + step.columns
        outputs = []
        chunks = list(self._chunks(at, end, 0))
        tasks: list[asyncio.Task[tuple[int, torch.Tensor]]] = []
        try:
            for number, (position, hidden, extras) in enumerate(chunks):
                final = number == len(chunks) - 1
                tail = None if not step.last_only else 1 if final else 0
                extras = StepExtras(
                    rows=rows if not number else (), mask=extras.mask, position_ids=extras.position_ids, tail=tail
                )
                if tail == 0:
                    await chain.push(hidden, position, extras)
                else:
                    tasks.append(asyncio.create_task(chain.forward(hidden, position, extras)))
                    await asyncio.sleep(0)  # frames leave in order
            for task in tasks:
                outputs.append((await task)[1])
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        expected = (self.batch, 1 if step.last_only else step.columns, self._client.head.width)
        if tuple(output.shape) != expected:
            raise ProtocolError(
                f"hidden states of shape {list(output.shape)} came back, {list(expected)} were expected"
            ).blaming(chain.hops[-1].peer_id)
        return output

    def _chunks(self, start: int, end: int, refill: int) -> list[tuple[int, torch.Tensor, StepExtras]]:
        """(position, hidden states, extras) that together are columns [start, end)."""
        found, at = [], start
        for piece in self._history.slice(start, end):
            for low in range(0, piece.width, CHUNK_COLUMNS):
                part = piece.cut(low, min(low + CHUNK_COLUMNS, piece.width))
                positions = part.positions_BT
                if part.hidden_BTD is not None:
                    hidden = part.hidden_BTD
                else:
                    assert part.ids_BT is not None
                    counted = positions if positions is not None else self._history.counted(at, at + part.width)
                    # Inference mode belongs to the thread: held over an await it would leak into other tasks.
                    with torch.inference_mode():
                        hidden = self._client.embed(part.ids_BT, counted)
                extras = StepExtras(
                    mask=pack_mask(part.mask_BT),
                    position_ids=() if positions is None else tuple(int(p) for p in positions.flatten()),
                    tail=0 if refill else None,
                    refill=refill,
                )
                found.append((at, hidden, extras))
                at += part.width
        return found

    async def _watched(self, work: Coroutine[Any, Any, T], hops: Sequence[Hop], chain: Chain | None) -> T:
        """The result of `work`, unless one of the nodes it waits for is found dead. Raises PeerLost."""
        task = asyncio.create_task(work)
        watch = _Watch(hops)
        try:
            while True:
                done, _ = await asyncio.wait({task}, timeout=_SILENCE_S)
                if done:
                    return task.result()
                answers = await self._client.health.ask_all(hops, self._session_id, _ANSWER_S)
                if not task.done():
                    watch.check(answers, time.monotonic(), opened=chain is not None)
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)


class _Watch:
    """What repeated answers of a chain's nodes say about them."""

    def __init__(self, hops: Sequence[Hop]) -> None:
        self._hops = hops
        self._progress: dict[int, tuple[int, float]] = {}
        self._behind: dict[int, tuple[int, float]] = {}

    def check(self, answers: Sequence[pb.HealthReply | None], now: float, *, opened: bool) -> None:
        """Raises PeerLost, naming a node that is silent, stuck, or cut off from the one before it."""
        for hop, answer in zip(self._hops, answers, strict=True):
            if answer is None:
                raise PeerLost(f"node {hop.peer_id} (blocks {hop.span}) does not answer").blaming(hop.peer_id)
        for index, (hop, answer) in enumerate(zip(self._hops, answers, strict=True)):
            assert answer is not None
            completed, since = self._progress.get(index, (-1, now))
            if not answer.waiting or completed != answer.completed:
                self._progress[index] = (answer.completed, now)
            elif now - since > _STUCK_S:
                raise PeerLost(f"node {hop.peer_id} (blocks {hop.span}) gets nothing done").blaming(hop.peer_id)
            before = answers[index - 1] if index else None
            if not opened or before is None or not before.known or before.sent <= answer.received:
                self._behind.pop(index, None)
                continue
            received, since = self._behind.setdefault(index, (answer.received, now))
            if received != answer.received:
                self._behind[index] = (answer.received, now)
            elif now - since > _LINK_S:
                raise PeerLost(f"nothing reaches node {hop.peer_id} from the node before it").blaming(hop.peer_id)


def _mask(mask_BT: torch.Tensor | None, like_BT: torch.Tensor) -> torch.Tensor:
    return torch.ones(like_BT.shape[:2], dtype=torch.bool) if mask_BT is None else mask_BT.bool().cpu()
