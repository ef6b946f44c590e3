"""Held-out evaluation between two rounds, and when it ends a job. Pure.

After a round is committed and before the next one opens, the lead of one accepted pipeline scores the
committed parameters. Only pipelines whose members are all here are asked: a member may leave once its
contribution is held. If the one that was asked loses a member or gives up, the next one is asked; if none
is left or the time is over, the job goes on without a score and says so. A job with early stopping
ends once so many scores in a row were no better than the best one by `min_delta`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from coordinator.deadline import limit_s
from coordinator.round_events import Scored
from coordinator.round_model import (
    Best,
    OpenNext,
    RoundScored,
    RoundsState,
    Rules,
    ScoringBegun,
    Standing,
    Step,
)
from coordinator.round_steps import finish, untimed


def due(rules: Rules, round: int) -> bool:
    """Every so many rounds, and after the last one."""
    return bool(rules.eval_every) and (round % rules.eval_every == 0 or round >= rules.rounds)


def better(best: Best | None, round: int, loss: float, min_delta: float) -> Best:
    """The best score, this one included."""
    if best is None or loss < best.loss - min_delta:
        return Best(round, loss, 0)
    return replace(best, stale=best.stale + 1)


def best_of(scores: Iterable[tuple[int, float]], min_delta: float) -> Best | None:
    """Of (round, loss) in the order of rounds."""
    best: Best | None = None
    for round, loss in scores:
        best = better(best, round, loss, min_delta)
    return best


def begin_scoring(state: RoundsState, now_s: float, absent: frozenset[str]) -> Step:
    """Ask the first accepted pipeline that is all here."""
    return _ask(state, _here(state, absent), now_s, "of every pipeline that counts, a node has left")


def _here(state: RoundsState, absent: frozenset[str]) -> list[int]:
    """Accepted pipelines that can score."""
    whole = state.with_standing(Standing.WHOLE)
    return [p.pipeline_id for p in whole if not any(member.peer in absent for member in p.members)]


def _ask(state: RoundsState, candidates: list[int], now_s: float, reason: str) -> Step:
    """The first of them; `reason` says why nobody is asked if there is none."""
    if candidates:
        first = candidates[0]
        return in_time(replace(state, scorer=first), now_s), (ScoringBegun(state.round, first),)
    after, effects = onward(replace(untimed(state), scorer=None))
    return after, (RoundScored(state.round, None, 0, state.best, reason), *effects)


def in_time(state: RoundsState, now_s: float) -> RoundsState:
    """A score may take as long as a round."""
    time_s = limit_s(state.rules.round_deadline_s, state.recent_s, 0)
    return replace(state, began_s=now_s, wrap_s=None, deadline_s=now_s + time_s)


def scored(state: RoundsState, event: Scored) -> Step:
    if state.scorer is None or event.round != state.round:
        return state, ()
    best = better(state.best, event.round, event.loss, state.rules.min_delta)
    after, effects = onward(replace(untimed(state), scorer=None, best=best))
    return after, (RoundScored(event.round, event.loss, event.tokens, best, ""), *effects)


def ask_next(state: RoundsState, now_s: float, reason: str, absent: frozenset[str]) -> Step:
    """The pipeline that was asked does not answer."""
    assert state.scorer is not None, "somebody was asked"
    later = [pipeline_id for pipeline_id in _here(state, absent) if pipeline_id > state.scorer]
    return _ask(state, later, now_s, reason)


def without_score(state: RoundsState, reason: str) -> Step:
    """Nobody is asked any more."""
    if state.scorer is None:
        return state, ()
    return replace(untimed(state), scorer=None), (RoundScored(state.round, None, 0, state.best, reason),)


def onward(state: RoundsState) -> Step:
    """A committed round is behind us: end, or open the next one."""
    if state.round >= state.rules.rounds:
        return finish(state)
    best, patience = state.best, state.rules.patience
    if patience and best is not None and best.stale >= patience:
        return finish(
            state,
            f"stopped early: {best.stale} evaluations in a row were no better than that of round {best.round}"
            f" (held-out loss {best.loss:.4f})",
        )
    return state, (OpenNext(state.round + 1),)
