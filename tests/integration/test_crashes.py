"""Processes die by SIGKILL in the middle of a job; the job goes on and ends as if nothing had been."""

from __future__ import annotations

import json
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from swarm.net.join import parse_join
from swarm.samples import write_sentiment_jsonl
from tests.integration.processes import Process, Swarm, swarm_of

ROUNDS = 5
JOB = """
name: {name}
data: {{train: train.jsonl}}
schedule:
  {{rounds: {rounds}, inner_steps: {steps}, overlap_steps: {overlap}, batch_size: 2, min_pipelines: {pipelines},
    round_deadline_s: 120}}
"""
DEATHS = [
    "after commit ContributionHeld",
    "after commit…RoundFrozen",
    "after commit RoundAggregated",
    "before commit RoundCommitted",
    "after commit RoundOpened",
]
"""One in each state of a round: open with something acknowledged, frozen, aggregated, between, and just opened."""


def write_job(folder: Path, name: str, rounds: int, steps: int, pipelines: int, overlap: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_sentiment_jsonl(folder / "train.jsonl", "train", 60)
    path = folder / f"{name}.yaml"
    text = JOB.format(name=name, rounds=rounds, steps=steps, pipelines=pipelines, overlap=overlap)
    path.write_text(text)
    return path


def wait_finished(swarm: Swarm, name: str, timeout_s: float = 150.0) -> dict[str, Any]:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        result = swarm.run("job", "status", name, "--json")
        # While the coordinator is away the command says so; that is not the end of the job.
        if result.returncode == 0:
            status: dict[str, Any] = json.loads(result.stdout)
            if status["state"] == "finished":
                return status
            assert status["state"] in ("waiting", "running"), status
    raise AssertionError(f"job {name} did not finish:\n" + "\n".join(p.log_tail() for p in swarm.processes))


def start_dying(swarm: Swarm, port: int, mark: str) -> Process:
    script = Path(__file__).with_name("dying_coordinator.py")
    data = str(swarm.root / "coordinator")
    process = swarm.start_command("coordinator", [sys.executable, str(script), swarm.join, data, str(port), mark])
    swarm.join = process.event()["join"]
    return process


def test_coordinator_killed_in_each_state_of_a_round(smollm2: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "job", "crash", ROUNDS, 1, 1)
    hashes = {}
    for deaths in ([], DEATHS):
        with swarm_of(tmp_path / f"deaths-{len(deaths)}", smollm2, {}) as swarm:
            coordinator = start_dying(swarm, 0, "never")
            port = int(parse_join(swarm.join).coordinator.rpartition(":")[2])
            node = swarm.node("whole", "0:30")
            node.event()
            if deaths:
                # The first death must lie ahead before the job starts.
                coordinator.kill()
                coordinator = start_dying(swarm, port, deaths[0])
            swarm.run_json("job", "submit", str(job))
            for mark in [*deaths[1:], ""][: len(deaths)]:
                assert coordinator.popen.wait(timeout=120) == -9, coordinator.log_tail()
                coordinator = start_dying(swarm, port, mark)
            status = wait_finished(swarm, "crash")
            hashes[len(deaths)] = [entry["params_hash"] for entry in status["history"]]
            node.wait_log("settled", round=ROUNDS)
            assert settled_rounds(node) == list(range(1, ROUNDS + 1))
            accepted = accepted_positions(swarm.root / "coordinator")
            assert accepted == list(range(ROUNDS * 2))
    # The same bytes after every round: nothing acknowledged was lost, nothing was applied twice.
    assert hashes[len(DEATHS)] == hashes[0]


def test_a_coordinator_whose_disk_fails_ends_and_says_why(smollm2: Path, tmp_path: Path) -> None:
    """TRUST.md, 12, of the whole process; at every fsync: tests/unit/coordinator/test_coordinator_crash.py."""
    job = write_job(tmp_path / "job", "unlucky", 1, 1, 1)
    with swarm_of(tmp_path / "swarm", smollm2, {}) as swarm:
        coordinator = start_dying(swarm, 0, "disk: before piece fsync")
        port = int(parse_join(swarm.join).coordinator.rpartition(":")[2])
        refused = swarm.run("job", "submit", str(job))
        assert refused.returncode == 1
        assert coordinator.popen.wait(timeout=30) == 1
        assert "SW703: cannot store a piece" in coordinator.log_tail()
        start_dying(swarm, port, "")
        assert swarm.run_json("job", "list") == []
        swarm.run_json("job", "submit", str(job))


def settled_rounds(node: Process) -> list[int]:
    return [entry["round"] for entry in node.log_events() if entry.get("event") == "settled"]


def accepted_positions(data_dir: Path) -> list[int]:
    """Every position of the sample order that an accepted lease covers, in order, with repetitions."""
    with sqlite3.connect(f"file:{data_dir / 'coordinator.db'}?mode=ro", uri=True) as database:
        ranges = database.execute(
            "SELECT range_start, range_end FROM lease_range JOIN lease USING (job_id, lease_id) WHERE state = 'closed'"
        ).fetchall()
    return sorted(position for start, end in ranges for position in range(start, end))


@pytest.mark.parametrize("victim", ["half-a", "half-b"])
def test_node_killed_in_the_middle_of_a_round(smollm2: Path, tmp_path: Path, victim: str) -> None:
    """`half-a` leads its pipeline, `half-b` is a stage of it."""
    job = write_job(tmp_path / "job", "survivor", 2, 4, 1)
    nodes = {"half-a": "0:15", "half-b": "15:30", "whole": "0:30"}
    with swarm_of(tmp_path / "swarm", smollm2, nodes, coordinator=True) as swarm:
        swarm.run_json("job", "submit", str(job))
        by_name = {process.name: process for process in swarm.processes}
        by_name["half-a"].wait_log("inner_step", round=1)
        by_name[victim].kill()
        status = wait_finished(swarm, "survivor")
        assert [entry["round"] for entry in status["history"] if entry["phase"] == "committed"][-2:] == [1, 2]
        by_name["whole"].wait_log("settled", round=2)
        assert settled_rounds(by_name["whole"]) == [1, 2]
        # What the broken pipeline had leased was not counted, and nothing was counted twice.
        accepted = accepted_positions(swarm.root / "coordinator")
        assert len(accepted) == len(set(accepted)) == 2 * 4 * 2


def test_a_stage_that_dies_while_its_pipeline_trains_ahead(smollm2: Path, tmp_path: Path) -> None:
    """What was trained ahead is void; the stage comes back, and the round starts anew from the job's parameters."""
    job = write_job(tmp_path / "job", "ahead", 3, 2, 1, overlap=2)
    nodes = {"half-a": "0:15", "half-b": "15:30"}
    with swarm_of(tmp_path / "swarm", smollm2, nodes, coordinator=True) as swarm:
        swarm.run_json("job", "submit", str(job))
        lead, stage = (next(p for p in swarm.processes if p.name == name) for name in nodes)
        lead.wait_log("settled", round=1)
        stage.kill()
        swarm.node("half-b", "15:30").event()
        wait_finished(swarm, "ahead")
        lead.wait_log("settled", round=3)
        assert settled_rounds(lead) == [1, 2, 3]
        # Round 3 was begun ahead again.
        lead.wait_log("carried", round=3)
        accepted = accepted_positions(swarm.root / "coordinator")
        assert len(accepted) == len(set(accepted)) == 3 * 2 * 2
