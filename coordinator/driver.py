"""Drives one job: performs what its state machine decides, durable first.

In: events from calls, nodes, timers and its own work. Every event goes through one lock: the
state machine decides, the ledger makes the records durable in one transaction, only then is the
new state visible and are actions taken. A call that is cancelled does not cancel its event. A
step that fails on disk is tried again and `reason` says so; after a failed write the database is
read again before anything else, so that memory never runs ahead of it or behind.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Protocol

import structlog

from coordinator import joblog
from coordinator.background import Background
from coordinator.leases import Book, Lease
from coordinator.ledger import JobLedger
from coordinator.placement import Member, PipelinePlan, Placement
from coordinator.records import ContributionRecord, JobRecord, Outcome
from coordinator.results import JobResults, PayloadsDamaged
from coordinator.round_events import (
    Abandoned,
    AggregateDone,
    CommitNow,
    Contribution,
    Event,
    NextRound,
    NodeLost,
    Offer,
    Scored,
    Tick,
    Unusable,
)
from coordinator.round_model import (
    COUNTING,
    Aggregate,
    Answer,
    Commit,
    Effect,
    FormPipelines,
    JobState,
    OpenNext,
    Phase,
    Pipeline,
    Record,
    Reply,
    Rewound,
    RoundsState,
    SettingsAdopted,
    Standing,
)
from coordinator.rounds import advance, broken_by, may_repair, recover, refusal
from coordinator.shared import Shared
from coordinator.signal import Signal
from swarm.compress import compile_ahead
from swarm.config import JobSpec, job_from_json
from swarm.errors import (
    BlobStoreAway,
    ContributionError,
    CoordinatorLost,
    DiskFull,
    JobConflict,
    StorageError,
    SyncFailed,
)
from swarm.wire.v1 import coordinator_pb2 as pb

log = structlog.get_logger()

_VERDICTS = {
    Answer.LATE: pb.VERDICT_LATE,
    Answer.REJECTED: pb.VERDICT_REJECTED,
    Answer.CONFLICT: pb.VERDICT_REJECTED,
}


class Neighbours(Protocol):
    """The other jobs, as a driver sees them."""

    def place(self, job_id: str, without: frozenset[str] = frozenset()) -> Placement: ...

    def nodes_freed(self, job_id: str) -> None: ...

    def doubt(self, peer: str) -> None: ...

    def absent(self, members: Iterable[Member]) -> frozenset[str]: ...


class JobDriver:
    """One job. Create with the state read from the ledger, then `start`."""

    def __init__(
        self,
        job: JobRecord,
        spec: JobSpec,
        results: JobResults,
        ledger: JobLedger,
        state: RoundsState,
        book: Book,
        published: dict[int, Outcome],
        shared: Shared,
        neighbours: Neighbours,
    ) -> None:
        self.job = job
        self.spec = spec
        self.results = results
        self.ledger = ledger
        self.changed = Signal()
        self.published = published
        """Outcomes of the newest committed rounds, by round."""
        self.spare: dict[str, str] = {}
        """Why the last placement had no use for a node."""
        self._state = state
        self._book = book
        self._shared = shared
        self._neighbours = neighbours
        self._polled: object = None
        """What polls said of the job when they were last woken for it."""
        self._told: set[tuple[int, int, str, Answer]] = set()
        """Refusals of the open round's members that are in the log."""
        self._lock = asyncio.Lock()
        self._background = Background(shared.clock, shared.settings.retry_s, self._notify, shared.collector.collect)
        self._forming = False
        self._doubtful = False

    # --- what others see ----------------------------------------------------------------------

    @property
    def state(self) -> RoundsState:
        """The newest durable state."""
        return self._state

    @property
    def reason(self) -> str:
        """Why the job waits, is paused, has ended early or has trouble; empty if all goes well."""
        said = self._background.trouble or self._state.reason
        best = self._best_round
        if best is None or best in self.published:
            return said
        gone = f"the files of round {best}, the best, are gone: its adapter is that of round {self.committed_round}"
        return f"{said}; {gone}" if said else gone

    @property
    def committed_round(self) -> int:
        return self._state.committed

    @property
    def kept_rounds(self) -> list[int]:
        """Committed rounds whose results are still here."""
        return sorted(round for round in self.published if round <= self.committed_round)

    def assignment_of(self, peer: str) -> Pipeline | None:
        """The pipeline that a node belongs to in the current round."""
        return self._state.part_of.get(peer) if self._state.job is JobState.RUNNING else None

    # --- life ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Go on where the stored state stopped."""
        if self._state.job is not JobState.FINISHED:
            ahead = partial(asyncio.to_thread, compile_ahead, self.spec.uplink, self.spec.downlink)
            self._background.insist("compiling the codec", ahead)
        self._resume_from(self._state)
        # A node is forgotten in one commit and its pipeline given up in another; a kill in between leaves the pipeline.
        for peer in sorted(self._absent()):
            self.node_lost(peer, f"node {peer} had left when the coordinator was started again")

    async def stop(self) -> None:
        """Finish the step under way, take no other."""
        await self._background.stop()

    # --- events from outside ------------------------------------------------------------------

    async def contribute(self, event: Contribution, submission: ContributionRecord | None) -> bytes:
        """The signed receipt. `submission` is stored if the event is; None where it is known not to be."""
        return await self._background.uncancelled(self._contribute(event, submission))

    def lease(self, caller: str, round: int, generation: int, pipeline_id: int) -> tuple[Lease, Lease | None]:
        """The pipeline's lease, and what it holds ahead.

        Raises ContributionError: the caller does not lead one that trains in this round.
        """
        state = self._state
        pipeline = state.pipeline(pipeline_id) if round == state.round else None
        if pipeline is None or pipeline.generation != generation:
            raise ContributionError(f"pipeline {pipeline_id}, generation {generation}, is not of round {round}")
        if pipeline.members[0].peer != caller:
            raise ContributionError("only the lead of a pipeline leases samples")
        lease = self._book.find(round, pipeline_id)
        if lease is None:
            raise ContributionError(
                f"pipeline {pipeline_id} does not train in round {round}: {pipeline.reason or state.phase}"
            )
        return lease, self._book.find(round, pipeline_id, ahead=True)

    async def abandon(
        self, caller: str, round: int, generation: int, pipeline_id: int, why: str, blamed: str = ""
    ) -> None:
        """A member gives its pipeline up because of `blamed`. Without effect on one that is whole or gone, and
        where the member has nothing more to do for it: its contribution is held and nobody else is blamed."""
        pipeline = self._state.pipeline(pipeline_id) if round == self._state.round else None
        if pipeline is None or pipeline.generation != generation:
            return
        if not pipeline.has(caller):
            raise ContributionError(f"the node is not in pipeline {pipeline_id}")
        by = caller if blamed in ("", caller) else ""
        await self._background.uncancelled(self._give_up(round, pipeline_id, why, blamed, by))

    async def _give_up(self, round: int, pipeline_id: int, why: str, blamed: str, by: str) -> None:
        async with self._shared.placement_lock:
            # Who is at fault must be known: else the same nodes would be tried again.
            named = next((p for p in self._state.pipelines if p.pipeline_id == pipeline_id and p.has(blamed)), None)
            if named is not None:
                # Or it would be tried again at once, and a node that comes back in seconds would find a paused job.
                self._neighbours.doubt(blamed)
            spares = self._spares([pipeline_id], blamed) if named is not None else ()
            await self._apply(Abandoned(self._now(), round, pipeline_id, why, spares, by, self._absent()))

    async def decide(self, event: Event) -> None:
        """One step, whether or not who asked for it waits for its end."""
        await self._background.uncancelled(self._apply(event))

    async def report_score(
        self, caller: str, round: int, generation: int, pipeline_id: int, loss: float, tokens: int
    ) -> None:
        """The held-out loss of a committed round. A late one changes nothing. Raises ContributionError: not asked."""
        state = self._state
        pipeline = state.pipeline(pipeline_id) if round == state.round else None
        if pipeline is None or pipeline.generation != generation or pipeline.members[0].peer != caller:
            raise ContributionError(f"the node does not lead pipeline {pipeline_id} of round {round}")
        if not (math.isfinite(loss) and loss >= 0 and tokens > 0):
            raise ContributionError(f"a held-out loss of {loss} over {tokens} tokens", "look at the node's log")
        if state.scorer == pipeline_id:
            await self.decide(Scored(round, loss, tokens))

    @property
    def adapter_round(self) -> int:
        """Whose adapter the job is known by: with early stopping the best round's while it is here, else the newest."""
        best = self._best_round
        return best if best is not None and best in self.published else self.committed_round

    @property
    def _best_round(self) -> int | None:
        """The round that early stopping goes by; its files may be gone after a rewind by an earlier release."""
        best = self._state.best
        return best.round if self.spec.early_stopping is not None and best is not None else None

    def outcome_of(self, round: int) -> Outcome:
        """What is kept of a committed round. Raises JobConflict."""
        if round not in self.kept_rounds:
            kept = ", ".join(str(number) for number in self.kept_rounds)
            raise JobConflict(f"round {round} of job {self.job.name} is not kept", f"these rounds are: {kept}")
        return self.published[round]

    def node_lost(self, peer: str, reason: str) -> None:
        async def record() -> None:
            async with self._shared.placement_lock:
                spares = self._spares(broken_by(self._state, peer), peer)
                await self._apply(NodeLost(self._now(), peer, reason, spares, self._absent()))

        if self._state.job is not JobState.FINISHED:
            self._background.insist("recording a lost node", record)

    def _absent(self) -> frozenset[str]:
        """Members of the round's pipelines that have left."""
        counting = self._state.with_standing(*COUNTING)
        return self._neighbours.absent(member for pipeline in counting for member in pipeline.members)

    def _spares(self, pipeline_ids: list[int], lost: str) -> tuple[PipelinePlan, ...]:
        """Pipelines of the other nodes of those given and of idle ones."""
        state = self._state
        if not pipeline_ids or not may_repair(state, self._now()):
            return ()
        remain = [p for p in state.with_standing(*COUNTING) if p.pipeline_id not in pipeline_ids]
        taken = {member.peer for pipeline in remain for member in pipeline.members}
        return self._neighbours.place(self.job.job_id, frozenset({lost, *taken})).pipelines

    def nodes_changed(self) -> None:
        """Idle nodes may be there: a waiting job looks again."""
        waits = self._state.job is JobState.WAITING and self._state.phase is Phase.OPEN
        if waits and not self._forming:
            self._forming = True
            self._background.insist("forming pipelines", self._form)

    # --- the one step -------------------------------------------------------------------------

    async def _apply(
        self, event: Event, submission: ContributionRecord | None = None, outcome: Outcome | None = None
    ) -> Reply | None:
        async with self._lock:
            await self._be_certain()
            state, effects = advance(self._state, event)
            records = [effect for effect in effects if isinstance(effect, Record)]
            if records:
                try:
                    self._book = await asyncio.to_thread(self.ledger.store, self._book, records, submission, outcome)
                except StorageError:
                    self._doubtful = True
                    raise
                steps = [type(record).__name__ for record in records]
                log.info("job_step", job=self.job.name, round=state.round, phase=state.phase, steps=steps)
            self._publish(state, effects)
            return next((effect for effect in effects if isinstance(effect, Reply)), None)

    async def caught_up(self) -> None:
        """Return once the visible state is as new as what anyone can have read from the database before."""
        async with self._lock:
            await self._be_certain()

    async def _be_certain(self) -> None:
        """After a failed write, learn from the database whether it happened."""
        if self._background.stopping:
            raise CoordinatorLost("the coordinator is stopping", "try again when it is back")
        if not self._doubtful:
            return
        stored = await asyncio.to_thread(self.ledger.load)
        self._book = stored.book
        self._doubtful = False
        if stored.state != self._state.stored():
            self._take_settings(stored.spec_json)
            self._resume_from(stored.state)

    def _resume_from(self, stored: RoundsState) -> None:
        state, effects = recover(stored, self._now())
        self._publish(state, effects)

    def _publish(self, state: RoundsState, effects: tuple[Effect, ...]) -> None:
        """Make a durable state the visible one, then act on it."""
        freed = self._state.busy_peers() - state.busy_peers()
        ended = state.job is JobState.FINISHED and self._state.job is not JobState.FINISHED
        if state.round != self._state.round:
            self._told.clear()
        self._state = state
        self._background.set_alarm(state.alarm_s, self._at_deadline)
        for effect in effects:
            match effect:
                case FormPipelines():
                    self.nodes_changed()
                case Aggregate(round):
                    self._background.insist("aggregating", partial(self._aggregate, round))
                case Commit(round):
                    self._background.insist("committing", partial(self._commit, round))
                case OpenNext():
                    self._background.insist("opening the next round", self._open_next)
                case SettingsAdopted(spec_json):
                    self._take_settings(spec_json)
                case Rewound(round):
                    for discarded in [number for number in self.published if number > round]:
                        del self.published[discarded]
                case _:
                    pass
        self._forget_old()
        self._notify()
        if freed:
            self._neighbours.nodes_freed(self.job.job_id)
        if ended:
            # Of what only a job under way needs, such as its data set.
            self._background.insist("making room", self._shared.collector.collect)

    def _take_settings(self, spec_json: str) -> None:
        self.job = replace(self.job, spec_json=spec_json)
        self.spec = job_from_json(spec_json)

    def _notify(self) -> None:
        self.changed.notify()
        said = self._said_by_polls()
        if said != self._polled:
            # Most steps change nothing in a poll, such as a held contribution: every node would be woken for each.
            self._polled = said
            self._shared.assignments.notify()

    def _said_by_polls(self) -> object:
        """All that `views.assignment`, `views.idle_reason` and `views.finished_adapter` take from a job and that
        changes. A pipeline's members are fixed by its id within a round and lineage."""
        state = self._state
        counting = tuple(pipeline.pipeline_id for pipeline in state.with_standing(*COUNTING))
        finished_round = self.adapter_round if state.job is JobState.FINISHED else None
        return (
            *(state.job, state.round, state.lineage, counting, state.wrapping, state.scorer),
            *(self.reason, self.job.spec_json, self.spare, finished_round),
        )

    def _now(self) -> float:
        return self._shared.clock.monotonic()

    # --- actions ------------------------------------------------------------------------------

    def _at_deadline(self) -> None:
        # The timer may ring a moment early by the clock; it rang for this deadline all the same.
        at_s = max(self._now(), self._state.alarm_s or 0.0)
        self._background.insist("closing the round", lambda: self._apply(Tick(at_s, self._absent())))

    async def _form(self) -> None:
        async with self._shared.placement_lock:
            self._forming = False
            placement = self._place()
            await self._apply(Offer(self._now(), placement.pipelines, placement.missing))

    async def _open_next(self) -> None:
        async with self._shared.placement_lock:
            placement = self._place()
            await self._apply(NextRound(self._now(), placement.pipelines, placement.missing))

    def _place(self) -> Placement:
        placement = self._neighbours.place(self.job.job_id)
        self.spare = dict(placement.unused)
        return placement

    async def _aggregate(self, round: int) -> None:
        try:
            outcome = await asyncio.to_thread(self.results.aggregate, self._shared.storage, round)
        except PayloadsDamaged as damaged:
            log.error("contributions_damaged", job=self.job.name, round=round, error=str(damaged))
            await self._apply(Unusable(round, damaged.pipelines))
        except (BlobStoreAway, DiskFull, SyncFailed):
            raise  # nothing is lost: it is waited out, by an owner's order, too
        except Exception as error:  # whatever it is: an order does not wait for what may never succeed
            if self._state.order is None:
                raise
            log.error("round_given_up", job=self.job.name, round=round, error=str(error))
            whole = self._state.with_standing(Standing.WHOLE)
            why = f"{self._state.order.reason} while the round could not be aggregated: {error}"
            await self._apply(Unusable(round, tuple((pipeline.pipeline_id, why) for pipeline in whole)))
        else:
            await self._apply(AggregateDone(round), outcome=outcome)

    async def _commit(self, round: int) -> None:
        outcome = await asyncio.to_thread(self._shared.storage.outcomes.of, self.job.job_id, round)
        # Known before it counts: whoever sees the committed round finds its update.
        self.published[round] = outcome
        await self._apply(CommitNow(round, self._now(), self._absent()))

    def _forget_old(self) -> None:
        """What no row refers to any more: a round that is out of date, or was the best one until now."""
        best = self._state.best
        old = [kept for kept in self.published if kept <= self.committed_round - self._shared.settings.kept_rounds]
        for number in old:
            if best is None or number != best.round:
                del self.published[number]

    async def _contribute(self, event: Contribution, submission: ContributionRecord | None) -> bytes:
        if submission is None:
            # Refused before its payload was read; if it would not be by now, the sender asks again.
            reply = refusal(self._state, event) or Reply(Answer.REJECTED, "the round has just changed")
        else:
            applied = await self._apply(event, submission)
            assert applied is not None, "a contribution is always answered"
            reply = applied
        if reply.answer is Answer.HELD and submission is not None:
            return submission.receipt
        if reply.answer is Answer.DUPLICATE or event.round < self._state.round:
            # Looked up last: the round may have closed since anybody looked at the state.
            stored = await self.stored_receipt(event.round, event.peer, event.payload)
            if stored is not None:
                return stored
        self._tell(event, reply)
        if reply.answer is Answer.CONFLICT:
            log.warning("contribution_conflict", job=self.job.name, round=event.round, peer=event.peer)
        return self.ledger.receipt(event.round, event.peer, _VERDICTS[reply.answer], reply.reason, event.payload)

    def _tell(self, event: Contribution, reply: Reply) -> None:
        """Put a refusal into the job's log: one of each kind for each member of a pipeline, so that it is bounded."""
        pipeline = self._state.pipeline(event.pipeline_id) if event.round == self._state.round else None
        key = (event.round, event.pipeline_id, event.peer, reply.answer)
        if pipeline is None or not pipeline.has(event.peer) or key in self._told:
            return
        self._told.add(key)
        line = joblog.refused(event.round, event.peer, event.pipeline_id, reply.answer, reply.reason)

        async def store() -> None:
            async with self._lock:
                await asyncio.to_thread(self.ledger.log_refused, line)
            self.changed.notify()

        self._background.insist("writing the job's log", store)

    async def stored_receipt(self, round: int, peer: str, payload: bytes | None = None) -> bytes | None:
        """The newest receipt of a node in a round, or that of one payload."""
        storage = self._shared.storage
        stored = await asyncio.to_thread(storage.contributions_by, self.job.job_id, round, peer)
        return next((c.receipt for c in stored if payload in (None, c.payload)), None)

    def lease_id(self, round: int, pipeline_id: int) -> int | None:
        """Id of a pipeline's open lease."""
        lease = self._book.find(round, pipeline_id)
        return None if lease is None else lease.lease_id
