"""What a coordinator's database says of a job that has ended: whether every sample is accounted for.

Read from the tables alone, not by the coordinator's code, so that its mistakes would show. In: the file of a
coordinator that is not running, with one job in it. Out: `Accounts`. Changes nothing.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swarm.wire.v1 import coordinator_pb2 as pb


@dataclass(frozen=True)
class Accounts:
    rounds: int
    """Committed."""
    accepted: int
    """Positions of the sample order that an accepted pipeline trained."""
    twice: int
    """Of those, how many were accepted before."""
    outstanding: int
    """Positions below the highest accepted one that nobody's accepted lease covers."""
    outstanding_too_many: bool
    """More than one round can leave over."""
    miscounted: int
    """Accepted pipelines whose closed lease is not as long as their inner steps say."""
    epochs: float
    pipelines: float
    """Accepted, a round."""
    events: Counter[str]
    """Lines of the job's log, by kind."""

    def shown(self) -> dict[str, Any]:
        return {
            "rounds": self.rounds,
            "samples_accepted": self.accepted,
            "twice": self.twice,
            "outstanding": self.outstanding,
            "outstanding_too_many": self.outstanding_too_many,
            "miscounted": self.miscounted,
            "epochs": round(self.epochs, 2),
            "pipelines_a_round": round(self.pipelines, 2),
            "false_refusals": self.events["contribution_rejected"] + self.events["contribution_conflict"],
            "late": self.events["contribution_late"],
            "pipelines_lost": self.events["pipeline_lost"],
            "pauses": self.events["job_paused"],
        }


def accounts(path: Path, step_samples: int, round_samples: int, epoch_samples: int) -> Accounts:
    """`step_samples`: of an inner step; `round_samples`: of a round in which every pipeline is accepted."""
    database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        closed = database.execute(
            "SELECT round, pipeline_id, range_start, range_end FROM lease JOIN lease_range USING (job_id, lease_id)"
            " WHERE state = 'closed'"
        ).fetchall()
        trained = database.execute(
            "SELECT round, pipeline_id, min(inner_steps) FROM contribution WHERE verdict = ? GROUP BY 1, 2",
            (int(pb.VERDICT_ACCEPTED),),
        ).fetchall()
        (rounds,) = database.execute("SELECT count(*) FROM round WHERE phase = 'committed' AND round > 0").fetchone()
        events = Counter(dict(database.execute("SELECT kind, count(*) FROM event GROUP BY kind").fetchall()))
    finally:
        database.close()
    times = Counter(position for _, _, start, end in closed for position in range(start, end))
    lengths: Counter[tuple[int, int]] = Counter()
    for round, pipeline_id, start, end in closed:
        lengths[round, pipeline_id] += end - start
    said = {(round, pipeline_id): steps * step_samples for round, pipeline_id, steps in trained}
    outstanding = max(times, default=-1) + 1 - len(times)
    return Accounts(
        rounds=rounds,
        accepted=times.total(),
        twice=times.total() - len(times),
        outstanding=outstanding,
        outstanding_too_many=outstanding > round_samples,
        miscounted=sum(said.get(key) != lengths.get(key) for key in said.keys() | lengths.keys()),
        epochs=times.total() / epoch_samples,
        pipelines=len(said) / max(1, rounds),
        events=events,
    )
