"""The steps that several events lead to: forming again, losing pipelines, freezing, ending. Pure.

Each takes a state and gives the next one with its effects, records first; `rounds` and `control`
put them together.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from coordinator.deadline import WRAP_UP_SHARE, grace_s, limit_s, quorum_of
from coordinator.round_model import (
    Aggregate,
    Effect,
    FormPipelines,
    JobChanged,
    JobState,
    OrderKind,
    Phase,
    Pipeline,
    PipelineLost,
    RoundFrozen,
    RoundReopened,
    RoundsState,
    SettingsAdopted,
    Standing,
    Step,
)

FORMING = "pipelines are being formed"


def swap(state: RoundsState, pipeline: Pipeline) -> RoundsState:
    return replace(
        state,
        pipelines=tuple(pipeline if p.pipeline_id == pipeline.pipeline_id else p for p in state.pipelines),
    )


def changed(state: RoundsState) -> JobChanged:
    """The job's row as the state has it."""
    return JobChanged(state.job, state.reason, state.fruitless, state.order)


def adopt(state: RoundsState) -> Step:
    """No pipeline trains: changed settings take effect."""
    if state.next is None:
        return state, ()
    after = replace(state, rules=state.next.rules, next=None)
    return after, (SettingsAdopted(state.next.spec_json),)


def timed(state: RoundsState, now_s: float, attempt: int) -> RoundsState:
    """The open round's time begins, or begins anew after a restart."""
    time_s = limit_s(state.rules.round_deadline_s, state.recent_s, attempt)
    state = replace(state, began_s=now_s, wrap_s=now_s + WRAP_UP_SHARE * time_s, deadline_s=now_s + time_s)
    return graced(state, now_s)


def untimed(state: RoundsState) -> RoundsState:
    return replace(state, began_s=None, wrap_s=None, deadline_s=None)


def graced(state: RoundsState, now_s: float) -> RoundsState:
    """With a quorum whole, what is left of the time is at most the grace."""
    if not quorum_whole(state) or state.deadline_s is None:
        return state
    took_s = [p.took_s for p in state.with_standing(Standing.WHOLE) if p.took_s is not None]
    return replace(state, deadline_s=min(state.deadline_s, now_s + grace_s(took_s)))


def quorum_whole(state: RoundsState) -> bool:
    # A repair stands for the pipeline it replaces.
    formed = sum(not pipeline.repair for pipeline in state.latest_attempt())
    return len(state.with_standing(Standing.WHOLE)) >= quorum_of(state.rules.quorum, formed)


def waiting(state: RoundsState, reason: str) -> Step:
    """The open round has no pipelines and wants some."""
    state, adopted = adopt(state)
    after = replace(untimed(state), job=JobState.WAITING, reason=reason)
    return after, (*adopted, changed(after), FormPipelines())


def lose(state: RoundsState, pipeline_ids: Iterable[int], reason: str) -> Step:
    """Their work does not count. Nothing else follows; see `settle`."""
    records: list[Effect] = []
    for pipeline_id in pipeline_ids:
        pipeline = state.pipeline(pipeline_id)
        assert pipeline is not None, "ids come from the state"
        state = swap(state, replace(pipeline, standing=Standing.LOST, reason=reason))
        records.append(PipelineLost(state.round, pipeline_id, reason))
    return state, tuple(records)


def settle(state: RoundsState) -> Step:
    """After a pipeline became whole or was lost: freeze, form again, pause, or go on as before."""
    if state.with_standing(Standing.ACTIVE):
        return state, ()
    if state.with_standing(Standing.WHOLE):
        return freeze(state)
    attempt = state.latest_attempt()
    reason = attempt[-1].reason
    fruitless = 0 if any(p.held for p in attempt) else state.fruitless + 1
    state = replace(state, fruitless=fruitless)
    if fruitless >= state.rules.fruitless_generations:
        reason = (
            f"round {state.round} brought no contribution in {fruitless} attempts, the last one: {reason};"
            " see to the nodes, then resume the job"
        )
        return rest(state, reason)
    return waiting(state, f"pipelines are being formed again: {reason}")


def rest(state: RoundsState, reason: str) -> Step:
    after = replace(untimed(state), job=JobState.PAUSED, reason=reason, order=None)
    return after, (changed(after),)


def finish(state: RoundsState, reason: str = "") -> Step:
    after = replace(untimed(state), job=JobState.FINISHED, reason=reason, order=None, next=None)
    return after, (changed(after),)


def obey(state: RoundsState) -> Step:
    """No pipeline trains and the round is closed, or empty: do what was ordered."""
    assert state.order is not None, "an order is given"
    if state.order.kind is OrderKind.STOP:
        return finish(state, state.order.reason)
    return rest(state, state.order.reason)


def freeze(state: RoundsState) -> Step:
    accepted = state.with_standing(Standing.WHOLE)
    late = state.with_standing(Standing.ACTIVE)
    for pipeline in late:
        state = swap(
            state,
            replace(pipeline, standing=Standing.LATE, reason=f"not whole when round {state.round} froze"),
        )
    state = replace(untimed(state), phase=Phase.FROZEN)
    frozen = RoundFrozen(state.round, tuple(p.pipeline_id for p in accepted), tuple(p.pipeline_id for p in late))
    return state, (frozen, Aggregate(state.round))


def reopen(state: RoundsState) -> Step:
    """No pipeline of the frozen round is left: it is open, and none of an earlier forming may still count."""
    late = state.with_standing(Standing.LATE)
    for pipeline in late:
        state = swap(state, replace(pipeline, standing=Standing.LOST))
    record = RoundReopened(state.round, tuple(pipeline.pipeline_id for pipeline in late))
    return replace(state, phase=Phase.OPEN), (record,)
