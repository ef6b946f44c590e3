"""P1: killed before and after every durable write of a round, and again while recovering."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

RUNNER = Path(__file__).parent / "crash_runner.py"
ROOT = Path(__file__).parents[3]


def test_every_write_of_a_round_may_be_the_last(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, str(RUNNER), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-4000:]
    fault_free, *killed = [json.loads(line) for line in run.stdout.splitlines()]
    # Two rounds of two pipelines of two nodes, six samples a pipeline and round.
    assert fault_free["accepted"] == 8
    assert fault_free["positions"] == [[0, 6], [6, 12], [12, 18], [18, 24]]
    assert len(killed) >= 70
    written = {result["name"] for result in killed}
    for write in (
        *("piece fsync", "blob fsync", "blob rename", "folder fsync"),
        *("commit ContributionHeld", "commit ContributionHeld + RoundFrozen"),
        *("commit RoundAggregated", "commit RoundCommitted"),
    ):
        assert {f"before {write}", f"after {write}"} <= written
    for result in killed:
        where = f"killed at write {result['at']}, {result['name']}"
        assert set(result["lives"]) == {137}, where
        assert result["hashes"] == fault_free["hashes"], where
        assert result["lost"] == [], where
        assert result["accepted"] == fault_free["accepted"], where
        assert result["positions"] == fault_free["positions"], where
