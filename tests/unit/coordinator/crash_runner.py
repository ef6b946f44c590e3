"""Kills a coordinator at each durable write of a round, and once more while it recovers.

Run by test_coordinator_crash as `python crash_runner.py FOLDER rounds SEED`, or, with a kill at each kind
of commit, with `owner` (a job that is changed, paused, rewound and stopped) or another of JOBS. With `fsync`
the disk fails at each of these points instead: from there on every fsync of the process is an error.
Every run is a forked process of its own that dies by SIGKILL in the middle of the write: nothing is closed,
flushed or rolled back. This parent has a single thread, so forking is safe. Prints one JSON line for the
fault-free run and one a killed run. A seed stands for other nodes (so another order of contributions), other
cuts, other parameters and samples, and other places of the second kill.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import shutil
import signal
import sqlite3
import sys
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from coordinator_sim import identity, job_spec, meddle, run_job
from failing_fsync import fail_every_fsync

from coordinator.ports import CoordinatorSettings
from swarm.compress import FrameContext, compress_with_feedback, decode, encode
from swarm.config import CodecSettings
from swarm.errors import SyncFailed
from swarm.ids import Span
from swarm.wire.v1 import coordinator_pb2 as pb

KILLED = -signal.SIGKILL
STOPPED = 3
"""Exit status of a coordinator that stopped by itself, because the disk failed."""
SCHEDULE: dict[str, Any] = {"rounds": 9, "inner_steps": 3, "batch_size": 2, "max_length": 16, "min_pipelines": 2}
TWO_ROUNDS = SCHEDULE | {"rounds": 2}
JOBS: dict[str, tuple[dict[str, Any], Any]] = {
    "rounds": ({"schedule": TWO_ROUNDS}, None),
    "owner": ({"schedule": SCHEDULE}, meddle),
    # One pipeline is whole, which is a quorum, and the other one contributes two of its three inner steps.
    "partial": ({"schedule": TWO_ROUNDS | {"quorum": 0.5}}, None),
    # In every round one pipeline is given up by its lead, and repaired with a fifth node.
    "repair": ({"schedule": TWO_ROUNDS}, None),
    # Scored after every round; ends early after the third, the second one being the best.
    "scored": (
        {"schedule": SCHEDULE, "eval": {"data": "heldout.jsonl"}, "early_stopping": {"patience": 1}},
        None,
    ),
    # Every pipeline takes over in the next round what it held ahead.
    "overlap": ({"schedule": SCHEDULE | {"rounds": 3, "overlap_steps": 2}}, None),
    # What the job would have been without its owner, as far as that owner lets it go.
    "straight": ({"schedule": SCHEDULE | {"rounds": 3}}, None),
}
FIRST = "before commit PipelinesFormed + JobChanged"
LAST = "after commit RoundOpened + PipelinesFormed + JobChanged"
_MOST_AT_ONCE = 4


class Strike:
    """A durable point that does `strike` at the `at`-th call, 0 for never, or at a name's `nth` time."""

    def __init__(self, at: int | str, nth: int, strike: Callable[[], None]) -> None:
        self._at, self._nth, self._strike = at, nth, strike
        self._lock = threading.Lock()
        self.names: list[str] = []

    def __call__(self, name: str) -> None:
        with self._lock:
            self.names.append(name)
            if self._at == len(self.names) or (self._at == name and self.names.count(name) == self._nth):
                self._strike()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_child(work: Callable[[], None]) -> int:
    """Exit status of `work` in a process of its own; of a signal its negative number."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except SyncFailed:
            os._exit(STOPPED)
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@dataclass(frozen=True)
class Case:
    """A job and its nodes, as a seed has them."""

    job: str
    seed: int

    @property
    def spans(self) -> list[tuple[str, Span]]:
        chance = random.Random(self.seed)
        cut, other = (2, 2) if self.seed == 0 else (chance.randint(1, 3), chance.randint(1, 3))
        pairs = [[("a", Span(0, cut)), ("b", Span(cut, 4))], [("c", Span(0, other)), ("d", Span(other, 4))]]
        if self.job == "repair":
            # The dead node's blocks are those of the spare.
            pairs = [[("a", Span(0, 2)), ("b", Span(2, 4))], [("c", Span(0, 2)), ("d", Span(1, 4)), ("e", Span(1, 4))]]
        elif self.seed % 2 and self.job == "rounds":
            pairs.append([("f", Span(0, 4))])
        named = [(f"{name}{self.seed}", span) for pair in pairs for name, span in pair]
        chance.shuffle(named)
        return named

    @property
    def spec(self) -> str:
        sections, _ = JOBS[self.job]
        schedule = sections["schedule"] | {"seed": self.seed}
        if self.seed % 2 and self.job == "rounds":
            schedule |= {"min_pipelines": 3}
        return job_spec(**(sections | {"schedule": schedule}))

    @property
    def slow_lead(self) -> str:
        return f"c{self.seed}" if self.job == "partial" else ""

    @property
    def dead(self) -> str:
        # Of the two nodes with one span the first by peer id is placed, the other one is the spare.
        names = (f"d{self.seed}", f"e{self.seed}")
        return min(names, key=lambda name: identity(name).peer_id) if self.job == "repair" else ""


def run(folder: Path, case: Case, at: int | str = 0, nth: int = 1, strike: Callable[[], None] = die) -> None:
    """One life of the coordinator; what it acknowledged is on disk before anybody relies on it."""
    point = Strike(at, nth, strike)
    acknowledged = os.open(folder / "acknowledged", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(receipt: pb.Receipt) -> None:
        line = f"{receipt.round} {receipt.peer_id} {receipt.payload_sha256.hex()}\n"
        os.write(acknowledged, line.encode())

    # Nobody here dies of silence: a busy machine may stop all of them for a while.
    settings = CoordinatorSettings(durable_point=point, silent_s=600.0, recovery_grace_s=600.0)
    _, owner = JOBS[case.job]
    job = run_job(folder / "data", case.spec, settings, note, owner, case.slow_lead, case.dead, case.spans)
    status = asyncio.run(_within(60, job))
    result = {"hashes": [entry.params_hash.hex() for entry in status.history], "names": point.names}
    (folder / "result.json").write_text(json.dumps(result))


async def _within(limit_s: float, job: Coroutine[Any, Any, pb.JobStatus]) -> pb.JobStatus:
    """What the job returns. If it does not end, say what everybody waits for."""
    task = asyncio.ensure_future(job)
    done, _ = await asyncio.wait({task}, timeout=limit_s)
    if not done:
        waiting = [frame for each in asyncio.all_tasks() for frame in each.get_stack(limit=1)]
        places = [f"{frame.f_code.co_qualname}, line {frame.f_lineno}" for frame in waiting]
        raise TimeoutError(f"the job did not end within {limit_s:g} s; waiting: {'; '.join(sorted(places))}")
    return task.result()


def finish(folder: Path, case: Case) -> dict[str, Any]:
    """Let the job end, and look at what the database says then."""
    assert in_child(lambda: run(folder, case)) == 0, "the job did not finish"
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
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


def side_by_side(root: Path, works: Sequence[Callable[[], dict[str, Any]]]) -> None:
    """Print what each of `works` returns, in their order; as many processes as there are cores do them."""
    processes = min(len(os.sched_getaffinity(0)), _MOST_AT_ONCE)

    def share(first: int) -> None:
        lines = [json.dumps(work()) for work in works[first::processes]]
        (root / f"share-{first}").write_text("\n".join(lines))

    children = []
    for first in range(processes):
        child = os.fork()
        if child == 0:
            os._exit(in_child(lambda first=first: share(first)))
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * processes
    shares = [(root / f"share-{first}").read_text().splitlines() for first in range(processes)]
    for number in range(len(works)):
        print(shares[number % processes][number // processes], flush=True)


def by_name(root: Path, case: Case, reference: str) -> None:
    """One run for each kind of commit that the job makes, killed at one of them; before them the `reference` job's."""
    chance = random.Random(case.seed)
    straight, free = root / "straight", root / "free"
    straight.mkdir()
    print(json.dumps(finish(straight, Case(reference, case.seed))), flush=True)
    free.mkdir()
    names = finish(free, case)["names"]

    def one(name: str, nth: int) -> dict[str, Any]:
        folder = root / f"killed-{name.replace(' ', '-')}"
        folder.mkdir()
        lives = [in_child(lambda: run(folder, case, name, nth))]
        return {"name": f"{name}, time {nth}", "lives": lives} | finish(folder, case)

    commits = sorted({name for name in names if "commit " in name})
    times = [chance.randint(1, names.count(name)) if case.seed else 1 for name in commits]
    side_by_side(root, [partial(one, name, nth) for name, nth in zip(commits, times, strict=True)])


def at_every_write(root: Path, case: Case, strike: Callable[[], None], recovery: bool) -> None:
    """One run for each durable point from the first forming to the next round's; `recovery`: often killed again."""
    chance = random.Random(case.seed)
    free = root / "free"
    free.mkdir()
    fault_free = finish(free, case)
    names = fault_free["names"]
    print(json.dumps(fault_free), flush=True)

    def one(at: int, again: int) -> dict[str, Any]:
        folder = root / f"killed-{at}"
        folder.mkdir()
        lives = [in_child(lambda: run(folder, case, at, strike=strike))]
        if recovery and (at + case.seed) % 3 == 0:
            # And again a few writes into the recovery, at another distance each time.
            lives.append(in_child(lambda: run(folder, case, again)))
        return {"at": at, "name": names[at - 1], "lives": lives} | finish(folder, case)

    every = range(names.index(FIRST) + 1, names.index(LAST) + 2)
    points = [at for at in every if strike is die or "before" in names[at - 1]]
    side_by_side(root, [partial(one, at, chance.randint(1, 20)) for at in points])


def load_codec() -> None:
    """Compiled code is loaded at its first use: here once, rather than in each of the children."""
    update, context = {"0/w": np.ones(9, np.float32)}, FrameContext("warm", 1, bytes(32))
    compress_with_feedback(update, update, CodecSettings(density=0.5), context)
    decode(encode(update, CodecSettings(density=0.125), context), {"0/w": (9,)}, context)


def main(root: Path, scenario: str, seed: int) -> None:
    load_codec()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    match scenario:
        case "rounds":
            at_every_write(root, Case("rounds", seed), die, recovery=True)
        case "fsync":
            at_every_write(root, Case("rounds", seed), fail_every_fsync, recovery=False)
        case "owner":
            by_name(root, Case("owner", seed), "straight")
        case _:
            by_name(root, Case(scenario, seed), scenario)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
