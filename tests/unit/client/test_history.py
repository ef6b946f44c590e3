from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.client.history import Columns, History


def _columns(start: int, width: int, rows: int, pad: int = 0) -> Columns:
    ids = torch.arange(start, start + width).repeat(rows, 1) + 1000 * torch.arange(rows).unsqueeze(1)
    mask = torch.ones((rows, width), dtype=torch.bool)
    mask[0, :pad] = False
    return Columns(ids, None, mask, None)


def _ids(history: History, start: int, end: int) -> torch.Tensor:
    pieces = [piece.ids_BT for piece in history.slice(start, end)]
    return torch.cat([piece for piece in pieces if piece is not None], dim=1)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8), st.data())
def test_a_slice_is_what_was_appended(widths: list[int], data: st.DataObject) -> None:
    history, total = History(), 0
    for width in widths:
        history.append(_columns(total, width, 2))
        total += width
    keep = data.draw(st.integers(0, total))
    history.truncate(keep)
    assert history.length == keep
    if keep:
        start = data.draw(st.integers(0, keep - 1))
        assert _ids(history, start, keep)[0].tolist() == list(range(start, keep))
        assert len(history.slice(start, keep)) == 1


def test_rows_move_with_everything_they_were_given() -> None:
    history = History()
    history.append(_columns(0, 3, 2))
    history.select([1, 1, 0])
    assert _ids(history, 0, 3)[:, 0].tolist() == [1000, 1000, 0]


def test_padding_does_not_count_as_positions() -> None:
    history = History()
    history.append(_columns(0, 4, 2, pad=2))
    assert history.counted(0, 4).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert history.counted(3, 4).tolist() == [[1], [3]]


def test_hidden_states_and_tokens_stay_apart() -> None:
    history = History()
    history.append(Columns(None, torch.ones((1, 2, 3)), torch.ones((1, 2), dtype=torch.bool), None))
    history.append(_columns(2, 1, 1))
    history.append(_columns(3, 1, 1))
    assert [piece.width for piece in history.slice(0, 4)] == [2, 2]
