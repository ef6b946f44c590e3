"""A trainer killed in the middle of a step (TRUST.md, 6): the job ends as if nothing had been."""

from __future__ import annotations

import random
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.processes import Process, Swarm, swarm_of
from tests.integration.test_crashes import wait_finished, write_job

ROUNDS, STEPS, BATCH = 2, 3, 2
SPANS = {"front": "0:15", "back": "15:30"}
# float32 both ways: what a job's parameters become does not depend on its id.
DENSE = "uplink: {kind: dense}\ndownlink: {kind: dense}\n"
LONGEST_STEP_S = 0.8


class Pair:
    """One pipeline of two nodes, of which one is killed and comes back, job after job."""

    def __init__(self, swarm: Swarm, jobs: Path) -> None:
        self.swarm, self._jobs = swarm, jobs
        self.by_name = {process.name: process for process in swarm.processes if process.name in SPANS}

    def submit(self, name: str) -> None:
        path = write_job(self._jobs, name, ROUNDS, STEPS, 1)
        with path.open("a") as file:
            file.write(DENSE)
        self.swarm.run_json("job", "submit", str(path))

    def hashes(self, name: str) -> list[str]:
        return [entry["params_hash"] for entry in wait_finished(self.swarm, name)["history"]]

    def kill_and_start(self, name: str) -> None:
        self.by_name[name].kill()
        self.by_name[name] = self.swarm.node(name, SPANS[name])

    def front_logs(self, event: str, job: str, **fields: object) -> None:
        process: Process = self.by_name["front"]
        process.wait_log(event, job=job, **fields)

    def positions(self, name: str) -> list[int]:
        """Of the job's sample order: those that an accepted lease covers, with repetitions."""
        path = self.swarm.root / "coordinator" / "coordinator.db"
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
            ranges = database.execute(
                "SELECT range_start, range_end FROM lease_range JOIN lease USING (job_id, lease_id)"
                " JOIN job USING (job_id) WHERE lease.state = 'closed' AND name = ?",
                (name,),
            ).fetchall()
        return sorted(position for start, end in ranges for position in range(start, end))


@pytest.fixture(scope="module")
def pair(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    root = tmp_path_factory.mktemp("killed")
    with swarm_of(root / "swarm", smollm2, SPANS, coordinator=True) as swarm:
        yield Pair(swarm, root / "jobs")


@pytest.fixture(scope="module")
def undisturbed(pair: Pair) -> list[str]:
    pair.submit("undisturbed")
    return pair.hashes("undisturbed")


@pytest.mark.faults
def test_a_trainer_killed_in_the_middle_of_a_step(pair: Pair, undisturbed: list[str], seed: int) -> None:
    """A seed varies who dies, the lead or its stage, after which step, and how far into the next one."""
    chance = random.Random(seed)
    name, victim = f"killed-{seed}", ("front", "back")[seed % 2]
    round, step = chance.randint(1, ROUNDS), chance.randint(1, STEPS)
    pair.submit(name)
    pair.front_logs("inner_step", name, round=round, step=f"{step}/{STEPS}")
    time.sleep(chance.uniform(0, LONGEST_STEP_S))
    pair.kill_and_start(victim)
    assert pair.hashes(name) == undisturbed
    assert pair.positions(name) == list(range(ROUNDS * STEPS * BATCH))


def test_a_stage_killed_before_its_contribution_is_held(pair: Pair, undisturbed: list[str]) -> None:
    """TRUST.md, 7 and 8: its lead does not call it again in that round; it goes on by itself, before any deadline."""
    swarm, coordinator = pair.swarm, next(p for p in pair.swarm.processes if p.name == "coordinator")
    pair.submit("held")
    pair.front_logs("inner_step", "held", round=1, step=f"{STEPS - 1}/{STEPS}")
    coordinator.popen.send_signal(signal.SIGSTOP)  # whatever the stage sends now stays unanswered
    try:
        wait_for_file(swarm.root / "back" / "jobs", "*/pending.safetensors")
        pair.by_name["back"].kill()
    finally:
        coordinator.popen.send_signal(signal.SIGCONT)
    pair.by_name["back"] = swarm.node("back", SPANS["back"])
    pair.by_name["back"].wait_log("contribution_resumed", round=1)
    assert pair.hashes("held") == undisturbed
    history = swarm.run_json("job", "status", "held")["history"]
    assert [entry["round"] for entry in history if entry["phase"] == "committed"][-ROUNDS:] == [1, 2]
    assert pair.positions("held") == list(range(ROUNDS * STEPS * BATCH))


def wait_for_file(folder: Path, pattern: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not any(folder.glob(pattern)):
        assert time.monotonic() < deadline, f"no {pattern} in {folder}"
        time.sleep(0.02)
