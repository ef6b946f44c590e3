"""The soak's accounts: right of a real job, and wrong where its books are made wrong."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

from coordinator_sim import job_spec, run_job

from benchmarks.soak_ledger import accounts
from coordinator.ports import CoordinatorSettings


async def test_a_job_of_two_rounds_is_accounted_for(tmp_path: Path) -> None:
    await run_job(tmp_path, job_spec(), CoordinatorSettings())
    path = tmp_path / "coordinator.db"
    # Two pipelines of three inner steps of two samples.
    fair = accounts(path, step_samples=2, round_samples=12, epoch_samples=64)
    assert (fair.rounds, fair.accepted, fair.twice, fair.outstanding, fair.miscounted) == (2, 24, 0, 0, 0)
    assert (fair.epochs, fair.pipelines) == (24 / 64, 2.0)
    assert fair.events["round_committed"] == 2
    assert {key: fair.shown()[key] for key in ("false_refusals", "late", "pauses")} == {
        "false_refusals": 0,
        "late": 0,
        "pauses": 0,
    }
    with sqlite3.connect(path) as database:
        database.execute("UPDATE lease_range SET range_start = 4, range_end = 10 WHERE range_start = 6")
        database.execute("UPDATE lease_range SET range_end = 16 WHERE range_start = 12")
    database.close()
    false = accounts(path, step_samples=2, round_samples=12, epoch_samples=64)
    assert replace(false, events=fair.events) == replace(
        fair, accepted=22, twice=2, outstanding=4, miscounted=1, epochs=22 / 64
    )
