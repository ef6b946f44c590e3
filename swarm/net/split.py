"""Where to cut a pipeline whose nodes' spans overlap, so that its slowest stage is as fast as can be. Pure.

A pipeline's tokens a second are its slowest stage's. The lead also runs the head, whose products with the
vocabulary cost as much as several blocks, so it takes fewer blocks than the others. What the head costs is told
in blocks: measured (`node.measure.training_cost`), or guessed from shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from swarm.errors import SpanError
from swarm.ids import Span

_Cost = tuple[float, float]
"""The slowest stage, and the sum of squares: of equally slow pipelines, the most even."""


def choose_cuts(held: Sequence[Span], head_blocks: float) -> list[Span]:
    """The blocks each node of a chain runs: within what it holds, at least one, together all of them.

    held: what the nodes hold, in chain order, the lead first. head_blocks: the head's cost on the lead, in blocks.
    Nodes count as equally fast. Of equally good cuts the leftmost. Raises SpanError if there is no way.
    """
    if not held or held[0].start != 0:
        raise SpanError("a pipeline's first node must hold the first block")
    best: dict[int, tuple[_Cost, tuple[int, ...]]] = {0: ((0.0, 0.0), (0,))}
    for index, span in enumerate(held):
        extra = head_blocks if index == 0 else 0.0
        found: dict[int, tuple[_Cost, tuple[int, ...]]] = {}
        for start, ((slowest, squares), cuts) in best.items():
            if start < span.start:
                continue
            for end in range(start + 1, span.end + 1):
                cost = end - start + extra
                candidate = ((max(slowest, cost), squares + cost * cost), (*cuts, end))
                if end not in found or candidate < found[end]:
                    found[end] = candidate
        best = found
    if held[-1].end not in best:
        raise SpanError("the pipeline's spans do not meet", "form it of nodes whose spans overlap or touch")
    _, cuts = best[held[-1].end]
    return [Span(start, end) for start, end in pairwise(cuts)]
