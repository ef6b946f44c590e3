"""P1 (TRUST.md, 9, 10 and 12): killed before and after every durable write of a round, and again while
recovering; stopped by a disk that fails. Every seed goes through every write; it varies the job and its nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RUNNER = Path(__file__).parent / "crash_runner.py"
ROOT = Path(__file__).parents[3]
KILLED, STOPPED = -9, 3

pytestmark = pytest.mark.faults


def crash(folder: Path, scenario: str, seed: int) -> list[dict[str, Any]]:
    """The fault-free run's result, then those of the killed ones."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(RUNNER), str(folder), scenario, str(seed)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def positions(ranges: list[list[int]]) -> list[int]:
    return sorted(at for start, end in ranges for at in range(start, end))


def assert_same_end(fault_free: dict[str, Any], killed: dict[str, Any], where: str) -> None:
    """Nothing acknowledged is lost, nothing is applied twice, the same parameters after every round."""
    for key in ("hashes", "accepted", "positions", "closed"):
        assert killed[key] == fault_free[key], where
    assert killed["lost"] == [], where


def test_every_write_of_a_round_may_be_the_last(tmp_path: Path, seed: int) -> None:
    """9, and 10 for every third write."""
    fault_free, *killed = crash(tmp_path, "rounds", seed)
    # Two rounds of two pipelines of two nodes, or of a third one of one node; six samples a pipeline and round.
    assert fault_free["accepted"] == 2 * (5 if seed % 2 else 4)
    assert positions(fault_free["closed"]) == list(range(36 if seed % 2 else 24))
    assert len(killed) >= 80
    written = {result["name"] for result in killed}
    for write in (
        *("piece write", "piece fsync", "blob write", "blob fsync", "blob rename", "folder fsync"),
        *("commit ContributionHeld", "commit ContributionHeld + RoundFrozen"),
        *("commit RoundAggregated", "commit RoundCommitted"),
    ):
        assert {f"before {write}", f"after {write}"} <= written
    for result in killed:
        where = f"killed at write {result['at']}, {result['name']}"
        assert set(result["lives"]) == {KILLED}, where
        assert_same_end(fault_free, result, where)
    assert sum(len(result["lives"]) == 2 for result in killed) >= len(killed) // 3


def test_a_failed_fsync_stops_the_coordinator(tmp_path: Path, seed: int) -> None:
    """12: it ends by itself, has acknowledged nothing that is not there, and goes on when the disk is well again."""
    fault_free, *stopped = crash(tmp_path, "fsync", seed)
    assert len(stopped) >= 40
    for result in stopped:
        where = f"every fsync failed from {result['name']} on, write {result['at']}"
        assert result["lives"] == [STOPPED], where
        assert_same_end(fault_free, result, where)


def test_every_act_of_an_owner_may_be_the_last_write(tmp_path: Path, seed: int) -> None:
    """9: changed, paused, rewound to round 1, trained again, stopped: the same as if rounds 1 to 3 had just run."""
    straight, *killed = crash(tmp_path, "owner", seed)
    written = {result["name"] for result in killed}
    for act in ("Rewound", "SettingsStored", "SettingsAdopted"):
        assert any(act in name for name in written), f"no run was killed at {act}: {sorted(written)}"
    for result in killed:
        where = f"killed at {result['name']}"
        assert result["lives"] in ([KILLED], [0]), where  # 0: another interleaving did without that write
        assert result["hashes"][:3] == straight["hashes"], where
        closed = [at for start, end in result["closed"] for at in range(start, end)]
        assert closed[:36] == list(range(36)), where
        assert len(closed) == len(set(closed)), where
        kinds = [kind for _, kind in result["log"]]
        assert [seq for seq, _ in result["log"]] == list(range(1, len(kinds) + 1)), where
        assert kinds.count("job_rewound") == kinds.count("job_finished") == 1, where
        assert result["spec"]["inner"]["lr"] == 5e-4, where


def test_pipelines_that_contribute_in_part_may_be_cut_anywhere(tmp_path: Path, seed: int) -> None:
    """9."""
    fault_free, *killed = crash(tmp_path, "partial", seed)
    # Six samples of the quick pipeline, four of the slow one, a round. What the slow one left over in the
    # first round is leased first in the second; what it leaves over then is nobody's yet.
    closed = positions(fault_free["closed"])
    assert (len(closed), len(set(closed))) == (20, 20)
    assert set(range(12)) <= set(closed) <= set(range(22))
    assert any("WrapUp" in result["name"] for result in killed)
    for result in killed:
        where = f"killed at {result['name']}"
        assert result["lives"] == [KILLED], where
        for key in ("hashes", "closed", "accepted"):
            assert result[key] == fault_free[key], where
        assert result["lost"] == [], where
        assert [kind for _, kind in result["log"]].count("wrap_up") == 2, where


def test_repairs_may_be_cut_anywhere(tmp_path: Path, seed: int) -> None:
    """9."""
    fault_free, *killed = crash(tmp_path, "repair", seed)
    assert fault_free["accepted"] == 8
    assert any("PipelineLost + PipelinesFormed" in result["name"] for result in killed)
    for result in killed:
        where = f"killed at {result['name']}"
        assert set(result["lives"]) <= {KILLED, 0}, where
        closed = positions(result["closed"])
        assert (len(closed), len(set(closed))) == (24, 24), where
        for key in ("hashes", "accepted"):
            assert result[key] == fault_free[key], where


def test_scores_may_be_cut_anywhere(tmp_path: Path, seed: int) -> None:
    """9."""
    fault_free, *killed = crash(tmp_path, "scored", seed)
    assert fault_free["best"] == ["finished", 2, 1.0, 1]
    assert len(fault_free["hashes"]) == 3
    written = {result["name"] for result in killed}
    assert any("ScoringBegun" in name for name in written)
    assert any("RoundScored + JobChanged" in name for name in written), written
    for result in killed:
        where = f"killed at {result['name']}"
        assert result["lives"] == [KILLED], where
        for key in ("hashes", "closed", "accepted", "best"):
            assert result[key] == fault_free[key], where
        assert [kind for _, kind in result["log"]].count("round_scored") == 3, where


def test_rounds_that_overlap_may_be_cut_anywhere(tmp_path: Path, seed: int) -> None:
    """9: leases that are held ahead are taken over once, and by the same pipelines, whatever dies in between."""
    fault_free, *killed = crash(tmp_path, "overlap", seed)
    closed = positions(fault_free["closed"])
    assert closed == list(range(36))
    assert fault_free["positions"] == fault_free["closed"], (
        "none was left over, and none is held ahead in the last round"
    )
    for result in killed:
        where = f"killed at {result['name']}"
        assert result["lives"] == [KILLED], where
        for key in ("hashes", "positions", "closed", "accepted"):
            assert result[key] == fault_free[key], where
        assert result["lost"] == [], where
