"""Rounds that overlap: which pipelines go on into the next round, and what they have done of it. Pure.

With `overlap_steps` a pipeline that is whole trains on for so many inner steps while its round is
closed, on a lease that it holds ahead. Only a pipeline that is formed of the same nodes and blocks in
the same order can go on from there; for any other the round starts anew, and what was held ahead
is free again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from coordinator.round_model import Pipeline, Rules


def continued(before: Sequence[Pipeline], formed: Sequence[Pipeline]) -> tuple[tuple[int, int], ...]:
    """(id now, id in the round before) of the pipelines that go on."""
    ids = {pipeline.members: pipeline.pipeline_id for pipeline in before}
    return tuple((p.pipeline_id, ids[p.members]) for p in formed if p.members in ids)


def credited(before: Sequence[Pipeline], formed: Sequence[Pipeline], rules: Rules) -> tuple[Pipeline, ...]:
    """The pipelines formed now, timed from when those that go on began.

    Else a round's time would shrink to what is left to do of it, and whoever has to start anew would be
    late. A pipeline that waited for slower ones is credited with the time of its steps alone.
    """
    earlier = {pipeline.members: pipeline for pipeline in before}
    return tuple(
        replace(pipeline, formed_s=pipeline.formed_s - _ahead_s(earlier[pipeline.members], pipeline.formed_s, rules))
        if pipeline.members in earlier and pipeline.formed_s is not None
        else pipeline
        for pipeline in formed
    )


def _ahead_s(before: Pipeline, now_s: float, rules: Rules) -> float:
    if before.whole_s is None:
        return 0.0
    since_s = now_s - before.whole_s
    if before.took_s is None:
        return since_s
    return min(since_s, before.took_s * rules.overlap_steps / rules.inner_steps)
