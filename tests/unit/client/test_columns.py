"""Where a call's text lies on a cache's columns, against straightforward definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.client.columns import common_part, distinct_rows, new_columns
from swarm.errors import InputError


@st.composite
def masks(draw: st.DrawFn) -> torch.Tensor:
    batch, columns = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    return torch.tensor([[draw(st.integers(0, 1)) for _ in range(columns)] for _ in range(batch)])


def _counted(mask_BS: torch.Tensor) -> torch.Tensor:
    """Position ids as generate() makes them."""
    return (mask_BS.cumsum(dim=-1) - 1).masked_fill(mask_BS == 0, 0)


@given(masks(), st.data())
def test_positions_of_generate_are_what_a_session_counts(mask_BS: torch.Tensor, data: st.DataObject) -> None:
    past = data.draw(st.integers(0, mask_BS.shape[1] - 1))
    time = mask_BS.shape[1] - past
    mask_BT, positions_BT = new_columns(
        (mask_BS.shape[0], time), mask_BS[:, :past], mask_BS, _counted(mask_BS)[:, past:]
    )
    assert positions_BT is None
    assert (mask_BT is None) == bool(mask_BS[:, past:].all())
    assert mask_BT is None or torch.equal(mask_BT, mask_BS[:, past:])


@given(masks())
def test_without_position_ids_all_columns_are_counted(mask_BS: torch.Tensor) -> None:
    batch, time = mask_BS.shape
    _, positions_BT = new_columns((batch, time), mask_BS[:, :0], mask_BS, None)
    positions_BT = _counted(mask_BS) if positions_BT is None else positions_BT
    real = mask_BS.bool()
    assert torch.equal(positions_BT[real], torch.arange(time).expand(batch, time)[real])


def test_a_mask_that_does_not_fit_is_refused() -> None:
    held = torch.ones(2, 3, dtype=torch.long)
    for mask in (torch.ones(2, 4), torch.ones(1, 5), torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])):
        with pytest.raises(InputError):
            new_columns((2, 2), held, mask, None)
    with pytest.raises(InputError):
        new_columns((2, 2), held, None, torch.zeros(3, 2, 2))
    assert new_columns((2, 2), held, None, None) == (None, None)


def _shared(one: list[int], other: list[int]) -> int:
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))


_TEXTS = st.integers(1, 6).flatmap(
    lambda width: st.lists(st.lists(st.integers(0, 1), min_size=width, max_size=width), min_size=1, max_size=4)
)


@given(_TEXTS, _TEXTS)
def test_common_part_is_the_longest_shared_beginning(texts: list[list[int]], held: list[list[int]]) -> None:
    ids, held_ids = torch.tensor(texts), torch.tensor(held)
    keep, rows = common_part(ids, torch.ones_like(ids), held_ids, torch.ones_like(held_ids))
    best = [max(_shared(text[:-1], other) for other in held) for text in texts]
    assert keep == min(best)
    for text, row, expected in zip(texts, rows, best, strict=True):
        assert _shared(text[:-1], held[row]) == expected


def test_padding_is_part_of_what_must_agree() -> None:
    ids = torch.tensor([[0, 5, 6]])
    assert common_part(ids, torch.tensor([[0, 1, 1]]), ids, torch.tensor([[0, 1, 1]])) == (2, [0])
    assert common_part(ids, torch.tensor([[1, 1, 1]]), ids, torch.tensor([[0, 1, 1]])) == (0, [0])


@given(_TEXTS)
def test_distinct_rows_give_all_rows_back(texts: list[list[int]]) -> None:
    ids = torch.tensor(texts)
    kept, spread = distinct_rows([ids, torch.ones_like(ids)])
    assert torch.equal(ids[kept] if spread is None else ids[kept][spread], ids)
    assert all(texts[row] != texts[row - 1] for row in kept[1:])
