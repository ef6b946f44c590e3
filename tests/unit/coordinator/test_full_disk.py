"""A disk without room at every write of a round (TRUST.md, 11): said clearly, and over as soon as there is room."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RUNNER = Path(__file__).parent / "full_disk_runner.py"
ROOT = Path(__file__).parents[3]


@pytest.mark.faults
def test_a_full_disk_at_every_write(tmp_path: Path, seed: int) -> None:
    """11: the same coordinator ends the job as if there had always been room. A seed varies nodes, cuts, parameters,
    and how much room is left, so that writes are cut at other bytes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = ["unshare", "-Urm", sys.executable, str(RUNNER), str(tmp_path), str(seed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    free, *filled = [json.loads(line) for line in done.stdout.splitlines()]
    assert free["reports"] == []
    assert len(filled) >= 15
    written = {result["name"] for result in filled}
    for write in ("piece write", "blob write", "commit ContributionHeld", "commit RoundAggregated"):
        assert f"before {write}" in written
    for result in filled:
        where = f"the disk was full from {result['name']} on, write {result['at']}"
        assert result["status"] == 0, where
        assert result["reports"], where
        assert all("SW704" in report and "free space" in report for report in result["reports"]), where
        assert (result["hashes"], result["reason"]) == (free["hashes"], ""), where
        assert result["left_over"] == [], where
