"""A batch is a function of (lease, step), padded on the right."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.data.batch import batch_positions, collate
from swarm.data.chat import EncodedSample


def test_collate_pads_on_the_right() -> None:
    short = EncodedSample((5, 6), (-100, 6), 0)
    long = EncodedSample((7, 8, 9, 2), (-100, -100, 9, 2), 3)
    batch = collate([short, long], pad_id=2)
    assert batch.input_ids_BT.tolist() == [[5, 6, 2, 2], [7, 8, 9, 2]]
    assert batch.labels_BT.tolist() == [[-100, 6, -100, -100], [-100, -100, 9, 2]]
    assert batch.input_ids_BT.dtype == batch.labels_BT.dtype == torch.int64
    assert (batch.lengths, batch.tokens, batch.label_tokens) == ((2, 4), 6, 3)


def test_collate_needs_a_sample() -> None:
    with pytest.raises(ValueError, match="at least one"):
        collate([], pad_id=0)


lease = st.lists(
    st.tuples(st.integers(0, 1000), st.integers(1, 12)).map(lambda r: (r[0], r[0] + r[1])),
    min_size=1,
    max_size=5,
)


@given(ranges=lease, batch_size=st.integers(1, 9))
def test_steps_walk_through_the_lease_once(ranges: list[tuple[int, int]], batch_size: int) -> None:
    laid = [position for start, end in ranges for position in range(start, end)]
    steps = len(laid) // batch_size
    taken = [position for step in range(steps) for position in batch_positions(ranges, step, batch_size)]
    assert taken == laid[: steps * batch_size]
    with pytest.raises(ValueError, match=f"beyond the lease's {len(laid)} positions"):
        batch_positions(ranges, steps, batch_size)


def test_a_huge_lease_costs_nothing() -> None:
    assert batch_positions([(0, 10**15), (5, 10)], 10**12, 3) == [3 * 10**12 + i for i in range(3)]


@pytest.mark.parametrize(
    ("ranges", "step", "batch_size"),
    [([(0, 4)], -1, 2), ([(0, 4)], 0, 0), ([(4, 4)], 0, 1), ([(4, 2)], 0, 1), ([(-2, 2)], 0, 1), ([], 0, 1)],
)
def test_batches_that_do_not_exist(ranges: list[tuple[int, int]], step: int, batch_size: int) -> None:
    with pytest.raises(ValueError):
        batch_positions(ranges, step, batch_size)
