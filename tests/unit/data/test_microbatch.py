"""A split batch is the same batch: every sample once, less padding, shares that add up."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.data.batch import Batch, collate
from swarm.data.chat import IGNORED, EncodedSample
from swarm.data.microbatch import group_sizes, split_batch

samples = st.lists(
    st.integers(2, 12).flatmap(lambda length: st.tuples(st.just(length), st.integers(1, length - 1))),
    min_size=1,
    max_size=9,
)


def batch_of(drawn: list[tuple[int, int]]) -> Batch:
    """Rows of (length, labelled tokens at the end), every row with token ids of its own."""
    rows = [
        EncodedSample(
            tuple(range(100 * number, 100 * number + length)),
            (*[IGNORED] * (length - labelled), *range(labelled)),
            0,
        )
        for number, (length, labelled) in enumerate(drawn)
    ]
    return collate(rows, pad_id=7)


@given(samples, st.integers(1, 12))
def test_every_sample_once_trimmed_and_with_its_share(drawn: list[tuple[int, int]], parts: int) -> None:
    batch = batch_of(drawn)
    found = split_batch(batch, parts)
    assert 1 <= len(found) <= min(parts, len(drawn))
    seen = [
        row[:length]
        for part in found
        for row, length in zip(part.batch.input_ids_BT.tolist(), part.batch.lengths, strict=True)
    ]
    assert sorted(seen) == sorted(row[:n] for row, n in zip(batch.input_ids_BT.tolist(), batch.lengths, strict=True))
    for part in found:
        assert part.batch.input_ids_BT.shape == part.batch.labels_BT.shape
        assert part.batch.input_ids_BT.shape[1] == max(part.batch.lengths)
        assert part.share == pytest.approx(part.batch.label_tokens / batch.label_tokens)
    assert sum(part.share for part in found) == pytest.approx(1.0)
    assert sum(part.batch.tokens for part in found) == batch.tokens
    # Longest first: what does not fit in memory shows at once.
    flat = [length for part in found for length in part.batch.lengths]
    assert len(found) == 1 or flat == sorted(flat, reverse=True)


def test_one_part_is_the_batch_itself() -> None:
    batch = batch_of([(3, 1), (9, 2), (5, 1)])
    (only,) = split_batch(batch, 1)
    assert only.batch is batch
    assert only.share == 1.0
    with pytest.raises(ValueError, match="0 parts"):
        split_batch(batch, 0)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(1, 8))
def test_the_largest_group_is_as_small_as_can_be(lengths: list[int], parts: int) -> None:
    ordered = sorted(lengths, reverse=True)

    def largest(sizes: list[int]) -> int:
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return max(size * ordered[start] for size, start in zip(sizes, starts, strict=True))

    def every() -> list[list[int]]:
        return [
            [b - a for a, b in zip((0, *cut), (*cut, len(ordered)), strict=True)]
            for count in range(min(parts, len(ordered)))
            for cut in combinations(range(1, len(ordered)), count)
        ]

    sizes = group_sizes(ordered, parts)
    assert sum(sizes) == len(ordered)
    assert len(sizes) <= parts
    assert largest(sizes) == min(largest(other) for other in every())
