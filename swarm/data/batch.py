"""Which positions a step takes, and encoded samples → padded tensors.

`batch_positions` makes a batch a function of (lease, step); `swarm.data.order` turns positions
into samples, `swarm.data.chat` samples into tokens, `collate` tokens into a `Batch`. Pure.
Padding is on the right, so that with causal attention no real token ever sees it and no
attention mask needs to travel along the pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from swarm.data.chat import IGNORED, EncodedSample


@dataclass(frozen=True)
class Batch:
    """The samples of one step; T is the longest one's length."""

    input_ids_BT: torch.Tensor
    """int64, padded on the right."""
    labels_BT: torch.Tensor
    """int64, -100 where there is no loss; not shifted."""
    lengths: tuple[int, ...]
    """Tokens of each row before padding."""
    tokens: int
    """All tokens but padding."""
    label_tokens: int
    """Tokens that carry loss: what the loss is averaged over."""
    positions_BT: torch.Tensor | None = None
    """int64 position ids of rows that hold several samples (`swarm.data.packing`); None: every row holds one."""


def collate(samples: Sequence[EncodedSample], pad_id: int) -> Batch:
    """Stack samples into one batch. Raises ValueError if there are none."""
    if not samples:
        raise ValueError("a batch needs at least one sample")
    lengths = tuple(len(sample.input_ids) for sample in samples)
    input_ids_BT = torch.full((len(samples), max(lengths)), pad_id, dtype=torch.int64)
    labels_BT = torch.full_like(input_ids_BT, IGNORED)
    for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        input_ids_BT[row, :length] = torch.tensor(sample.input_ids, dtype=torch.int64)
        labels_BT[row, :length] = torch.tensor(sample.labels, dtype=torch.int64)
    return Batch(
        input_ids_BT=input_ids_BT,
        labels_BT=labels_BT,
        lengths=lengths,
        tokens=sum(lengths),
        label_tokens=int((labels_BT != IGNORED).sum()),
    )


def batch_positions(ranges: Sequence[tuple[int, int]], step: int, batch_size: int) -> list[int]:
    """The positions of the sample order that inner step `step` of a lease takes.

    The lease's ranges [start, end) are laid end to end; step s takes the s-th `batch_size` of
    them. Raises ValueError if the lease ends before the batch does.
    """
    if step < 0 or batch_size < 1:
        raise ValueError(f"no batch of {batch_size} at step {step}")
    if any(not 0 <= start < end for start, end in ranges):
        raise ValueError(f"a lease of {list(ranges)} holds a range that is empty or negative")
    first = step * batch_size
    positions: list[int] = []
    laid = 0
    for start, end in ranges:
        skipped = max(0, first - laid)
        wanted = batch_size - len(positions)
        positions.extend(range(start + skipped, min(end, start + skipped + wanted)))
        laid += end - start
    if len(positions) < batch_size:
        raise ValueError(f"step {step} of {batch_size} samples is beyond the lease's {laid} positions")
    return positions
