"""What can happen to one job's rounds. Frozen values; `now_s` is monotonic.

`coordinator.rounds` says what follows from each. `absent`: members of the round's pipelines that are not here, at
least not with their blocks; they are not asked for a score.
"""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.placement import PipelinePlan
from coordinator.round_model import Best, Settings


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
    inner_steps: int = 0


@dataclass(frozen=True)
class NodeLost:
    """`spares`: pipelines that the other nodes of those it breaks could form with idle ones."""

    now_s: float
    peer: str
    reason: str
    spares: tuple[PipelinePlan, ...] = ()
    absent: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Abandoned:
    """A member says that its pipeline cannot go on. `spares` as in `NodeLost`, without the node at fault."""

    now_s: float
    round: int
    pipeline_id: int
    reason: str
    spares: tuple[PipelinePlan, ...] = ()
    by: str = ""
    """The member, where nobody else is at fault: without effect once its contribution is held."""
    absent: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Tick:
    """Time passed: a round may have to ask for an end, or to freeze."""

    now_s: float
    absent: frozenset[str] = frozenset()


@dataclass(frozen=True)
class AggregateDone:
    round: int


@dataclass(frozen=True)
class Unusable:
    """What was frozen cannot be aggregated as it is: these pipelines, and why."""

    round: int
    pipelines: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class CommitNow:
    round: int
    now_s: float = 0.0
    absent: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Scored:
    """The held-out loss of the committed round, from the lead that was asked."""

    round: int
    loss: float
    tokens: int


@dataclass(frozen=True)
class NextRound:
    """Open the round after a committed one, with a placement as in `Offer`."""

    now_s: float
    plans: tuple[PipelinePlan, ...]
    missing: str


@dataclass(frozen=True)
class Pause:
    """By the owner: close the open round with what is whole, then rest."""

    reason: str


@dataclass(frozen=True)
class Stop:
    """By the owner: close the open round with what is whole, then end for good."""

    reason: str


@dataclass(frozen=True)
class Resume:
    """A paused job goes on; a pause that is only ordered is called off."""


@dataclass(frozen=True)
class Rewind:
    """A paused job goes on from the end of `round`.

    `generations` is the highest one in a later round; `recent_s` and `best` as they were then.
    """

    round: int
    generations: int
    recent_s: tuple[float, ...] = ()
    best: Best | None = None


@dataclass(frozen=True)
class Change:
    settings: Settings


Event = (
    Offer
    | Contribution
    | NodeLost
    | Abandoned
    | Tick
    | AggregateDone
    | Unusable
    | CommitNow
    | Scored
    | NextRound
    | Pause
    | Stop
    | Resume
    | Rewind
    | Change
)
