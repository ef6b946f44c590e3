"""Typed access to the coordinator's database: with `coordinator.outcomes` the only module with SQL on its tables.

Reads return frozen values; writes happen inside `with storage.transaction(name)` and become
durable together. Nothing is decided here. Raises StorageError. Every method blocks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from coordinator.database import Database
from coordinator.deadline import RECENT
from coordinator.disk import Halt
from coordinator.leases import Lease, LeaseState, Range
from coordinator.outcomes import Outcomes
from coordinator.placement import Member
from coordinator.records import (
    ContributionRecord,
    JobRecord,
    JobTotals,
    LogEntry,
    LogLine,
    NodeRecord,
    RoundSummary,
)
from coordinator.round_model import (
    Best,
    Held,
    JobState,
    Order,
    OrderKind,
    Phase,
    Pipeline,
    RoundsState,
    Rules,
    Standing,
)
from swarm.ids import Span

_CONTRIBUTION = (
    "round, generation, pipeline_id, peer, lead, payload, payload_size, inner_steps, tokens, loss,"
    " verdict, reason, receipt, label_tokens, skipped_steps"
)


class Storage:
    """Nodes, jobs, rounds, leases and results in `data_dir`. Raises DataDirLocked, StorageError."""

    def __init__(self, data_dir: Path, durable_point: Callable[[str], None], halt: Halt | None = None) -> None:
        self._db = Database(data_dir, durable_point, halt or Halt())
        self.outcomes = Outcomes(self._db)

    def close(self) -> None:
        self._db.close()

    def transaction(self, name: str) -> AbstractContextManager[None]:
        return self._db.transaction(name)

    # --- nodes --------------------------------------------------------------------------------

    def nodes(self) -> list[NodeRecord]:
        return [
            NodeRecord(peer, Span(start, end), tuple(json.loads(addrs)), device, dtype, token_block_s)
            for peer, start, end, addrs, device, dtype, token_block_s in self._read(
                "SELECT peer, span_start, span_end, addrs_json, device, dtype, token_block_s FROM node ORDER BY peer"
            )
        ]

    def put_node(self, node: NodeRecord) -> None:
        self._db.write(
            "INSERT OR REPLACE INTO node VALUES (?, ?, ?, ?, ?, ?, ?)",
            *(node.peer, node.span.start, node.span.end, json.dumps(node.addrs), node.device, node.dtype),
            node.token_block_s,
        )

    def delete_node(self, peer: str) -> None:
        self._db.write("DELETE FROM node WHERE peer = ?", peer)

    # --- jobs ---------------------------------------------------------------------------------

    def jobs(self) -> list[JobRecord]:
        """All jobs in the order they were submitted."""
        return [
            JobRecord(*row)
            for row in self._read(
                "SELECT job_id, name, spec_json, submitter, model_hash, dataset, dataset_size, samples,"
                " trainable_parameters, heldout, heldout_size, heldout_samples FROM job ORDER BY ordinal"
            )
        ]

    def insert_job(self, job: JobRecord, state: JobState, reason: str) -> None:
        self._db.write(
            "INSERT INTO job (job_id, ordinal, name, spec_json, submitter, model_hash, dataset,"
            " dataset_size, samples, trainable_parameters, state, reason, heldout, heldout_size, heldout_samples)"
            " VALUES (?, (SELECT count(*) FROM job), ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            *(job.job_id, job.name, job.spec_json, job.submitter, job.model_hash),
            *(job.dataset, job.dataset_size, job.samples, job.trainable_parameters, state.value, reason),
            *(job.heldout, job.heldout_size, job.heldout_samples),
        )

    def set_job(self, job_id: str, state: JobState, reason: str, fruitless: int, order: Order | None = None) -> None:
        self._db.write(
            "UPDATE job SET state = ?, reason = ?, fruitless = ?, order_kind = ?, order_reason = ? WHERE job_id = ?",
            *(state.value, reason, fruitless),
            *((order.kind.value, order.reason) if order else ("", "")),
            job_id,
        )

    def set_scorer(self, job_id: str, round: int, pipeline_id: int | None) -> None:
        self._db.write("UPDATE round SET scorer = ? WHERE job_id = ? AND round = ?", pipeline_id, job_id, round)

    def set_score(self, job_id: str, round: int, loss: float | None, tokens: int) -> None:
        self._db.write(
            "UPDATE round SET scorer = NULL, eval_loss = ?, eval_tokens = ? WHERE job_id = ? AND round = ?",
            *(loss, tokens, job_id, round),
        )

    def set_best(self, job_id: str, best: Best | None) -> None:
        self._db.write(
            "UPDATE job SET best_round = ?, best_loss = ?, stale = ? WHERE job_id = ?",
            *((best.round, best.loss, best.stale) if best else (None, None, 0)),
            job_id,
        )

    def scores(self, job_id: str, through: int) -> list[tuple[int, float]]:
        """Round and held-out loss of the scored rounds up to `through`, in order."""
        rows = self._read(
            "SELECT round, eval_loss FROM round WHERE job_id = ? AND round <= ? AND eval_loss IS NOT NULL"
            " ORDER BY round",
            *(job_id, through),
        )
        return [(round, loss) for round, loss in rows]

    def set_next_spec(self, job_id: str, spec_json: str) -> None:
        self._db.write("UPDATE job SET next_spec_json = ? WHERE job_id = ?", spec_json, job_id)

    def set_spec(self, job_id: str, spec_json: str) -> None:
        """The settings in force; none wait any more."""
        self._db.write("UPDATE job SET spec_json = ?, next_spec_json = NULL WHERE job_id = ?", spec_json, job_id)

    def specs(self, job_id: str) -> tuple[str, str | None]:
        """The settings in force, and those that wait."""
        ((spec_json, next_spec_json, state),) = self._read(
            "SELECT spec_json, next_spec_json, state FROM job WHERE job_id = ?", job_id
        )
        return spec_json, None if state == JobState.FINISHED else next_spec_json

    # --- rounds -------------------------------------------------------------------------------

    def rounds_state(self, job_id: str, rules: Rules) -> RoundsState:
        """The job's newest round, as it was made durable; without a deadline."""
        ((job, reason, fruitless, lineage, kind, why, best_round, best_loss, stale),) = self._read(
            "SELECT state, reason, fruitless, lineage, order_kind, order_reason, best_round, best_loss, stale"
            " FROM job WHERE job_id = ?",
            job_id,
        )
        ((number, phase, generation, wrapping, scorer),) = self._read(
            "SELECT round, phase, generation, wrap_up, scorer FROM round WHERE job_id = ? ORDER BY round DESC LIMIT 1",
            job_id,
        )
        pipelines = self.pipelines(job_id, number)
        return RoundsState(
            *(rules, JobState(job), reason, number, Phase(phase), generation, fruitless, pipelines),
            order=Order(OrderKind(kind), why) if kind else None,
            lineage=lineage,
            recent_s=self.recent_times(job_id, number),
            wrapping=bool(wrapping),
            scorer=scorer,
            best=None if best_round is None else Best(best_round, best_loss, stale),
        )

    def recent_times(self, job_id: str, through: int) -> tuple[float, ...]:
        """What the newest accepted pipelines took, oldest first, of committed rounds up to `through`."""
        rows = self._read(
            "SELECT took_s FROM pipeline JOIN round USING (job_id, round)"
            " WHERE job_id = ? AND round <= ? AND standing = 'whole' AND phase = 'committed' AND took_s IS NOT NULL"
            " ORDER BY round DESC, pipeline_id DESC LIMIT ?",
            *(job_id, through, RECENT),
        )
        return tuple(took_s for (took_s,) in reversed(rows))

    def pipelines(self, job_id: str, round: int) -> tuple[Pipeline, ...]:
        members: dict[int, list[Member]] = {}
        for pipeline_id, peer, start, end in self._read(
            "SELECT pipeline_id, peer, span_start, span_end FROM member"
            " WHERE job_id = ? AND round = ? ORDER BY pipeline_id, position",
            *(job_id, round),
        ):
            members.setdefault(pipeline_id, []).append(Member(peer, Span(start, end)))
        held: dict[int, list[Held]] = {}
        for record in self.contributions(job_id, round):
            held.setdefault(record.pipeline_id, []).append(Held(record.peer, record.payload, record.inner_steps))
        return tuple(
            Pipeline(
                *(pipeline_id, generation, tuple(members[pipeline_id]), Standing(standing)),
                *(tuple(sorted(held.get(pipeline_id, []))), reason, took_s),
                repair=bool(repair),
            )
            for pipeline_id, generation, standing, reason, took_s, repair in self._read(
                "SELECT pipeline_id, generation, standing, reason, took_s, repair FROM pipeline"
                " WHERE job_id = ? AND round = ? ORDER BY pipeline_id",
                *(job_id, round),
            )
        )

    def insert_round(self, job_id: str, round: int, phase: Phase, opened_unix_s: float, generation: int = 0) -> None:
        self._db.write(
            "INSERT INTO round (job_id, round, phase, opened_unix_s, generation) VALUES (?, ?, ?, ?, ?)",
            *(job_id, round, phase.value, opened_unix_s, generation),
        )

    def generations_after(self, job_id: str, round: int) -> int:
        """The highest generation of any later round."""
        ((highest,),) = self._read(
            "SELECT coalesce(max(generation), 0) FROM round WHERE job_id = ? AND round > ?", job_id, round
        )
        return int(highest)

    def discard_after(self, job_id: str, round: int, lineage: int) -> None:
        """Remove every later round with all that belongs to it."""
        for table in ("adapter_file", "outcome_block", "outcome"):
            self._db.write(f"DELETE FROM {table} WHERE job_id = ? AND round > ?", job_id, round)
        self._db.write(
            "DELETE FROM lease_range WHERE job_id = ?1 AND lease_id IN"
            " (SELECT lease_id FROM lease WHERE job_id = ?1 AND round > ?2)",
            *(job_id, round),
        )
        for table in ("lease", "contribution", "member", "pipeline", "round"):
            self._db.write(f"DELETE FROM {table} WHERE job_id = ? AND round > ?", job_id, round)
        self._db.write("UPDATE job SET lineage = ? WHERE job_id = ?", lineage, job_id)

    def set_phase(self, job_id: str, round: int, phase: Phase) -> None:
        self._db.write("UPDATE round SET phase = ? WHERE job_id = ? AND round = ?", phase.value, job_id, round)

    def insert_pipelines(self, job_id: str, round: int, generation: int, pipelines: Iterable[Pipeline]) -> None:
        self._db.write(
            "UPDATE round SET generation = ?, wrap_up = 0 WHERE job_id = ? AND round = ?", generation, job_id, round
        )
        for item in pipelines:
            self._db.write(
                "INSERT INTO pipeline (job_id, round, pipeline_id, generation, standing, reason, repair)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                *(job_id, round, item.pipeline_id, item.generation, item.standing.value, item.reason),
                int(item.repair),
            )
            self._db.write_many(
                "INSERT INTO member VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    (job_id, round, item.pipeline_id, position, m.peer, m.span.start, m.span.end)
                    for position, m in enumerate(item.members)
                ],
            )

    def set_standing(self, job_id: str, round: int, pipeline_id: int, standing: Standing, reason: str = "") -> None:
        self._db.write(
            "UPDATE pipeline SET standing = ?, reason = ? WHERE job_id = ? AND round = ? AND pipeline_id = ?",
            *(standing.value, reason, job_id, round, pipeline_id),
        )

    def set_whole(self, job_id: str, round: int, pipeline_id: int, took_s: float | None) -> None:
        self._db.write(
            "UPDATE pipeline SET standing = ?, took_s = ? WHERE job_id = ? AND round = ? AND pipeline_id = ?",
            *(Standing.WHOLE.value, took_s, job_id, round, pipeline_id),
        )

    def set_wrap_up(self, job_id: str, round: int) -> None:
        self._db.write("UPDATE round SET wrap_up = 1 WHERE job_id = ? AND round = ?", job_id, round)

    # --- contributions ------------------------------------------------------------------------

    def contributions(self, job_id: str, round: int) -> list[ContributionRecord]:
        """All stored ones of a round, oldest generation first, then by peer."""
        return self._contributions("job_id = ? AND round = ? ORDER BY generation, peer", job_id, round)

    def contributions_by(self, job_id: str, round: int, peer: str) -> list[ContributionRecord]:
        """Those of one node, newest generation first."""
        where = "job_id = ? AND round = ? AND peer = ? ORDER BY generation DESC"
        return self._contributions(where, job_id, round, peer)

    def _contributions(self, where: str, *values: str | int) -> list[ContributionRecord]:
        rows = self._read(f"SELECT {_CONTRIBUTION} FROM contribution WHERE {where}", *values)
        return [ContributionRecord(*row) for row in rows]

    def insert_contribution(self, job_id: str, c: ContributionRecord) -> None:
        self._db.write(
            f"INSERT INTO contribution (job_id, {_CONTRIBUTION}) VALUES (?{', ?' * (_CONTRIBUTION.count(',') + 1)})",
            *(job_id, c.round, c.generation, c.pipeline_id, c.peer, int(c.lead), c.payload, c.payload_size),
            *(c.inner_steps, c.tokens, c.loss, c.verdict, c.reason, c.receipt, c.label_tokens, c.skipped_steps),
        )

    def set_verdict(self, job_id: str, c: ContributionRecord, *, counts: bool) -> None:
        """Store the verdict, reason and receipt of `c`."""
        self._db.write(
            "UPDATE contribution SET verdict = ?, reason = ?, receipt = ?, counts = ?"
            " WHERE job_id = ? AND round = ? AND generation = ? AND peer = ?",
            *(c.verdict, c.reason, c.receipt, int(counts), job_id, c.round, c.generation, c.peer),
        )

    # --- leases -------------------------------------------------------------------------------

    def leases(self, job_id: str) -> list[Lease]:
        ranges: dict[int, list[Range]] = {}
        for lease_id, start, end in self._read(
            "SELECT lease_id, range_start, range_end FROM lease_range WHERE job_id = ? ORDER BY lease_id, range_start",
            job_id,
        ):
            ranges.setdefault(lease_id, []).append(Range(start, end))
        return [
            Lease(lease_id, round, pipeline_id, tuple(ranges[lease_id]), LeaseState(state), bool(ahead))
            for lease_id, round, pipeline_id, state, ahead in self._read(
                "SELECT lease_id, round, pipeline_id, state, ahead FROM lease WHERE job_id = ? ORDER BY lease_id",
                job_id,
            )
        ]

    def insert_lease(self, job_id: str, lease: Lease) -> None:
        self._db.write(
            "INSERT INTO lease VALUES (?, ?, ?, ?, ?, ?)",
            *(job_id, lease.lease_id, lease.round, lease.pipeline_id, int(lease.ahead), lease.state.value),
        )
        self._insert_ranges(job_id, lease)

    def _insert_ranges(self, job_id: str, lease: Lease) -> None:
        self._db.write_many(
            "INSERT INTO lease_range VALUES (?, ?, ?, ?)",
            [(job_id, lease.lease_id, r.start, r.end) for r in lease.ranges],
        )

    def set_lease(self, job_id: str, lease: Lease) -> None:
        """Its state, what is left of its ranges, and whose it is now."""
        self._db.write("DELETE FROM lease_range WHERE job_id = ? AND lease_id = ?", job_id, lease.lease_id)
        self._insert_ranges(job_id, lease)
        self._db.write(
            "UPDATE lease SET state = ?, round = ?, pipeline_id = ?, ahead = ? WHERE job_id = ? AND lease_id = ?",
            *(lease.state.value, lease.round, lease.pipeline_id, int(lease.ahead), job_id, lease.lease_id),
        )

    # --- rounds that ended ---------------------------------------------------------------------

    def commit_round(self, job_id: str, entry: LogEntry, committed_unix_s: float) -> None:
        self._db.write(
            "UPDATE round SET phase = ?, committed_unix_s = ?, entry_hash = ?, signature = ?"
            " WHERE job_id = ? AND round = ?",
            *(
                Phase.COMMITTED.value,
                committed_unix_s,
                entry.entry_hash,
                entry.signature,
                job_id,
                entry.round,
            ),
        )

    def log_entry(self, job_id: str, round: int) -> LogEntry | None:
        found = self._read(
            "SELECT round, entry_hash, signature FROM round WHERE job_id = ? AND round = ? AND entry_hash IS NOT NULL",
            *(job_id, round),
        )
        return LogEntry(*found[0]) if found else None

    def newest_round(self, job_id: str) -> int:
        ((newest,),) = self._read("SELECT max(round) FROM round WHERE job_id = ?", job_id)
        return int(newest)

    def history(self, job_id: str, newest: int, since: int = 1) -> list[RoundSummary]:
        """The newest rounds from `since` on, oldest first. Tokens and loss are those of leads that count."""
        rows = self._read(
            "SELECT r.round, r.phase, r.opened_unix_s, r.committed_unix_s,"
            " (SELECT count(*) FROM pipeline p WHERE p.job_id = r.job_id AND p.round = r.round"
            "  AND p.standing = 'whole'),"
            " count(c.peer), coalesce(sum(c.payload_size), 0),"
            " coalesce(sum(c.tokens) FILTER (WHERE c.lead AND c.counts), 0),"
            " avg(c.loss) FILTER (WHERE c.lead AND c.counts),"
            " coalesce(o.update_size, 0), coalesce(o.params_hash, x''), r.eval_loss"
            " FROM round r"
            " LEFT JOIN contribution c ON c.job_id = r.job_id AND c.round = r.round"
            " LEFT JOIN outcome o ON o.job_id = r.job_id AND o.round = r.round"
            " WHERE r.job_id = ? AND r.round >= ?"
            " GROUP BY r.round ORDER BY r.round DESC LIMIT ?",
            *(job_id, since, newest),
        )
        return [RoundSummary(*row) for row in reversed(rows)]

    def append_log(self, job_id: str, lines: Iterable[LogLine], unix_s: float, kept: int) -> None:
        """Number the lines, and drop the oldest beyond `kept`."""
        ((last,),) = self._read("SELECT coalesce(max(seq), 0) FROM event WHERE job_id = ?", job_id)
        rows = [
            (job_id, seq, unix_s, x.kind, x.round, x.text, x.peer, x.pipeline_id, x.loss, x.tokens, x.size)
            for seq, x in enumerate(lines, start=last + 1)
        ]
        self._db.write_many("INSERT INTO event VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
        self._db.write("DELETE FROM event WHERE job_id = ? AND seq <= ?", job_id, last + len(rows) - kept)

    def log(self, job_id: str, after: int, most: int) -> list[LogLine]:
        """Lines with a higher number than `after`, oldest first."""
        return [
            LogLine(*row)
            for row in self._read(
                "SELECT kind, round, text, peer, pipeline_id, loss, tokens, bytes, seq, unix_s FROM event"
                " WHERE job_id = ? AND seq > ? ORDER BY seq LIMIT ?",
                *(job_id, after, most),
            )
        ]

    def totals(self, job_id: str) -> JobTotals:
        ((contribution_bytes,),) = self._read(
            "SELECT coalesce(sum(payload_size), 0) FROM contribution WHERE job_id = ?", job_id
        )
        ((pipeline_rounds,),) = self._read(
            "SELECT count(*) FROM pipeline JOIN round USING (job_id, round)"
            " WHERE job_id = ? AND standing = 'whole' AND phase = 'committed'",
            job_id,
        )
        return JobTotals(contribution_bytes, pipeline_rounds)

    def referenced_blobs(self, kept_rounds: int) -> set[bytes]:
        """Every blob that a job still needs, or that its nodes may still ask for.

        Payloads go back one committed round, so that the newest outer state can be made again; outer
        states at least that far, since a job may be rewound to any kept round. Updates are kept of every
        round: its parameters can be made from them (coordinator.replay). So are an adapter's files that are
        not tensors: they are small, mostly the same, and name the release that wrote them.
        """
        return {
            sha256
            for (sha256,) in self._read(
                "WITH newest AS (SELECT job_id, max(round) AS round FROM outcome GROUP BY job_id)"
                " SELECT dataset FROM job WHERE state != 'finished'"
                " UNION SELECT heldout FROM job WHERE state != 'finished'"
                " UNION SELECT payload FROM contribution JOIN newest USING (job_id)"
                "  WHERE contribution.round >= newest.round"
                " UNION SELECT state_blob FROM outcome JOIN newest USING (job_id)"
                "  WHERE outcome.round >= newest.round - 1 OR outcome.round > newest.round - ?1"
                " UNION SELECT update_blob FROM outcome"
                " UNION SELECT sha256 FROM adapter_file WHERE name NOT LIKE '%.safetensors'"
                " UNION SELECT snapshot_blob FROM outcome JOIN newest USING (job_id)"
                "  WHERE outcome.round > newest.round - ?1"
                " UNION SELECT sha256 FROM adapter_file JOIN newest USING (job_id)"
                "  WHERE adapter_file.round > newest.round - ?1"
                " UNION SELECT state_blob FROM outcome JOIN job USING (job_id) WHERE outcome.round = best_round"
                " UNION SELECT snapshot_blob FROM outcome JOIN job USING (job_id) WHERE outcome.round = best_round"
                " UNION SELECT sha256 FROM adapter_file JOIN job USING (job_id) WHERE adapter_file.round = best_round",
                kept_rounds,
            )
        }

    def _read(self, sql: str, *values: str | int) -> list[tuple[Any, ...]]:
        # Rows are untyped here and in `coordinator.outcomes`: STRICT tables guarantee what the records say.
        return self._db.rows(sql, *values)
