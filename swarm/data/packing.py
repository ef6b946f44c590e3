"""Several short samples in one row of a batch, none of which sees another.

In: the samples of one optimizer step. Out: a `Batch` of fewer rows with position ids that start again where a
sample does, which is what keeps attention apart (`swarm.model.shard`), and without a label on a sample's first
token, which nothing before it may predict. So a loss per token and its gradients are those of the
samples alone. Samples are not cut and none moves to another step: what a lease counts stays what it was. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from swarm.data.batch import Batch, collate
from swarm.data.chat import IGNORED, EncodedSample

_ROW_TOKENS = 256
"""Rows are not made longer than this, unless a sample is: attention takes a row's length squared."""


def row_tokens(lengths: Sequence[int], parts: int, max_length: int) -> int:
    """How long rows may become that are to be cut into `parts` microbatches: no sample is longer, and there
    are about as many rows as parts."""
    return max(*lengths, min(_ROW_TOKENS, max_length, -(-sum(lengths) // parts)))


def pack_rows(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Which samples share a row of at most `most` tokens: the longest first, each into the first row that has room.

    Raises ValueError if a sample is longer than a row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[index] > most:
            raise ValueError(f"a sample of {lengths[index]} tokens does not fit a row of {most}")
        place = next((row for row, left in enumerate(room) if left >= lengths[index]), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(most)
        rows[place].append(index)
        room[place] -= lengths[index]
    return rows


def collate_packed(samples: Sequence[EncodedSample], pad_id: int, parts: int, max_length: int) -> Batch:
    """One batch of as few rows as fit, for `parts` microbatches, no row longer than `max_length`.

    Raises ValueError if there are no samples.
    """
    if not samples:
        raise ValueError("a batch needs at least one sample")
    lengths = [len(sample.input_ids) for sample in samples]
    rows = pack_rows(lengths, row_tokens(lengths, parts, max_length))
    if len(rows) == len(samples):
        return collate(samples, pad_id)  # nothing fits beside another: a batch as any other
    joined = [_join([samples[index] for index in row]) for row in rows]
    batch = collate(joined, pad_id)
    positions_BT = torch.zeros_like(batch.input_ids_BT)
    for number, row in enumerate(rows):
        at = 0
        for length in (*(lengths[index] for index in row), positions_BT.shape[1]):
            end = min(at + length, positions_BT.shape[1])  # padding counts as one more sample
            positions_BT[number, at:end] = torch.arange(end - at)
            at = end
    return Batch(
        batch.input_ids_BT, batch.labels_BT, batch.lengths, batch.tokens, batch.label_tokens, positions_BT=positions_BT
    )


def _join(samples: Sequence[EncodedSample]) -> EncodedSample:
    ids = tuple(token for sample in samples for token in sample.input_ids)
    labels = tuple(label for sample in samples for label in (IGNORED, *sample.labels[1:]))
    return EncodedSample(ids, labels, sum(sample.cut_tokens for sample in samples))
