"""The durable side of one job: each step of its state machine becomes one transaction.

In: the records of a step, with the contribution or the outcome that caused them. Out: the new
book of leases, once everything is on disk. Receipts are signed and leases end here, in the same
transaction as the record they follow from, so that nothing can be known to a node that a restart
would not know. Every method blocks; a StorageError means nothing was stored, or, if the disk
failed in the middle of a commit, that only reading it again can tell.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

from coordinator import joblog, leases
from coordinator.changes import rules_of
from coordinator.leases import Book
from coordinator.ports import Clock, CoordinatorSettings, Signer
from coordinator.receipts import signed_receipt
from coordinator.records import ContributionRecord, JobRecord, LogEntry, LogLine, Outcome
from coordinator.round_model import (
    ContributionHeld,
    JobChanged,
    JobState,
    Phase,
    PipelineLost,
    PipelinesFormed,
    Record,
    Rewound,
    RoundAggregated,
    RoundCommitted,
    RoundFrozen,
    RoundOpened,
    RoundReopened,
    RoundScored,
    RoundsState,
    Rules,
    ScoringBegun,
    Settings,
    SettingsAdopted,
    SettingsStored,
    Standing,
    WrapUp,
)
from coordinator.storage import Storage
from swarm.config import Schedule, job_from_json
from swarm.wire.v1 import coordinator_pb2 as pb

_LATE = "not whole when round {} froze"
_LOG_DOMAIN = b"swarm-round-log-v1"


@dataclass(frozen=True)
class Stored:
    """A job as the disk has it; `spec_json` are the settings in force."""

    spec_json: str
    state: RoundsState
    book: Book


class JobLedger:
    """Rows, receipts and leases of one job."""

    def __init__(
        self,
        storage: Storage,
        job_id: str,
        schedule: Schedule,
        signer: Signer,
        clock: Clock,
        settings: CoordinatorSettings,
    ) -> None:
        self._storage = storage
        self._step_positions = schedule.samples_per_step
        self._lease_positions = schedule.inner_steps * schedule.samples_per_step
        self._job_id = job_id
        self._signer = signer
        self._clock = clock
        self._settings = settings

    def create(self, job: JobRecord, state: RoundsState, outcome: Outcome) -> None:
        """A new job: its row, round 0 with the initial outcome, and round 1."""
        now = self._clock.unix()
        with self._storage.transaction("job"):
            self._storage.insert_job(job, state.job, state.reason)
            self._storage.insert_round(self._job_id, 0, Phase.COMMITTED, now)
            self._storage.outcomes.insert(self._job_id, 0, outcome)
            self._storage.insert_round(self._job_id, state.round, state.phase, now)
            self._storage.append_log(self._job_id, joblog.submitted(job.submitter), now, self._settings.kept_events)

    def load(self) -> Stored:
        spec_json, next_spec_json = self._storage.specs(self._job_id)
        state = self._storage.rounds_state(self._job_id, self._rules(spec_json))
        if next_spec_json is not None:
            state = replace(state, next=Settings(self._rules(next_spec_json), next_spec_json))
        return Stored(spec_json, state, leases.restore(self._storage.leases(self._job_id)))

    def _rules(self, spec_json: str) -> Rules:
        return rules_of(job_from_json(spec_json), self._settings.fruitless_generations)

    def store(
        self,
        book: Book,
        records: Iterable[Record],
        submission: ContributionRecord | None = None,
        outcome: Outcome | None = None,
    ) -> Book:
        """Make one step durable. `submission` belongs to ContributionHeld, `outcome` to RoundAggregated."""
        steps = list(records)
        with self._storage.transaction(" + ".join(type(record).__name__ for record in steps)):
            for record in steps:
                book = self._store_one(book, record, submission, outcome)
            self._log(steps, submission)
        return book

    def log_refused(self, line: LogLine) -> None:
        """A contribution that was refused changes nothing; that it was is told to people."""
        with self._storage.transaction("refused"):
            self._storage.append_log(self._job_id, [line], self._clock.unix(), self._settings.kept_events)

    def _log(self, steps: list[Record], submission: ContributionRecord | None) -> None:
        number = self._storage.newest_round(self._job_id)
        committed = any(isinstance(record, RoundCommitted) for record in steps)
        summary = self._storage.history(self._job_id, 1, since=number)[0] if committed else None
        lines = [line for record in steps for line in joblog.lines(record, number, submission, summary)]
        self._storage.append_log(self._job_id, lines, self._clock.unix(), self._settings.kept_events)

    def receipt(self, round: int, peer: str, verdict: pb.Verdict.ValueType, reason: str, payload: bytes) -> bytes:
        return signed_receipt(
            self._signer,
            job_id=self._job_id,
            round=round,
            peer=peer,
            verdict=verdict,
            reason=reason,
            payload=payload,
        )

    def _store_one(
        self, book: Book, record: Record, submission: ContributionRecord | None, outcome: Outcome | None
    ) -> Book:
        job_id, storage = self._job_id, self._storage
        match record:
            case RoundOpened(round, generation):
                storage.insert_round(job_id, round, Phase.OPEN, self._clock.unix(), generation)
            case PipelinesFormed(round, generation, pipelines):
                storage.insert_pipelines(job_id, round, generation, pipelines)
                book = self._lease(book, record)
            case ContributionHeld(round, pipeline_id, _, whole, took_s):
                assert submission is not None, "a held contribution comes with its row"
                storage.insert_contribution(job_id, submission)
                if whole:
                    storage.set_whole(job_id, round, pipeline_id, took_s)
            case WrapUp(round):
                storage.set_wrap_up(job_id, round)
            case PipelineLost(round, pipeline_id, reason):
                storage.set_standing(job_id, round, pipeline_id, Standing.LOST, reason)
                book = self._exclude(book, round, pipeline_id, f"the pipeline was given up: {reason}")
            case RoundFrozen(round, _, late):
                storage.set_phase(job_id, round, Phase.FROZEN)
                reason = _LATE.format(round)
                for pipeline_id in late:
                    storage.set_standing(job_id, round, pipeline_id, Standing.LATE, reason)
                    book = self._exclude(book, round, pipeline_id, f"the pipeline was {reason}")
            case RoundReopened(round, late):
                storage.set_phase(job_id, round, Phase.OPEN)
                for pipeline_id in late:
                    # Its receipts and its lease ended when the round froze.
                    storage.set_standing(job_id, round, pipeline_id, Standing.LOST, _LATE.format(round))
            case RoundAggregated(round):
                assert outcome is not None, "an aggregated round comes with its outcome"
                storage.outcomes.insert(job_id, round, outcome)
                storage.set_phase(job_id, round, Phase.AGGREGATED)
            case RoundCommitted(round, accepted):
                book = self._commit(book, round, accepted)
            case JobChanged(state, reason, fruitless, order):
                storage.set_job(job_id, state, reason, fruitless, order)
                if state is not JobState.RUNNING:
                    book = self._void_ahead(book)
            case SettingsStored(spec_json):
                storage.set_next_spec(job_id, spec_json)
            case SettingsAdopted(spec_json):
                storage.set_spec(job_id, spec_json)
            case ScoringBegun(round, pipeline_id):
                storage.set_scorer(job_id, round, pipeline_id)
            case RoundScored(round, loss, tokens, best):
                storage.set_score(job_id, round, loss, tokens)
                storage.set_best(job_id, best)
            case Rewound(round, lineage, _, best):
                storage.discard_after(job_id, round, lineage)
                storage.set_best(job_id, best)
                book = leases.restore(storage.leases(job_id))
        return book

    def _lease(self, book: Book, formed: PipelinesFormed) -> Book:
        """Leased with the forming, not when a lead asks: the order of calls decides nothing."""
        ids = [pipeline.pipeline_id for pipeline in formed.pipelines]
        book, changed, new = leases.form(book, formed.round, ids, self._lease_positions, formed.continued, formed.ahead)
        for lease in changed:
            self._storage.set_lease(self._job_id, lease)
        for lease in new:
            self._storage.insert_lease(self._job_id, lease)
        return book

    def _void_ahead(self, book: Book, before: int | None = None) -> Book:
        book, ended = leases.void_ahead(book, before)
        for lease in ended:
            self._storage.set_lease(self._job_id, lease)
        return book

    def _exclude(self, book: Book, round: int, pipeline_id: int, reason: str) -> Book:
        """What the pipeline sent does not count, and its samples are free again."""
        self._give_verdict(round, (pipeline_id,), pb.VERDICT_LATE, reason)
        for ahead in (False, True):
            book, lease = leases.void(book, round, pipeline_id, ahead)
            if lease is not None:
                self._storage.set_lease(self._job_id, lease)
        return book

    def _commit(self, book: Book, round: int, accepted: tuple[int, ...]) -> Book:
        sent = self._give_verdict(round, accepted, pb.VERDICT_ACCEPTED, "")
        for pipeline_id in accepted:
            steps = min(contribution.inner_steps for contribution in sent if contribution.pipeline_id == pipeline_id)
            book, lease = leases.close(book, round, pipeline_id, steps * self._step_positions)
            if lease is not None:
                self._storage.set_lease(self._job_id, lease)
        outcome = self._storage.outcomes.of(self._job_id, round)
        previous = self._storage.log_entry(self._job_id, round - 1)
        link = previous.entry_hash if previous else b""
        entry = log_entry_hash(link, self._job_id, round, sent, outcome.params_hash)
        signature = self._signer.sign(_LOG_DOMAIN + entry)
        self._storage.commit_round(self._job_id, LogEntry(round, entry, signature), self._clock.unix())
        return book

    def _give_verdict(
        self, round: int, pipeline_ids: tuple[int, ...], verdict: pb.Verdict.ValueType, reason: str
    ) -> list[ContributionRecord]:
        given = [c for c in self._storage.contributions(self._job_id, round) if c.pipeline_id in pipeline_ids]
        for old in given:
            new = replace(
                old,
                verdict=int(verdict),
                reason=reason,
                receipt=self.receipt(round, old.peer, verdict, reason, old.payload),
            )
            self._storage.set_verdict(self._job_id, new, counts=verdict == pb.VERDICT_ACCEPTED)
        return given


def log_entry_hash(
    previous: bytes, job_id: str, round: int, accepted: Iterable[ContributionRecord], params_hash: bytes
) -> bytes:
    """One link of a job's chain: which payload of whom made which parameters, after which link."""
    parts = [previous.hex(), job_id, str(round), params_hash.hex()]
    parts += sorted(f"{contribution.peer}={contribution.payload.hex()}" for contribution in accepted)
    return hashlib.sha256("\x1f".join(parts).encode()).digest()
