"""What one job's rounds are made of: state, events and effects. Frozen values, no behaviour beyond lookup.

`coordinator.rounds` says what they mean and how they follow from one another; `storage` keeps
the records; the driver turns events into effects.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from coordinator.placement import Member, PipelinePlan


class JobState(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    PAUSED = "paused"
    FINISHED = "finished"


class Phase(StrEnum):
    OPEN = "open"
    FROZEN = "frozen"
    AGGREGATED = "aggregated"
    COMMITTED = "committed"


class Standing(StrEnum):
    ACTIVE = "active"
    WHOLE = "whole"
    LATE = "late"  # the round froze without it
    LOST = "lost"


class Answer(StrEnum):
    """What becomes of a contribution."""

    HELD = "held"
    DUPLICATE = "duplicate"
    CONFLICT = "conflict"
    LATE = "late"
    REJECTED = "rejected"


@dataclass(frozen=True)
class Rules:
    """What the job's file says about its rounds."""

    rounds: int
    round_deadline_s: float
    min_pipelines: int
    fruitless_generations: int


@dataclass(frozen=True, order=True)
class Held:
    """A durably stored contribution, by the hash of its payload."""

    peer: str
    payload: bytes


@dataclass(frozen=True)
class Pipeline:
    """`pipeline_id` counts up within a round, over its generations."""

    pipeline_id: int
    generation: int
    members: tuple[Member, ...]
    standing: Standing = Standing.ACTIVE
    held: tuple[Held, ...] = ()
    reason: str = ""

    def payload_of(self, peer: str) -> bytes | None:
        return next((held.payload for held in self.held if held.peer == peer), None)

    def has(self, peer: str) -> bool:
        return any(member.peer == peer for member in self.members)


@dataclass(frozen=True)
class RoundsState:
    """`deadline_s` is monotonic and is not part of what is stored."""

    rules: Rules
    job: JobState
    reason: str
    round: int
    phase: Phase
    generation: int
    fruitless: int
    pipelines: tuple[Pipeline, ...]
    deadline_s: float | None = None

    def pipeline(self, pipeline_id: int) -> Pipeline | None:
        return next((p for p in self.pipelines if p.pipeline_id == pipeline_id), None)

    def with_standing(self, *standings: Standing) -> tuple[Pipeline, ...]:
        return tuple(p for p in self.pipelines if p.standing in standings)

    def busy_peers(self) -> frozenset[str]:
        """Nodes this job occupies: those of its pipelines that may still count."""
        if self.job is not JobState.RUNNING:
            return frozenset()
        counting = self.with_standing(Standing.ACTIVE, Standing.WHOLE, Standing.LATE)
        return frozenset(member.peer for pipeline in counting for member in pipeline.members)


# --- events: what happened; `now_s` is monotonic ---------------------------------------------


@dataclass(frozen=True)
class Offer:
    """A placement of the idle nodes; `missing` says what one more pipeline would need."""

    now_s: float
    plans: tuple[PipelinePlan, ...]
    missing: str


@dataclass(frozen=True)
class Contribution:
    """A payload that was checked on its own (hash, shapes, finite values)."""

    now_s: float
    round: int
    generation: int
    pipeline_id: int
    peer: str
    payload: bytes


@dataclass(frozen=True)
class NodeLost:
    now_s: float
    peer: str
    reason: str


@dataclass(frozen=True)
class Abandoned:
    """A member says that its pipeline cannot go on."""

    now_s: float
    round: int
    pipeline_id: int
    reason: str


@dataclass(frozen=True)
class Tick:
    """Time passed; only the deadline looks at it."""

    now_s: float


@dataclass(frozen=True)
class AggregateDone:
    round: int


@dataclass(frozen=True)
class CommitNow:
    round: int


@dataclass(frozen=True)
class NextRound:
    """Open the round after a committed one, with a placement as in `Offer`."""

    now_s: float
    plans: tuple[PipelinePlan, ...]
    missing: str


@dataclass(frozen=True)
class Resume:
    pass


Event = Offer | Contribution | NodeLost | Abandoned | Tick | AggregateDone | CommitNow | NextRound | Resume

# --- effects: records (durable), then actions -------------------------------------------------


@dataclass(frozen=True)
class RoundOpened:
    round: int


@dataclass(frozen=True)
class PipelinesFormed:
    round: int
    generation: int
    pipelines: tuple[Pipeline, ...]


@dataclass(frozen=True)
class ContributionHeld:
    round: int
    pipeline_id: int
    held: Held
    whole: bool
    """The pipeline is complete with it."""


@dataclass(frozen=True)
class PipelineLost:
    """Its lease is void and what it sent does not count."""

    round: int
    pipeline_id: int
    reason: str


@dataclass(frozen=True)
class RoundFrozen:
    """The set is fixed: `accepted` counts; `late` does not, and its leases are void."""

    round: int
    accepted: tuple[int, ...]
    late: tuple[int, ...]


@dataclass(frozen=True)
class RoundAggregated:
    round: int


@dataclass(frozen=True)
class RoundCommitted:
    """The accepted pipelines' receipts become final and their leases close."""

    round: int
    accepted: tuple[int, ...]


@dataclass(frozen=True)
class JobChanged:
    state: JobState
    reason: str
    fruitless: int


Record = (
    RoundOpened
    | PipelinesFormed
    | ContributionHeld
    | PipelineLost
    | RoundFrozen
    | RoundAggregated
    | RoundCommitted
    | JobChanged
)


@dataclass(frozen=True)
class Reply:
    """To the sender of the contribution that was the event."""

    answer: Answer
    reason: str = ""


@dataclass(frozen=True)
class FormPipelines:
    """Place the idle nodes and answer with `Offer`, now and whenever the nodes change."""


@dataclass(frozen=True)
class Aggregate:
    round: int


@dataclass(frozen=True)
class Commit:
    round: int


@dataclass(frozen=True)
class OpenNext:
    round: int


Action = Reply | FormPipelines | Aggregate | Commit | OpenNext
Effect = Record | Action
Step = tuple[RoundsState, tuple[Effect, ...]]
