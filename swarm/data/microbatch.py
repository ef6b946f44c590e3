"""One batch → microbatches whose gradients add up to the batch's. Pure and deterministic.

Samples are sorted by length, longest first, and cut so that the largest microbatch, padding included, is
as small as it can be: a pipeline is as fast as its largest microbatch, and holds as much. Each is
padded to its own longest sample only. `share` is a microbatch's part of the batch's loss: the loss is
the mean over all labelled tokens of the batch, so a microbatch's mean counts by how many of them it has.

One part is the batch itself, in its own order: nothing about it may change by a bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from swarm.data.batch import Batch
from swarm.data.chat import IGNORED


@dataclass(frozen=True)
class Microbatch:
    """A part of a batch, as large as one pass through the pipeline."""

    batch: Batch
    share: float
    """Of the whole batch's labelled tokens."""


def split_batch(batch: Batch, parts: int) -> tuple[Microbatch, ...]:
    """At most `parts` microbatches, none empty. Raises ValueError for fewer than one."""
    if parts < 1:
        raise ValueError(f"a batch cannot be split into {parts} parts")
    if parts == 1 or len(batch.lengths) == 1:
        return (Microbatch(batch, 1.0),)
    rows = sorted(range(len(batch.lengths)), key=lambda row: (-batch.lengths[row], row))
    sizes = group_sizes([batch.lengths[row] for row in rows], parts)
    counted = _counted(batch)
    found, start = [], 0
    for size in sizes:
        part = _take(batch, rows[start : start + size])
        found.append(Microbatch(part, _counted(part) / counted if counted else 0.0))
        start += size
    return tuple(found)


def group_sizes(lengths: Sequence[int], parts: int) -> list[int]:
    """Cut lengths that fall into at most `parts` groups, the largest (rows times the longest) as small as can be."""
    low, high = max(lengths), len(lengths) * lengths[0]
    while low < high:
        limit = (low + high) // 2
        if len(_greedy(lengths, limit)) <= parts:
            high = limit
        else:
            low = limit + 1
    return _greedy(lengths, low)


def _greedy(lengths: Sequence[int], limit: int) -> list[int]:
    """Groups as large as `limit` allows, in order: the fewest there can be."""
    sizes, at = [], 0
    while at < len(lengths):
        size = min(max(1, limit // lengths[at]), len(lengths) - at)
        sizes.append(size)
        at += size
    return sizes


def _take(batch: Batch, rows: Sequence[int]) -> Batch:
    lengths = tuple(batch.lengths[row] for row in rows)
    labels_BT = batch.labels_BT[list(rows), : max(lengths)]
    return Batch(
        input_ids_BT=batch.input_ids_BT[list(rows), : max(lengths)],
        labels_BT=labels_BT,
        lengths=lengths,
        tokens=sum(lengths),
        label_tokens=int((labels_BT != IGNORED).sum()),
        positions_BT=None if batch.positions_BT is None else batch.positions_BT[list(rows), : max(lengths)],
    )


def _counted(batch: Batch) -> int:
    """Tokens that are predicted: a row's first one is not, whatever its label."""
    return int((batch.labels_BT[:, 1:] != IGNORED).sum())
