"""What one job's rounds are made of: state and effects. Frozen values, no behaviour beyond lookup.

`round_events` has what may happen; `rounds` and `control` say how effects follow from it;
`storage` keeps the records; the driver turns events into effects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property

from coordinator.placement import Member


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


COUNTING = (Standing.ACTIVE, Standing.WHOLE, Standing.LATE)
"""Of pipelines of the open round that may still count, or would."""


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
    round_deadline_s: float | None
    """None: by what recent pipelines took."""
    min_pipelines: int
    fruitless_generations: int
    quorum: float = 1.0
    """Share of a round's pipelines; once they are whole, the rest has a grace."""
    inner_steps: int = 1
    eval_every: int = 0
    """Rounds from one held-out evaluation to the next; 0: none."""
    patience: int = 0
    """Evaluations without a better one that end the job; 0: none do."""
    min_delta: float = 0.0
    overlap_steps: int = 0
    """Inner steps of the next round that a pipeline does while its round is closed; 0: it waits."""


@dataclass(frozen=True)
class Settings:
    """A job file as it was changed while the job ran: what rounds take from it, and the whole of it."""

    rules: Rules
    spec_json: str
    text: str = field(default="", compare=False)
    """What changed, for the log; not kept beside it."""


@dataclass(frozen=True)
class Best:
    """The round with the best held-out loss, and how many evaluations came after it."""

    round: int
    loss: float
    stale: int


class OrderKind(StrEnum):
    PAUSE = "pause"
    STOP = "stop"


@dataclass(frozen=True)
class Order:
    """What the owner wants done as soon as the open round is closed."""

    kind: OrderKind
    reason: str


@dataclass(frozen=True, order=True)
class Held:
    """A durably stored contribution, by the hash of its payload."""

    peer: str
    payload: bytes
    inner_steps: int = 0


@dataclass(frozen=True)
class Pipeline:
    """`pipeline_id` counts up within a round, over its generations."""

    pipeline_id: int
    generation: int
    members: tuple[Member, ...]
    standing: Standing = Standing.ACTIVE
    held: tuple[Held, ...] = ()
    reason: str = ""
    took_s: float | None = None
    """From forming to whole, scaled to all inner steps; None if that is not known."""
    formed_s: float | None = None
    """Monotonic; not stored. Before the forming where it had done part of the round by then."""
    whole_s: float | None = None
    """When it became whole; monotonic, not stored."""
    repair: bool = False
    """Formed within a round, of the survivors of a pipeline that lost a node and idle ones."""

    def payload_of(self, peer: str) -> bytes | None:
        return next((held.payload for held in self.held if held.peer == peer), None)

    def has(self, peer: str) -> bool:
        return any(member.peer == peer for member in self.members)


@dataclass(frozen=True)
class RoundsState:
    """`began_s`, `wrap_s` and `deadline_s` are monotonic and not part of what is stored.

    Generations count up within a round, from `lineage` on: the highest generation of any round that
    was ever discarded, so that (round, generation) names one forming for good.
    """

    rules: Rules
    job: JobState
    reason: str
    round: int
    phase: Phase
    generation: int
    fruitless: int
    pipelines: tuple[Pipeline, ...]
    deadline_s: float | None = None
    order: Order | None = None
    next: Settings | None = None
    """Takes effect when pipelines are next formed."""
    lineage: int = 0
    recent_s: tuple[float, ...] = ()
    """What the newest accepted pipelines of committed rounds took, oldest first."""
    wrapping: bool = False
    """The open round asks its pipelines to contribute what they have."""
    scorer: int | None = None
    """The pipeline whose lead scores the round that is committed; the next one waits for it."""
    best: Best | None = None
    began_s: float | None = None
    wrap_s: float | None = None

    @property
    def alarm_s(self) -> float | None:
        """When time alone changes something."""
        return self.deadline_s if self.wrapping or self.wrap_s is None else self.wrap_s

    def stored(self) -> RoundsState:
        """Without what is not stored."""
        pipelines = tuple(replace(pipeline, formed_s=None, whole_s=None) for pipeline in self.pipelines)
        return replace(self, pipelines=pipelines, deadline_s=None, began_s=None, wrap_s=None)

    @property
    def committed(self) -> int:
        """The newest committed round."""
        return self.round if self.phase is Phase.COMMITTED else self.round - 1

    def pipeline(self, pipeline_id: int) -> Pipeline | None:
        return next((p for p in self.pipelines if p.pipeline_id == pipeline_id), None)

    def with_standing(self, *standings: Standing) -> tuple[Pipeline, ...]:
        return tuple(p for p in self.pipelines if p.standing in standings)

    def attempts(self) -> int:
        """Formings of the open round, repairs aside."""
        return len({p.generation for p in self.pipelines if not p.repair})

    def wasted_attempts(self) -> int:
        """Formings of the open round with a pipeline that sent all of its contributions, in vain."""
        return len({p.generation for p in self.with_standing(Standing.LOST) if len(p.held) == len(p.members)})

    def latest_attempt(self) -> tuple[Pipeline, ...]:
        """The pipelines since the last forming, repairs among them."""
        first = max((p.generation for p in self.pipelines if not p.repair), default=0)
        return tuple(p for p in self.pipelines if p.generation >= first)

    @cached_property
    def part_of(self) -> Mapping[str, Pipeline]:
        """By peer: the pipeline of the open round, of those that may still count, or would, that it is a member of."""
        counting = self.with_standing(*COUNTING)
        return {member.peer: pipeline for pipeline in counting for member in pipeline.members}

    def counting_peers(self) -> frozenset[str]:
        """Members of the open round's pipelines that may still count, or would."""
        return frozenset(self.part_of)

    def busy_peers(self) -> frozenset[str]:
        """Nodes this job occupies: those of its pipelines that may still count."""
        if self.job is not JobState.RUNNING:
            return frozenset()
        return self.counting_peers()


# --- effects: records (durable), then actions -------------------------------------------------


@dataclass(frozen=True)
class RoundOpened:
    round: int
    generation: int = 0


@dataclass(frozen=True)
class PipelinesFormed:
    """`continued`: (id, id in the round before) of those that go on with the lease they hold ahead.

    `ahead`: whether each gets a lease for the round after, too.
    """

    round: int
    generation: int
    pipelines: tuple[Pipeline, ...]
    continued: tuple[tuple[int, int], ...] = ()
    ahead: bool = False


@dataclass(frozen=True)
class ContributionHeld:
    round: int
    pipeline_id: int
    held: Held
    whole: bool
    """The pipeline is complete with it."""
    took_s: float | None = None


@dataclass(frozen=True)
class WrapUp:
    """From now on a pipeline may contribute fewer inner steps."""

    round: int


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
class RoundReopened:
    """Nothing that was frozen can be used; what was `late` is lost, too."""

    round: int
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
    order: Order | None = None


@dataclass(frozen=True)
class SettingsStored:
    """They wait until pipelines are next formed; `text` says what changed."""

    spec_json: str
    text: str


@dataclass(frozen=True)
class SettingsAdopted:
    spec_json: str


@dataclass(frozen=True)
class Rewound:
    """Every round after `round` is discarded: its results, its pipelines and its leases."""

    round: int
    lineage: int
    discarded: int
    """How many committed rounds."""
    best: Best | None = None
    """Of the rounds that stay."""


@dataclass(frozen=True)
class ScoringBegun:
    round: int
    pipeline_id: int


@dataclass(frozen=True)
class RoundScored:
    """`loss` is None if nobody could say it; `reason` says why then."""

    round: int
    loss: float | None
    tokens: int
    best: Best | None
    reason: str


Record = (
    RoundOpened
    | PipelinesFormed
    | ContributionHeld
    | WrapUp
    | PipelineLost
    | RoundFrozen
    | RoundReopened
    | RoundAggregated
    | RoundCommitted
    | JobChanged
    | SettingsStored
    | SettingsAdopted
    | Rewound
    | ScoringBegun
    | RoundScored
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
