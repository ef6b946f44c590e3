"""What an owner may ask of a running job: pause, stop, resume, rewind, change. Pure.

A round that trains is closed first: the pipelines that are whole by then count and are committed,
the others are void and their samples free. Only then does the job rest or end, so that a pause
costs no more than the work under way. A frozen round that cannot be aggregated is given up for an order; one that
waits for a full disk or a store that is away is not. Rewinding discards the rounds after a committed one for
good. Changed settings wait until no pipeline trains. An event that does not fit changes nothing.
"""

from __future__ import annotations

from dataclasses import replace

from coordinator.round_events import Change, Pause, Resume, Rewind, Stop
from coordinator.round_model import (
    FormPipelines,
    JobState,
    OpenNext,
    Order,
    OrderKind,
    Phase,
    Rewound,
    RoundOpened,
    RoundsState,
    SettingsAdopted,
    SettingsStored,
    Standing,
    Step,
)
from coordinator.round_steps import FORMING, adopt, changed, freeze, lose, obey, waiting
from coordinator.scoring import without_score


def ordered(state: RoundsState, event: Pause | Stop) -> Step:
    """Close the round, then rest or end."""
    kind = OrderKind.STOP if isinstance(event, Stop) else OrderKind.PAUSE
    if state.job is JobState.FINISHED or (kind is OrderKind.PAUSE and state.job is JobState.PAUSED):
        return state, ()
    if state.order is not None and (kind is OrderKind.PAUSE or state.order.kind is OrderKind.STOP):
        return state, ()
    state = replace(state, order=Order(kind, event.reason))
    if state.phase in (Phase.FROZEN, Phase.AGGREGATED):
        return state, (changed(state),)
    lost = [pipeline.pipeline_id for pipeline in state.with_standing(Standing.ACTIVE)]
    state, records = lose(state, lost, event.reason) if state.phase is Phase.OPEN else (state, ())
    if state.phase is Phase.OPEN and state.with_standing(Standing.WHOLE):
        after, effects = freeze(state)
        return after, (*records, changed(after), *effects)
    state, unscored = without_score(state, event.reason)
    after, effects = obey(state)
    return after, (*records, *unscored, *effects)


def resumed(state: RoundsState, event: Resume) -> Step:
    if state.order is not None and state.order.kind is OrderKind.PAUSE:
        after = replace(state, order=None)
        return after, (changed(after),)
    if state.job is not JobState.PAUSED:
        return state, ()
    state = replace(state, fruitless=0)
    if state.phase is Phase.OPEN:
        return waiting(state, FORMING)
    after, adopted = adopt(replace(state, job=JobState.WAITING, reason=FORMING))
    return after, (*adopted, changed(after), OpenNext(after.round + 1))


def rewound(state: RoundsState, event: Rewind) -> Step:
    if state.job is not JobState.PAUSED or not 0 <= event.round < state.committed:
        return state, ()
    lineage = max(state.lineage, event.generations)
    state, adopted = adopt(state)
    after = replace(
        state,
        job=JobState.WAITING,
        reason=FORMING,
        round=event.round + 1,
        phase=Phase.OPEN,
        generation=lineage,
        lineage=lineage,
        fruitless=0,
        pipelines=(),
        recent_s=event.recent_s,
        best=event.best,
        wrapping=False,
        deadline_s=None,
    )
    return after, (
        *adopted,
        Rewound(event.round, lineage, state.committed - event.round, event.best),
        RoundOpened(after.round, lineage),
        changed(after),
        FormPipelines(),
    )


def change(state: RoundsState, event: Change) -> Step:
    """At once where no pipeline trains; else when pipelines are next formed."""
    if state.job is JobState.FINISHED:
        return state, ()
    trains = state.job is JobState.RUNNING and state.phase is not Phase.COMMITTED
    stored = SettingsStored(event.settings.spec_json, event.settings.text)
    if trains:
        return replace(state, next=event.settings), (stored,)
    after = replace(state, rules=event.settings.rules, next=None)
    record = SettingsAdopted(event.settings.spec_json)
    if after.job is JobState.WAITING and after.phase is Phase.OPEN:
        return after, (stored, record, FormPipelines())
    return after, (stored, record)
