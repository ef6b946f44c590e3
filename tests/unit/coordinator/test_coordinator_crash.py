"""P1: killed before and after every durable write of a round, and again while recovering."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

RUNNER = Path(__file__).parent / "crash_runner.py"
ROOT = Path(__file__).parents[3]


def crash(folder: Path, scenario: str) -> list[dict[str, Any]]:
    """The fault-free run's result, then those of the killed ones."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(RUNNER), str(folder), scenario]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_every_write_of_a_round_may_be_the_last(tmp_path: Path) -> None:
    fault_free, *killed = crash(tmp_path, "rounds")
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


def test_every_act_of_an_owner_may_be_the_last_write(tmp_path: Path) -> None:
    """Changed, paused, rewound to round 1, trained again, stopped: the same as if rounds 1 to 3 had just run."""
    straight, *killed = crash(tmp_path, "owner")
    written = {result["name"] for result in killed}
    for act in ("Rewound", "SettingsStored", "SettingsAdopted"):
        assert any(act in name for name in written), f"no run was killed at {act}: {sorted(written)}"
    for result in killed:
        where = f"killed at {result['name']}"
        assert result["lives"] in ([137], [0]), where  # 0: another interleaving did without that write
        assert result["hashes"][:3] == straight["hashes"], where
        closed = [at for start, end in result["closed"] for at in range(start, end)]
        assert closed[:36] == list(range(36)), where
        assert len(closed) == len(set(closed)), where
        kinds = [kind for _, kind in result["log"]]
        assert [seq for seq, _ in result["log"]] == list(range(1, len(kinds) + 1)), where
        assert kinds.count("job_rewound") == kinds.count("job_finished") == 1, where
        assert result["spec"]["inner"]["lr"] == 5e-4, where


def test_pipelines_that_contribute_in_part_may_be_cut_anywhere(tmp_path: Path) -> None:
    fault_free, *killed = crash(tmp_path, "partial")
    # Six samples of the quick pipeline, four of the slow one, a round. What the slow one left over in the
    # first round it gets in the second; what it leaves over then is nobody's yet.
    closed = [at for start, end in fault_free["closed"] for at in range(start, end)]
    assert sorted(closed) == [*range(14), *range(16, 22)]
    assert any("WrapUp" in result["name"] for result in killed)
    for result in killed:
        where = f"killed at {result['name']}"
        assert result["lives"] == [137], where
        for key in ("hashes", "closed", "accepted"):
            assert result[key] == fault_free[key], where
        assert result["lost"] == [], where
        assert [kind for _, kind in result["log"]].count("wrap_up") == 2, where


def test_repairs_may_be_cut_anywhere(tmp_path: Path) -> None:
    fault_free, *killed = crash(tmp_path, "repair")
    assert fault_free["accepted"] == 8
    assert any("PipelineLost + PipelinesFormed" in result["name"] for result in killed)
    for result in killed:
        where = f"killed at {result['name']}"
        assert set(result["lives"]) <= {137, 0}, where
        closed = [at for start, end in result["closed"] for at in range(start, end)]
        assert (len(closed), len(set(closed))) == (24, 24), where
        for key in ("hashes", "accepted"):
            assert result[key] == fault_free[key], where


def test_scores_may_be_cut_anywhere(tmp_path: Path) -> None:
    fault_free, *killed = crash(tmp_path, "scored")
    assert fault_free["best"] == ["finished", 2, 1.0, 1]
    assert len(fault_free["hashes"]) == 3
    written = {result["name"] for result in killed}
    assert any("ScoringBegun" in name for name in written)
    assert any("RoundScored + JobChanged" in name for name in written), written
    for result in killed:
        where = f"killed at {result['name']}"
        assert result["lives"] == [137], where
        for key in ("hashes", "closed", "accepted", "best"):
            assert result[key] == fault_free[key], where
        assert [kind for _, kind in result["log"]].count("round_scored") == 3, where


def test_rounds_that_overlap_may_be_cut_anywhere(tmp_path: Path) -> None:
    """Leases that are held ahead are taken over once, and by the same pipelines, whatever dies in between."""
    fault_free, *killed = crash(tmp_path, "overlap")
    closed = [at for start, end in fault_free["closed"] for at in range(start, end)]
    assert closed == list(range(36))
    assert fault_free["positions"] == fault_free["closed"], (
        "none was left over, and none is held ahead in the last round"
    )
    for result in killed:
        where = f"killed at {result['name']}"
        assert result["lives"] == [137], where
        for key in ("hashes", "positions", "closed", "accepted"):
            assert result[key] == fault_free[key], where
        assert result["lost"] == [], where
