"""Samples that share rows: all of them, once, whole, and none longer than a row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.data.batch import collate
from swarm.data.chat import IGNORED, EncodedSample
from swarm.data.microbatch import split_batch
from swarm.data.packing import collate_packed, pack_rows, row_tokens

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=24)


def samples_of(lengths: list[int]) -> list[EncodedSample]:
    found, first = [], 1
    for length in lengths:
        ids = tuple(range(first, first + length))
        found.append(EncodedSample(ids, (IGNORED, *ids[1:]), 0))
        first += length
    return found


@given(LENGTHS, st.integers(1, 8))
def test_every_sample_is_in_one_row_that_holds_it(lengths: list[int], parts: int) -> None:
    most = row_tokens(lengths, parts, 32)
    rows = pack_rows(lengths, most)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= most for row in rows)
    # No two rows would fit into one: less than twice the rows that there must be.
    assert len(rows) < 2 * sum(lengths) / most + 1


@given(LENGTHS, st.integers(1, 8))
def test_a_packed_batch_holds_the_same_tokens_labels_and_positions(lengths: list[int], parts: int) -> None:
    samples = samples_of(lengths)
    packed, plain = collate_packed(samples, 0, parts, 32), collate(samples, 0)
    assert (packed.tokens, packed.label_tokens) == (plain.tokens, plain.label_tokens)
    for part in split_batch(packed, parts):
        batch = part.batch
        assert int((batch.input_ids_BT != 0).sum()) == batch.tokens
        if batch.positions_BT is None:
            continue
        starts = batch.positions_BT == 0
        assert not (batch.labels_BT[starts] != IGNORED).any(), "nothing before a sample predicts its first token"
        # Within a row, positions count up by one or start again, and a sample is where it starts and counts.
        steps = batch.positions_BT[:, 1:] - batch.positions_BT[:, :-1]
        assert ((steps == 1) | starts[:, 1:]).all()
        assert starts[:, 0].all()
    assert sorted(packed.input_ids_BT[packed.input_ids_BT != 0].tolist()) == list(range(1, sum(lengths) + 1))


def test_padding_at_the_end_is_a_sample_of_its_own() -> None:
    batch = collate_packed(samples_of([6, 3, 2, 2]), 0, 1, 8)
    assert batch.lengths == (8, 5)
    assert batch.positions_BT is not None
    assert batch.positions_BT.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1], [0, 1, 2, 0, 1, 0, 1, 2]]


def test_where_nothing_fits_beside_another_the_batch_is_as_any_other() -> None:
    samples = samples_of([9, 8, 7])
    packed, plain = collate_packed(samples, 0, 3, 9), collate(samples, 0)
    assert packed.positions_BT is None
    assert torch.equal(packed.input_ids_BT, plain.input_ids_BT)
    assert torch.equal(packed.labels_BT, plain.labels_BT)


def test_a_sample_longer_than_a_row_and_no_sample_are_refused() -> None:
    with pytest.raises(ValueError):
        pack_rows([5], 4)
    with pytest.raises(ValueError):
        collate_packed([], 0, 1, 8)
