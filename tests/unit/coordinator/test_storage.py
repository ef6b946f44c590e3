"""The database on a real file: what is written is read back, once, by one process."""

from __future__ import annotations

import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator import database
from coordinator.leases import Lease, LeaseState, Range
from coordinator.placement import Member
from coordinator.records import (
    AdapterFile,
    BlockPiece,
    ContributionRecord,
    JobRecord,
    LogEntry,
    NodeRecord,
    Outcome,
)
from coordinator.round_model import Held, JobState, Phase, Pipeline, RoundsState, Rules, Standing
from coordinator.storage import Storage
from swarm.errors import DataDirLocked, StorageError
from swarm.ids import Span, sha256

RULES = Rules(2, 10.0, 1, 3)
JOB = JobRecord("j1", "poems", "{}", "me", sha256(b"model"), sha256(b"data"), 100, 10, 560)
MEMBERS = (Member("a", Span(0, 2)), Member("b", Span(2, 4)))


def _open(folder: Path) -> Storage:
    return Storage(folder, lambda name: None)


def _contribution(peer: str, generation: int = 1, pipeline_id: int = 0) -> ContributionRecord:
    payload = sha256(f"{peer}{generation}".encode())
    lead = peer == "a"
    return ContributionRecord(
        1, generation, pipeline_id, peer, lead, payload, 50, 3, 7, 2.0 if lead else None, 1, "", b"r"
    )


def _outcome(number: int) -> Outcome:
    piece = BlockPiece("0", sha256(b"p"), 0, 4, sha256(b"u"), 0, 8, sha256(b"s"))
    parts = ("params", "state", "update", "snapshot", "config", "weights")
    names = [sha256(f"{what}{number}".encode()) for what in parts]
    return Outcome(
        *(names[0], names[1], names[2], 4, names[3], 8),
        (piece, replace(piece, block="head")),
        (AdapterFile("adapter_config.json", names[4], 3), AdapterFile("adapter_model.safetensors", names[5], 9)),
    )


def _with_job(storage: Storage) -> None:
    with storage.transaction("job"):
        storage.insert_job(JOB, JobState.WAITING, "why")
        storage.insert_round("j1", 0, Phase.COMMITTED, 1.0)
        storage.outcomes.insert("j1", 0, _outcome(0))
        storage.insert_round("j1", 1, Phase.OPEN, 2.0)
        storage.insert_pipelines("j1", 1, 1, [Pipeline(0, 1, MEMBERS)])


def test_a_round_is_read_back_after_reopening(tmp_path: Path) -> None:
    storage = _open(tmp_path)
    _with_job(storage)
    lease = Lease(1, 1, 0, (Range(0, 4), Range(9, 11)))
    with storage.transaction("more"):
        storage.insert_contribution("j1", _contribution("b"))
        storage.insert_lease("j1", lease)
        storage.set_job("j1", JobState.RUNNING, "", 2)
        storage.put_node(NodeRecord("a", Span(0, 2), ("/ip4/1.2.3.4",), "cpu", "float32"))
    storage.close()
    storage = _open(tmp_path)
    held = (Held("b", _contribution("b").payload, 3),)
    assert storage.rounds_state("j1", RULES) == RoundsState(
        RULES, JobState.RUNNING, "", 1, Phase.OPEN, 1, 2, (Pipeline(0, 1, MEMBERS, Standing.ACTIVE, held),)
    )
    assert storage.jobs() == [JOB]
    assert storage.contributions("j1", 1) == [_contribution("b")]
    assert storage.leases("j1") == [lease]
    assert storage.outcomes.find("j1", 0) == _outcome(0)
    assert storage.outcomes.find("j1", 1) is None
    assert [node.addrs for node in storage.nodes()] == [("/ip4/1.2.3.4",)]
    with storage.transaction("end"):
        storage.set_lease("j1", replace(lease, state=LeaseState.CLOSED))
        storage.delete_node("a")
    assert [x.state for x in storage.leases("j1")] == [LeaseState.CLOSED]
    assert storage.nodes() == []
    storage.close()


def _same_name_twice(storage: Storage) -> None:
    with storage.transaction("jobs"):
        storage.insert_job(JOB, JobState.WAITING, "")
        storage.insert_job(replace(JOB, job_id="j2"), JobState.WAITING, "")


def test_a_transaction_is_all_or_nothing(tmp_path: Path) -> None:
    storage = _open(tmp_path)
    with pytest.raises(StorageError, match=r"UNIQUE constraint failed: job\.name"):
        _same_name_twice(storage)
    assert storage.jobs() == []
    storage.close()


def test_a_node_counts_once_a_round(tmp_path: Path) -> None:
    storage = _open(tmp_path)
    _with_job(storage)
    with storage.transaction("first"):
        storage.insert_contribution("j1", _contribution("a"))
        storage.insert_pipelines("j1", 1, 2, [Pipeline(1, 2, MEMBERS)])
    second = _contribution("a", generation=2, pipeline_id=1)
    with pytest.raises(StorageError, match="UNIQUE"), storage.transaction("second"):
        storage.insert_contribution("j1", second)
    with storage.transaction("first is void"):
        storage.set_verdict("j1", replace(_contribution("a"), verdict=4, reason="late"), counts=False)
        storage.insert_contribution("j1", second)
    assert [c.generation for c in storage.contributions_by("j1", 1, "a")] == [2, 1]
    storage.close()


def test_a_contribution_needs_its_pipeline(tmp_path: Path) -> None:
    storage = _open(tmp_path)
    _with_job(storage)
    with pytest.raises(StorageError, match="FOREIGN KEY"), storage.transaction("stranger"):
        storage.insert_contribution("j1", _contribution("z"))
    storage.close()


def test_history_and_totals(tmp_path: Path) -> None:
    storage = _open(tmp_path)
    _with_job(storage)
    with storage.transaction("round"):
        for peer in ("a", "b"):
            storage.insert_contribution("j1", _contribution(peer))
        storage.set_standing("j1", 1, 0, Standing.WHOLE)
        storage.outcomes.insert("j1", 1, _outcome(1))
        storage.commit_round("j1", LogEntry(1, b"hash", b"signature"), 12.0)
        storage.insert_round("j1", 2, Phase.OPEN, 13.0)
    first, second = storage.history("j1", 10)
    assert (first.contributions, first.contribution_bytes, first.tokens, first.loss) == (2, 100, 7, 2.0)
    assert (first.pipelines, first.update_bytes, first.committed_unix_s) == (1, 4, 12.0)
    assert (second.phase, second.contributions, second.loss, second.params_hash) == ("open", 0, None, b"")
    assert storage.history("j1", 1) == [second]
    totals = storage.totals("j1")
    assert (totals.contribution_bytes, totals.accepted_pipeline_rounds) == (100, 1)
    assert storage.log_entry("j1", 1) == LogEntry(1, b"hash", b"signature")
    assert storage.log_entry("j1", 2) is None
    storage.close()


def test_what_is_still_needed(tmp_path: Path) -> None:
    storage = _open(tmp_path)
    _with_job(storage)
    with storage.transaction("rounds"):
        storage.insert_contribution("j1", _contribution("a"))
        storage.outcomes.insert("j1", 1, _outcome(1))
        for number in (2, 3):
            storage.insert_round("j1", number, Phase.COMMITTED, 2.0)
            storage.outcomes.insert("j1", number, _outcome(number))
    kept = storage.referenced_blobs(2)
    outcomes = [_outcome(number) for number in range(4)]
    assert JOB.dataset in kept
    assert _contribution("a").payload not in kept
    assert [o.state_blob in kept for o in outcomes] == [False, False, True, True]
    assert [o.update_blob in kept for o in outcomes] == [True, True, True, True]
    assert [o.snapshot_blob in kept for o in outcomes] == [False, False, True, True]
    assert [o.files[0].sha256 in kept for o in outcomes] == [True, True, True, True]
    assert [o.files[1].sha256 in kept for o in outcomes] == [False, False, True, True]
    with storage.transaction("finished"):
        storage.set_job("j1", JobState.FINISHED, "", 0)
    assert JOB.dataset not in storage.referenced_blobs(2)
    storage.close()


def test_one_process_a_folder(tmp_path: Path) -> None:
    storage = _open(tmp_path)
    with pytest.raises(DataDirLocked):
        _open(tmp_path)
    storage.close()
    _open(tmp_path).close()


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    _open(tmp_path).close()
    connection = sqlite3.connect(tmp_path / "coordinator.db")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StorageError, match="schema 99"):
        _open(tmp_path)


def test_leases_of_an_older_release_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema 6 makes the tables of leases anew."""
    older, newest = tmp_path / "migrations", database._MIGRATIONS
    older.mkdir()
    for number, script in enumerate(sorted(newest.glob("*.sql")), start=1):
        if number < 6:
            shutil.copy(script, older)
    monkeypatch.setattr(database, "_MIGRATIONS", older)
    storage = _open(tmp_path / "data")
    _with_job(storage)
    with storage.transaction("lease"):
        storage._db.write("INSERT INTO lease VALUES ('j1', 1, 1, 0, 'open')")
        storage._db.write_many("INSERT INTO lease_range VALUES ('j1', 1, ?, ?)", [(0, 4), (9, 11)])
    storage.close()
    monkeypatch.setattr(database, "_MIGRATIONS", newest)
    storage = _open(tmp_path / "data")
    lease = Lease(1, 1, 0, (Range(0, 4), Range(9, 11)))
    assert storage.leases("j1") == [lease]
    ahead = Lease(2, 1, 0, (Range(11, 13),), ahead=True)
    with storage.transaction("lease"):
        storage.set_lease("j1", replace(lease, state=LeaseState.CLOSED))
        storage.insert_lease("j1", ahead)
    assert storage.leases("j1") == [replace(lease, state=LeaseState.CLOSED), ahead]
    assert storage._db.rows("PRAGMA foreign_key_check") == []
    storage.close()


def test_commits_are_synchronous(tmp_path: Path) -> None:
    storage = _open(tmp_path)
    assert storage._db.rows("PRAGMA journal_mode") == [("wal",)]
    assert storage._db.rows("PRAGMA synchronous") == [(2,)]
    assert storage._db.rows("PRAGMA foreign_keys") == [(1,)]
    storage.close()
