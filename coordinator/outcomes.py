"""Rows of what rounds made: the outcome, where each block lies in its blobs, the adapter's files.

Part of `coordinator.storage`, whose transactions the one write belongs to. Raises StorageError. Every method blocks.
"""

from __future__ import annotations

from typing import Any

from coordinator.database import Database
from coordinator.records import AdapterFile, BlockPiece, Outcome
from swarm.errors import StorageError


class Outcomes:
    """Of all jobs, by job and round."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def insert(self, job_id: str, round: int, o: Outcome) -> None:
        self._db.write(
            "INSERT INTO outcome VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            *(job_id, round, o.params_hash, o.state_blob, o.update_blob, o.update_size),
            *(o.snapshot_blob, o.snapshot_size),
        )
        self._db.write_many(
            "INSERT INTO outcome_block VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (
                    *(job_id, round, position, b.block, b.params_hash, b.update_offset, b.update_length),
                    *(b.update_sha256, b.snapshot_offset, b.snapshot_length, b.snapshot_sha256),
                )
                for position, b in enumerate(o.blocks)
            ],
        )
        self._db.write_many(
            "INSERT INTO adapter_file VALUES (?, ?, ?, ?, ?)",
            [(job_id, round, f.name, f.sha256, f.size) for f in o.files],
        )

    def of(self, job_id: str, round: int) -> Outcome:
        """Of a round that has one. Raises StorageError otherwise."""
        outcome = self.find(job_id, round)
        if outcome is None:
            raise StorageError(f"the database lacks the outcome of round {round}")
        return outcome

    def find(self, job_id: str, round: int) -> Outcome | None:
        found = self._rows(
            "SELECT params_hash, state_blob, update_blob, update_size, snapshot_blob, snapshot_size"
            " FROM outcome WHERE job_id = ? AND round = ?",
            *(job_id, round),
        )
        if not found:
            return None
        blocks = self._rows(
            "SELECT block, params_hash, update_offset, update_length, update_sha256, snapshot_offset,"
            " snapshot_length, snapshot_sha256 FROM outcome_block WHERE job_id = ? AND round = ?"
            " ORDER BY position",
            *(job_id, round),
        )
        files = self._rows(
            "SELECT name, sha256, size FROM adapter_file WHERE job_id = ? AND round = ? ORDER BY name",
            *(job_id, round),
        )
        params_hash, state_blob, update_blob, update_size, snapshot_blob, snapshot_size = found[0]
        return Outcome(
            *(params_hash, state_blob, update_blob, update_size, snapshot_blob, snapshot_size),
            tuple(BlockPiece(*row) for row in blocks),
            tuple(AdapterFile(*row) for row in files),
        )

    def with_file(self, sha256: bytes) -> list[tuple[str, int]]:
        """Job and round of every adapter that has this file."""
        rows = self._rows("SELECT job_id, round FROM adapter_file WHERE sha256 = ? ORDER BY job_id, round", sha256)
        return [(job_id, round) for job_id, round in rows]

    def _rows(self, sql: str, *values: str | int | bytes) -> list[tuple[Any, ...]]:
        # Rows are untyped, as in `Storage._read`: STRICT tables guarantee what the records say.
        return self._db.rows(sql, *values)
