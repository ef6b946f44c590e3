"""Kills a coordinator at each durable write of a round, and once more while it recovers.

Run by test_coordinator_crash as `python crash_runner.py FOLDER rounds`, or, with a kill at each kind
of commit, with `owner` (a job that is changed, paused, rewound and stopped) or another of JOBS.
Every run is a forked process of its own that dies by `os._exit` in the middle of the write, as by
SIGKILL: nothing is closed, flushed or rolled back. This parent has a single thread, so forking is
safe. Prints one JSON line for the fault-free run and one a killed run.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import sqlite3
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import structlog
from coordinator_sim import identity, job_spec, meddle, run_job

from coordinator.ports import CoordinatorSettings
from swarm.compress import FrameContext, compress_with_feedback, decode, encode
from swarm.config import CodecSettings
from swarm.wire.v1 import coordinator_pb2 as pb

KILLED = 137
SCHEDULE = {"rounds": 9, "inner_steps": 3, "batch_size": 2, "max_length": 16, "min_pipelines": 2}
JOBS = {
    "rounds": (job_spec(), None),
    "owner": (job_spec(schedule=SCHEDULE), meddle),
    # One pipeline is whole, which is a quorum, and the other one contributes two of its three inner steps.
    "partial": (job_spec(schedule=SCHEDULE | {"rounds": 2, "quorum": 0.5}), None),
    # In every round one pipeline is given up by its lead, and repaired with a fifth node.
    "repair": (job_spec(), None),
    # Scored after every round; ends early after the third, the second one being the best.
    "scored": (job_spec(schedule=SCHEDULE, eval={"data": "heldout.jsonl"}, early_stopping={"patience": 1}), None),
    # Every pipeline takes over in the next round what it held ahead.
    "overlap": (job_spec(schedule=SCHEDULE | {"rounds": 3, "overlap_steps": 2}), None),
    # What the job would have been without its owner, as far as that owner lets it go.
    "straight": (job_spec(schedule=SCHEDULE | {"rounds": 3}), None),
}
FIRST = "before commit PipelinesFormed + JobChanged"
LAST = "after commit RoundOpened + PipelinesFormed + JobChanged"


class Killer:
    """A durable point that ends the process at the `at`-th call, 0 for never, or at a name."""

    def __init__(self, at: int | str) -> None:
        self._at = at
        self._lock = threading.Lock()
        self.names: list[str] = []

    def __call__(self, name: str) -> None:
        with self._lock:
            self.names.append(name)
            if self._at in (len(self.names), name):
                os._exit(KILLED)


def in_child(work: Callable[[], None]) -> int:
    """Exit status of `work` in a process of its own."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(folder: Path, kill_at: int | str, job: str) -> None:
    """One life of the coordinator; what it acknowledged is on disk before anybody relies on it."""
    killer = Killer(kill_at)
    acknowledged = os.open(folder / "acknowledged", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(receipt: pb.Receipt) -> None:
        line = f"{receipt.round} {receipt.peer_id} {receipt.payload_sha256.hex()}\n"
        os.write(acknowledged, line.encode())

    # Nobody here dies of silence: a busy machine may stop all of them for a while.
    settings = CoordinatorSettings(durable_point=killer, silent_s=600.0, recovery_grace_s=600.0)
    spec, owner = JOBS[job]
    slow_lead = "c" if job == "partial" else ""
    # Of the two nodes with one span the first by peer id is placed, the other one is the spare.
    dead = min("de", key=lambda name: identity(name).peer_id) if job == "repair" else ""
    status = asyncio.run(asyncio.wait_for(run_job(folder / "data", spec, settings, note, owner, slow_lead, dead), 60))
    result = {"hashes": [entry.params_hash.hex() for entry in status.history], "names": killer.names}
    (folder / "result.json").write_text(json.dumps(result))


def finish(folder: Path, job: str) -> dict[str, object]:
    """Let the job end, and look at what the database says then."""
    assert in_child(lambda: run(folder, 0, job)) == 0, "the job did not finish"
    result: dict[str, object] = json.loads((folder / "result.json").read_text())
    database = sqlite3.connect(folder / "data" / "coordinator.db")
    accepted = {
        f"{number} {peer} {payload.hex()}"
        for number, peer, payload in database.execute(
            f"SELECT round, peer, payload FROM contribution WHERE verdict = {pb.VERDICT_ACCEPTED}"
        )
    }
    result["lost"] = sorted(set((folder / "acknowledged").read_text().splitlines()) - accepted)
    result["accepted"] = len(accepted)
    result["positions"] = sorted(
        database.execute("SELECT range_start, range_end FROM lease_range JOIN lease USING (job_id, lease_id)")
    )
    result["closed"] = sorted(
        database.execute(
            "SELECT range_start, range_end FROM lease_range JOIN lease USING (job_id, lease_id) WHERE state = 'closed'"
        )
    )
    result["log"] = [list(row) for row in database.execute("SELECT seq, kind FROM event ORDER BY seq")]
    result["best"] = list(database.execute("SELECT state, best_round, best_loss, stale FROM job").fetchone())
    result["spec"] = json.loads(database.execute("SELECT spec_json FROM job").fetchone()[0])
    database.close()
    shutil.rmtree(folder)
    return result


def by_name(root: Path, job: str, reference: str) -> None:
    """One run for each kind of commit that `job` makes, killed at its first; before them the `reference` job's."""
    straight, free = root / "straight", root / "free"
    straight.mkdir()
    print(json.dumps(finish(straight, reference)), flush=True)
    free.mkdir()
    names = finish(free, job)["names"]
    assert isinstance(names, list)
    for name in sorted({name for name in names if "commit " in name}):
        folder = root / f"killed-{name.replace(' ', '-')}"
        folder.mkdir()
        lives = [in_child(lambda folder=folder, name=name: run(folder, name, job))]
        print(json.dumps({"name": name, "lives": lives} | finish(folder, job)), flush=True)


def load_codec() -> None:
    """Compiled code is loaded at its first use: here once, rather than in each of the children."""
    update, context = {"0/w": np.ones(9, np.float32)}, FrameContext("warm", 1, bytes(32))
    compress_with_feedback(update, update, CodecSettings(density=0.5), context)
    decode(encode(update, CodecSettings(density=0.125), context), {"0/w": (9,)}, context)


def main(root: Path, scenario: str) -> None:
    load_codec()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    if scenario != "rounds":
        by_name(root, scenario, "straight" if scenario == "owner" else scenario)
        return
    free = root / "free"
    free.mkdir()
    fault_free = finish(free, "rounds")
    names = fault_free["names"]
    assert isinstance(names, list)
    print(json.dumps(fault_free), flush=True)
    for at in range(names.index(FIRST) + 1, names.index(LAST) + 2):
        folder = root / f"killed-{at}"
        folder.mkdir()
        lives = [in_child(lambda folder=folder, at=at: run(folder, at, "rounds"))]
        if at % 3 == 0:
            # And again a few writes into the recovery, at another distance each time.
            lives.append(in_child(lambda folder=folder, at=at: run(folder, 1 + at % 17, "rounds")))
        result = {"at": at, "name": names[at - 1], "lives": lives} | finish(folder, "rounds")
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
