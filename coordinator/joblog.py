"""A job's log: what each durable step means to people. Pure.

In: the record of a step, and what is known beside it. Out: log lines without number and time,
which the ledger stores in the transaction of the record itself, so that the log never says more
or less than what happened.
"""

from __future__ import annotations

from coordinator.records import ContributionRecord, RoundSummary
from coordinator.records import LogLine as Line
from coordinator.round_model import (
    Best,
    ContributionHeld,
    JobChanged,
    JobState,
    Pipeline,
    PipelineLost,
    PipelinesFormed,
    Record,
    Rewound,
    RoundCommitted,
    RoundFrozen,
    RoundOpened,
    RoundReopened,
    RoundScored,
    SettingsAdopted,
    SettingsStored,
    WrapUp,
)

_MAX_TEXT = 1000
_SHORT_PEER = 8
"""The last characters of a peer id tell nodes apart."""


def submitted(submitter: str) -> list[Line]:
    return [
        Line("job_submitted", 0, f"submitted by {submitter}", peer=submitter),
        Line("round_opened", 1, "round 1 is open"),
    ]


def refused(round: int, peer: str, pipeline_id: int, verdict: str, reason: str) -> Line:
    """`verdict`: late, rejected or conflict."""
    return Line(f"contribution_{verdict}", round, reason[:_MAX_TEXT], peer=peer, pipeline_id=pipeline_id)


def lines(
    record: Record, round: int, submission: ContributionRecord | None, summary: RoundSummary | None
) -> list[Line]:
    """`round` is the job's newest; `summary` that of a committed round."""
    match record:
        case RoundOpened(number):
            return [Line("round_opened", number, f"round {number} is open")]
        case PipelinesFormed(number, _, pipelines, continued):
            before = dict(continued)
            return [
                Line("pipeline_formed", number, _formed(p, p.pipeline_id in before), pipeline_id=p.pipeline_id)
                for p in pipelines
            ]
        case ContributionHeld(number, pipeline_id, held, whole):
            skipped = f" ({submission.skipped_steps} skipped)" if submission and submission.skipped_steps else ""
            text = f"held, {held.inner_steps} inner steps{skipped}{'; its pipeline is whole' if whole else ''}"
            size, tokens, loss = (submission.payload_size, submission.tokens, submission.loss) if submission else _NONE
            return [
                Line(
                    *("contribution_held", number, text),
                    peer=held.peer,
                    pipeline_id=pipeline_id,
                    loss=loss,
                    tokens=tokens,
                    size=size,
                )
            ]
        case PipelineLost(number, pipeline_id, reason):
            return [Line("pipeline_lost", number, reason[:_MAX_TEXT], pipeline_id=pipeline_id)]
        case RoundFrozen(number, accepted, late):
            text = f"frozen with pipelines {_ids(accepted)}"
            return [
                Line("round_frozen", number, f"{text}; late: {_ids(late)}" if late else text),
                *(Line("pipeline_late", number, f"not whole when round {number} froze", pipeline_id=p) for p in late),
            ]
        case RoundReopened(number):
            return [Line("round_reopened", number, "nothing that was held can be aggregated: the round is open again")]
        case WrapUp(number):
            return [Line("wrap_up", number, "pipelines are asked to contribute what they have")]
        case RoundCommitted(number) if summary is not None:
            loss_text = "" if summary.loss is None else f", loss {summary.loss:.4f}"
            text = (
                f"committed: {summary.pipelines} pipelines{loss_text}, {summary.tokens} tokens,"
                f" {summary.contribution_bytes} bytes up, {summary.update_bytes} bytes down"
            )
            size = summary.contribution_bytes + summary.update_bytes
            return [Line("round_committed", number, text, loss=summary.loss, tokens=summary.tokens, size=size)]
        case RoundScored(number, None, _, _, reason):
            return [Line("round_not_scored", number, reason[:_MAX_TEXT])]
        case RoundScored(number, loss, tokens, best):
            again = "the best so far" if best is not None and best.round == number else _stale(best)
            return [Line("round_scored", number, f"held-out loss {loss:.4f}, {again}", loss=loss, tokens=tokens)]
        case JobChanged(_, _, _, order) if order is not None:
            return [Line(f"{order.kind}_ordered", round, f"{order.reason}; the round is closed first")]
        case JobChanged(state, reason) if state is not JobState.RUNNING:
            return [Line(f"job_{state}", round, reason[:_MAX_TEXT])]
        case SettingsStored(_, text):
            return [Line("settings_changed", round, text[:_MAX_TEXT])]
        case SettingsAdopted():
            return [Line("settings_adopted", round, "the changed settings are in force")]
        case Rewound(number, _, discarded):
            return [Line("job_rewound", number, f"back to the end of round {number}; {discarded} rounds are discarded")]
        case _:
            return []


_NONE = (0, 0, None)


def _stale(best: Best | None) -> str:
    return "" if best is None else f"the best is round {best.round}'s {best.loss:.4f}"


def _formed(pipeline: Pipeline, goes_on: bool) -> str:
    members = ", ".join(f"{m.peer[-_SHORT_PEER:]} {m.span}" for m in pipeline.members)
    how = ", goes on from the round before" if goes_on else ""
    return f"pipeline {pipeline.pipeline_id}, generation {pipeline.generation}{how}: {members}"[:_MAX_TEXT]


def _ids(pipeline_ids: tuple[int, ...]) -> str:
    return ", ".join(str(pipeline_id) for pipeline_id in pipeline_ids)
