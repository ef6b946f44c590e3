"""The sample order is a fresh permutation every epoch, the same for everyone who knows the seed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.data.order import sample_index

sizes = st.integers(1, 300)
seeds = st.integers(0, 2**64 - 1)


@given(n=sizes, epoch=st.integers(0, 50), seed=seeds)
def test_every_sample_comes_exactly_once_an_epoch(n: int, epoch: int, seed: int) -> None:
    order = [sample_index(epoch * n + place, n, seed) for place in range(n)]
    assert sorted(order) == list(range(n))


@given(n=sizes, seed=seeds, data=st.data())
def test_the_answer_does_not_depend_on_what_was_asked_before(n: int, seed: int, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, 8 * n), min_size=1, max_size=40))
    first = {position: sample_index(position, n, seed) for position in positions}
    shuffled = data.draw(st.permutations(positions))
    for position in shuffled:
        sample_index(position, n + 1, seed ^ 1)  # other runs in the same process
        assert sample_index(position, n, seed) == first[position]


def test_the_order_is_the_same_on_every_machine() -> None:
    """Golden values: a change of these is a change of every run that was ever started."""
    two_epochs = [0, 7, 1, 9, 2, 3, 8, 6, 4, 5, 8, 2, 0, 4, 5, 6, 3, 7, 9, 1]
    assert [sample_index(p, 10, 0) for p in range(20)] == two_epochs
    assert sample_index(123_456_789, 8530, 42) == 1658


def test_epochs_and_seeds_differ() -> None:
    epochs = [tuple(sample_index(e * 100 + p, 100, seed) for p in range(100)) for e in range(5) for seed in (0, 1)]
    assert len(set(epochs)) == len(epochs)


@pytest.mark.parametrize(("position", "n"), [(-1, 10), (0, 0)])
def test_positions_that_do_not_exist(position: int, n: int) -> None:
    with pytest.raises(ValueError, match="no sample"):
        sample_index(position, n, 0)
