"""One job's rounds as a pure state machine: `advance(state, event) -> (state, effects)`.

In: what happened (a placement, a contribution, a lost node, time) with monotonic seconds where
they matter. Out: the next state, and effects in the order in which they are to be performed.
Records are to be made durable, all of one step together, before any action is taken. Never
reads a clock, a random source or a disk.

A round goes OPEN → FROZEN → AGGREGATED → COMMITTED. It goes back only from FROZEN to OPEN, where
nothing that was held can be aggregated (its payloads are damaged, or gone); what can be is
aggregated without the rest. Its pipelines are fixed by
(round, generation). A pipeline counts whole or not at all: the round freezes once every pipeline
that is not lost is whole and at least one is, or at its deadline with what is whole. Once a quorum
is whole, or most of the time is gone, the round asks the others to contribute what they have, and
waits for them only a little longer. Without a
whole pipeline by then, or with all of them lost, the next generation is formed in the same
round; after `fruitless_generations` in a row without one contribution the job pauses, and
after as many whose contributions were all damaged before they were aggregated.
A member whose contribution is held may leave: its part of the work is done. A pipeline that loses a
node in the first half of a round is formed anew of its other nodes and idle ones where that is
possible, and trains from the start of the round; later, or without a replacement, the round goes on
without it. What an owner asks
for in between is in `control`.
"""

from __future__ import annotations

from dataclasses import replace

from coordinator.control import change, ordered, resumed, rewound
from coordinator.deadline import RECENT
from coordinator.overlap import continued, credited
from coordinator.placement import PipelinePlan
from coordinator.round_events import (
    Abandoned,
    AggregateDone,
    Change,
    CommitNow,
    Contribution,
    Event,
    NextRound,
    NodeLost,
    Offer,
    Pause,
    Resume,
    Rewind,
    Scored,
    Stop,
    Tick,
    Unusable,
)
from coordinator.round_model import (
    Aggregate,
    Answer,
    Commit,
    ContributionHeld,
    Effect,
    FormPipelines,
    Held,
    JobState,
    OpenNext,
    Phase,
    Pipeline,
    PipelinesFormed,
    Reply,
    RoundAggregated,
    RoundCommitted,
    RoundOpened,
    RoundsState,
    Rules,
    Standing,
    Step,
    WrapUp,
)
from coordinator.round_steps import (
    FORMING,
    adopt,
    changed,
    finish,
    freeze,
    graced,
    lose,
    obey,
    quorum_whole,
    reopen,
    rest,
    settle,
    swap,
    timed,
    waiting,
)
from coordinator.scoring import ask_next, begin_scoring, due, in_time, onward, scored

REPAIR_SHARE = 0.5
"""Of a round's time: what is lost later could not be trained again within the rest."""
_MOST_REPAIRS = 3


def begin(rules: Rules) -> Step:
    """A new job: round 1 is open and waits for its pipelines."""
    state = RoundsState(rules, JobState.WAITING, FORMING, 1, Phase.OPEN, 0, 0, ())
    return state, (RoundOpened(1), FormPipelines())


def recover(state: RoundsState, now_s: float) -> Step:
    """What to do with a state that was read back after a crash: go on where it stopped."""
    state = state.stored()
    if state.job in (JobState.PAUSED, JobState.FINISHED):
        return state, ()
    match state.phase:
        case Phase.FROZEN:
            return state, (Aggregate(state.round),)
        case Phase.AGGREGATED:
            return state, (Commit(state.round),)
        case Phase.COMMITTED if state.scorer is not None:
            return in_time(state, now_s), ()
        case Phase.COMMITTED:
            return state, (OpenNext(state.round + 1),)
        case Phase.OPEN:
            if state.job is JobState.WAITING:
                return state, (FormPipelines(),)
            # How much of the time had passed is not stored: the round gets its whole time again.
            return timed(state, now_s, state.attempts() - 1), ()


def advance(state: RoundsState, event: Event) -> Step:
    """One step. An event that does not fit the state changes nothing."""
    match event:
        case Offer():
            return _offered(state, event)
        case Contribution():
            return _contributed(state, event)
        case NodeLost():
            return _node_lost(state, event)
        case Abandoned():
            return _abandoned(state, event)
        case Tick():
            return _ticked(state, event)
        case AggregateDone():
            if state.phase is not Phase.FROZEN or event.round != state.round:
                return state, ()
            after = replace(state, phase=Phase.AGGREGATED)
            return after, (RoundAggregated(event.round), Commit(event.round))
        case Unusable():
            return _unusable(state, event)
        case CommitNow():
            return _committed(state, event)
        case Scored():
            return scored(state, event)
        case NextRound():
            return _next_round(state, event)
        case Pause() | Stop():
            return ordered(state, event)
        case Resume():
            return resumed(state, event)
        case Rewind():
            return rewound(state, event)
        case Change():
            return change(state, event)


def refusal(state: RoundsState, event: Contribution) -> Reply | None:
    """Why a contribution is not stored, or None where it is."""
    if not 1 <= event.round <= state.round:
        return Reply(Answer.REJECTED, f"round {event.round} is not open; round {state.round} is")
    if event.round < state.round:
        return Reply(Answer.LATE, f"round {event.round} froze without it; round {state.round} is open")
    pipeline = state.pipeline(event.pipeline_id)
    if pipeline is None or pipeline.generation != event.generation or not pipeline.has(event.peer):
        return Reply(
            Answer.REJECTED,
            f"the node is not in pipeline {event.pipeline_id}, generation {event.generation}, of round {event.round}",
        )
    stored = pipeline.payload_of(event.peer)
    if stored == event.payload:
        return Reply(Answer.DUPLICATE)
    if any(held.inner_steps != event.inner_steps for held in pipeline.held):
        return Reply(Answer.REJECTED, f"its pipeline contributed {pipeline.held[0].inner_steps} inner steps")
    if stored is not None:
        return Reply(Answer.CONFLICT, f"another contribution to round {event.round} is already stored")
    if pipeline.standing is Standing.LOST:
        return Reply(Answer.LATE, f"the pipeline was given up: {pipeline.reason}")
    if state.phase is not Phase.OPEN:
        return Reply(Answer.LATE, f"round {event.round} froze without it")
    return None


def _offered(state: RoundsState, event: Offer | NextRound, before: tuple[Pipeline, ...] = ()) -> Step:
    """`before`: accepted pipelines of the round before, which may have gone on."""
    if state.job is not JobState.WAITING or state.phase is not Phase.OPEN:
        return state, ()
    wanted = state.rules.min_pipelines
    if len(event.plans) < wanted:
        reason = event.missing
        if event.plans:
            reason = f"{len(event.plans)} of at least {wanted} pipelines can be formed: {event.missing}"
        if reason == state.reason:
            return state, ()
        return replace(state, reason=reason), (changed(replace(state, reason=reason)),)
    generation = state.generation + 1
    first = len(state.pipelines)
    formed = tuple(
        Pipeline(first + number, generation, plan.members, formed_s=event.now_s)
        for number, plan in enumerate(event.plans)
    )
    formed = credited(before, formed, state.rules)
    after = replace(
        state,
        job=JobState.RUNNING,
        reason="",
        generation=generation,
        pipelines=(*state.pipelines, *formed),
        wrapping=False,
    )
    after = timed(after, event.now_s, state.attempts())
    return after, (
        PipelinesFormed(state.round, generation, formed, continued(before, formed), _goes_ahead(state)),
        changed(after),
    )


def _goes_ahead(state: RoundsState) -> bool:
    """Whether the open round's pipelines may begin the next one."""
    return state.rules.overlap_steps > 0 and state.round < state.rules.rounds


def _contributed(state: RoundsState, event: Contribution) -> Step:
    reply = refusal(state, event)
    if reply is not None:
        return state, (reply,)
    held = Held(event.peer, event.payload, event.inner_steps)
    pipeline = state.pipeline(event.pipeline_id)
    assert pipeline is not None, "an unknown pipeline is refused above"
    together = tuple(sorted((*pipeline.held, held)))
    whole = len(together) == len(pipeline.members)
    standing = Standing.WHOLE if whole else Standing.ACTIVE
    took_s = None
    if whole and pipeline.formed_s is not None:
        share = event.inner_steps / state.rules.inner_steps if event.inner_steps else 1.0
        took_s = (event.now_s - pipeline.formed_s) / share
    whole_s = event.now_s if whole else None
    pipeline = replace(pipeline, held=together, standing=standing, took_s=took_s, whole_s=whole_s)
    after = swap(replace(state, fruitless=0), pipeline)
    records: tuple[Effect, ...] = (ContributionHeld(event.round, event.pipeline_id, held, whole, took_s),)
    if state.fruitless:
        records += (changed(after),)
    if whole and quorum_whole(after) and after.with_standing(Standing.ACTIVE):
        after, asked = _wrap_up(graced(after, event.now_s))
        records += asked
    after, effects = settle(after)
    return after, (*records, Reply(Answer.HELD), *effects)


def broken_by(state: RoundsState, peer: str) -> list[int]:
    """The pipelines that a node's loss breaks."""
    if state.phase is not Phase.OPEN:
        return []
    return [
        pipeline.pipeline_id
        for pipeline in state.with_standing(Standing.ACTIVE)
        if pipeline.has(peer) and pipeline.payload_of(peer) is None
    ]


def may_repair(state: RoundsState, now_s: float) -> bool:
    """Whether there is time to train anew what a pipeline loses now."""
    if state.began_s is None or state.deadline_s is None or state.wrapping:
        return False
    repairs = len({pipeline.generation for pipeline in state.latest_attempt() if pipeline.repair})
    in_time = now_s - state.began_s < REPAIR_SHARE * (state.deadline_s - state.began_s)
    return in_time and repairs < _MOST_REPAIRS


def _node_lost(state: RoundsState, event: NodeLost) -> Step:
    scorer = None if state.scorer is None else state.pipeline(state.scorer)
    if scorer is not None and scorer.has(event.peer):
        return ask_next(state, event.now_s, event.reason, event.absent)
    return _lost(state, broken_by(state, event.peer), event.reason, event.now_s, event.spares)


def _abandoned(state: RoundsState, event: Abandoned) -> Step:
    if state.scorer == event.pipeline_id and event.round == state.round:
        return ask_next(state, event.now_s, event.reason, event.absent)
    pipeline = state.pipeline(event.pipeline_id)
    if (
        state.phase is not Phase.OPEN
        or event.round != state.round
        or pipeline is None
        or pipeline.standing is not Standing.ACTIVE
        or (event.by and pipeline.payload_of(event.by) is not None)
    ):
        return state, ()
    return _lost(state, [event.pipeline_id], event.reason, event.now_s, event.spares)


def _ticked(state: RoundsState, event: Tick) -> Step:
    if state.scorer is not None and state.deadline_s is not None and event.now_s >= state.deadline_s:
        return ask_next(state, event.now_s, "no held-out loss was reported in time", event.absent)
    if state.phase is not Phase.OPEN or state.deadline_s is None:
        return state, ()
    if event.now_s < state.deadline_s:
        due = state.wrap_s is not None and event.now_s >= state.wrap_s
        return _wrap_up(state) if due else (state, ())
    if state.with_standing(Standing.WHOLE):
        return freeze(state)
    active = [pipeline.pipeline_id for pipeline in state.with_standing(Standing.ACTIVE)]
    time_s = state.deadline_s - (state.began_s or 0.0)
    return _lost(state, active, f"not whole within {time_s:g} s")


def _wrap_up(state: RoundsState) -> Step:
    if state.wrapping:
        return state, ()
    return replace(state, wrapping=True), (WrapUp(state.round),)


def _lost(
    state: RoundsState,
    pipeline_ids: list[int],
    reason: str,
    now_s: float = 0.0,
    spares: tuple[PipelinePlan, ...] = (),
) -> Step:
    """Repair what was lost if there is time, and others to go on with; else leave it out."""
    if not pipeline_ids:
        return state, ()
    repairable = may_repair(state, now_s)
    state, records = lose(state, pipeline_ids, reason)
    others = state.with_standing(Standing.ACTIVE, Standing.WHOLE)
    if spares and repairable and others:
        state, formed = _repair(state, spares[: len(pipeline_ids)], now_s)
        records += formed
    state, effects = settle(state)
    return state, (*records, *effects)


def _repair(state: RoundsState, spares: tuple[PipelinePlan, ...], now_s: float) -> Step:
    taken = state.counting_peers()
    # What was free when the spares were looked for may be taken by now.
    plans = [plan for plan in spares if not any(member.peer in taken for member in plan.members)]
    if not plans:
        return state, ()
    generation, first = state.generation + 1, len(state.pipelines)
    formed = tuple(
        Pipeline(first + number, generation, plan.members, formed_s=now_s, repair=True)
        for number, plan in enumerate(plans)
    )
    after = replace(state, generation=generation, pipelines=(*state.pipelines, *formed))
    return after, (PipelinesFormed(state.round, generation, formed, ahead=_goes_ahead(state)),)


def _unusable(state: RoundsState, event: Unusable) -> Step:
    if state.phase is not Phase.FROZEN or event.round != state.round:
        return state, ()
    frozen = {pipeline.pipeline_id for pipeline in state.with_standing(Standing.WHOLE)}
    dropped = [(pipeline_id, reason) for pipeline_id, reason in event.pipelines if pipeline_id in frozen]
    if not dropped:
        return state, ()
    records: tuple[Effect, ...] = ()
    for pipeline_id, reason in dropped:
        state, lost = lose(state, [pipeline_id], reason)
        records += lost
    if state.with_standing(Standing.WHOLE):
        return state, (*records, Aggregate(state.round))
    state, reopened = reopen(state)
    wasted = state.wasted_attempts()
    if state.order is not None:
        after, effects = obey(state)
    elif wasted >= state.rules.fruitless_generations:
        # Each attempt costs the nodes all its inner steps, and it is the coordinator's disk that fails them.
        after, effects = rest(
            state,
            f"nothing of round {state.round} could be aggregated in {wasted} attempts, the last one: {dropped[-1][1]};"
            " see to the coordinator's disk, then resume the job",
        )
    else:
        after, effects = waiting(state, f"pipelines are being formed again: {dropped[-1][1]}")
    return after, (*records, *reopened, *effects)


def _committed(state: RoundsState, event: CommitNow) -> Step:
    if state.phase is not Phase.AGGREGATED or event.round != state.round:
        return state, ()
    accepted = tuple(p.pipeline_id for p in state.with_standing(Standing.WHOLE))
    took_s = tuple(p.took_s for p in state.with_standing(Standing.WHOLE) if p.took_s is not None)
    recent_s = (*state.recent_s, *took_s)[-RECENT:]
    after, adopted = adopt(replace(state, phase=Phase.COMMITTED, recent_s=recent_s))
    if after.order is not None:
        after, effects = finish(after) if event.round >= after.rules.rounds else obey(after)
    elif due(after.rules, event.round):
        after, effects = begin_scoring(after, event.now_s, event.absent)
    else:
        after, effects = onward(after)
    return after, (RoundCommitted(event.round, accepted), *adopted, *effects)


def _next_round(state: RoundsState, event: NextRound) -> Step:
    if state.phase is not Phase.COMMITTED or state.job in (JobState.FINISHED, JobState.PAUSED):
        return state, ()
    if state.scorer is not None:
        return state, ()
    if state.round >= state.rules.rounds:
        return finish(state)
    opened = replace(
        state,
        job=JobState.WAITING,
        reason=FORMING,
        round=state.round + 1,
        phase=Phase.OPEN,
        generation=state.lineage,
        pipelines=(),
        wrapping=False,
        deadline_s=None,
    )
    overlaps = state.rules.overlap_steps > 0 and state.job is JobState.RUNNING
    before = state.with_standing(Standing.WHOLE) if overlaps else ()
    after, effects = _offered(opened, event, before)
    if after.job is JobState.RUNNING:
        return after, (RoundOpened(opened.round, opened.generation), *effects)
    return after, (RoundOpened(opened.round, opened.generation), changed(after))
