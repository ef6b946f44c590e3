"""Kills a coordinator at each durable write of a round, and once more while it recovers.

Run by test_coordinator_crash as `python crash_runner.py FOLDER`. Every run is a forked process of
its own that dies by `os._exit` in the middle of the write, as by SIGKILL: nothing is closed,
flushed or rolled back. This parent has a single thread, so forking is safe. Prints one JSON line
for the fault-free run and one a killed run.
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
from coordinator_sim import job_spec, run_job

from coordinator.ports import CoordinatorSettings
from swarm.compress import FrameContext, compress_with_feedback, decode, encode
from swarm.config import CodecSettings
from swarm.wire.v1 import coordinator_pb2 as pb

KILLED = 137
SPEC = job_spec()
FIRST = "before commit PipelinesFormed + JobChanged"
LAST = "after commit RoundOpened + PipelinesFormed + JobChanged"


class Killer:
    """A durable point that ends the process at the `at`-th call, 0 for never."""

    def __init__(self, at: int) -> None:
        self._at = at
        self._lock = threading.Lock()
        self.names: list[str] = []

    def __call__(self, name: str) -> None:
        with self._lock:
            self.names.append(name)
            if len(self.names) == self._at:
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


def run(folder: Path, kill_at: int) -> None:
    """One life of the coordinator; what it acknowledged is on disk before anybody relies on it."""
    killer = Killer(kill_at)
    acknowledged = os.open(folder / "acknowledged", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(receipt: pb.Receipt) -> None:
        line = f"{receipt.round} {receipt.peer_id} {receipt.payload_sha256.hex()}\n"
        os.write(acknowledged, line.encode())

    # Nobody here dies of silence: a busy machine may stop all of them for a while.
    settings = CoordinatorSettings(durable_point=killer, silent_s=600.0, recovery_grace_s=600.0)
    status = asyncio.run(asyncio.wait_for(run_job(folder / "data", SPEC, settings, note), 60))
    result = {"hashes": [entry.params_hash.hex() for entry in status.history], "names": killer.names}
    (folder / "result.json").write_text(json.dumps(result))


def finish(folder: Path) -> dict[str, object]:
    """Let the job end, and look at what the database says then."""
    assert in_child(lambda: run(folder, 0)) == 0, "the job did not finish"
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
    database.close()
    shutil.rmtree(folder)
    return result


def load_codec() -> None:
    """Compiled code is loaded at its first use: here once, rather than in each of the children."""
    update, context = {"0/w": np.ones(9, np.float32)}, FrameContext("warm", 1, bytes(32))
    compress_with_feedback(update, update, CodecSettings(density=0.5), context)
    decode(encode(update, CodecSettings(density=0.125), context), {"0/w": (9,)}, context)


def main(root: Path) -> None:
    load_codec()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    free = root / "free"
    free.mkdir()
    fault_free = finish(free)
    names = fault_free["names"]
    assert isinstance(names, list)
    print(json.dumps(fault_free), flush=True)
    for at in range(names.index(FIRST) + 1, names.index(LAST) + 2):
        folder = root / f"killed-{at}"
        folder.mkdir()
        lives = [in_child(lambda folder=folder, at=at: run(folder, at))]
        if at % 3 == 0:
            # And again a few writes into the recovery, at another distance each time.
            lives.append(in_child(lambda folder=folder, at=at: run(folder, 1 + at % 17)))
        result = {"at": at, "name": names[at - 1], "lives": lives} | finish(folder)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
