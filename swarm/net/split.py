"""Where to cut a pipeline whose nodes' spans overlap, so that its slowest stage is as fast as can be. Pure.

A pipeline's tokens a second are its slowest stage's. The lead also runs the head, whose products with the
vocabulary cost as much as several blocks, so it takes fewer blocks than the others. What the head costs is told
in blocks of the lead's own: measured (`node.measure.training_cost`), or guessed from shapes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise

from swarm.errors import SpanError
from swarm.ids import Span

_Way = tuple[float, float, tuple[int, ...]]
"""The slowest stage and the sum of squares (of equally slow pipelines the most even one), and the places."""


def choose_cuts(
    held: Sequence[Span],
    head_blocks: float,
    block_s: Sequence[float] = (),
    allowed: Collection[int] | None = None,
) -> list[Span]:
    """The blocks each node of a chain runs: within what it holds, at least one, together all of them.

    held: what the nodes hold, in chain order, the lead first. head_blocks: the head's cost on the lead, in blocks.
    block_s: seconds a block takes on each node; empty: the same everywhere. allowed: where the model may be cut,
    besides the ends of what is held; None: anywhere. Of equally good cuts the later. Raises SpanError if there is none.
    """
    if not held or held[0].start != 0:
        raise SpanError("a pipeline's first node must hold the first block")
    edges = {span.start for span in held} | {span.end for span in held}
    best: dict[int, _Way] = {0: (0.0, 0.0, ())}
    for index, span in enumerate(held):
        seconds = block_s[index] if block_s else 1.0
        extra = head_blocks if index == 0 else 0.0
        found: dict[int, _Way] = {}
        for start, (slowest, squares, places) in best.items():
            for end in range(start + 1, span.end + 1) if start >= span.start else ():
                if allowed is not None and end not in allowed and end not in edges:
                    continue
                stage_s = seconds * (end - start + extra)
                way = (max(slowest, stage_s), squares + stage_s**2, (*places, end))
                if end not in found or _order(way) < _order(found[end]):
                    found[end] = way
        best = found
    if held[-1].end not in best:
        raise SpanError("the pipeline's spans do not meet", "form it of nodes whose spans overlap or touch")
    return [Span(start, end) for start, end in pairwise((0, *best[held[-1].end][2]))]


def _order(way: _Way) -> tuple[float, float, tuple[int, ...]]:
    slowest, squares, places = way
    return slowest, squares, tuple(-place for place in places)
