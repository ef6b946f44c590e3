"""What a session has been given so far, so that it can be given again: token ids or hidden states by column."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Embed = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(token ids [B, T], position ids [B, T]) to hidden states [B, T, D]."""


@dataclass(frozen=True)
class Columns:
    """Some columns of every row."""

    ids_BT: torch.Tensor | None
    """Token ids, or None where hidden states were given instead."""
    hidden_BTD: torch.Tensor | None
    mask_BT: torch.Tensor
    """Bool, False on padding."""
    positions_BT: torch.Tensor | None
    """Position ids of the caller's own; None: real tokens, counted."""

    @property
    def width(self) -> int:
        return int(self.mask_BT.shape[1])

    def cut(self, start: int, end: int) -> Columns:
        return self._map(lambda t: t[:, start:end])

    def select(self, rows_N: torch.Tensor) -> Columns:
        return self._map(lambda t: t[rows_N])

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Columns:
        def maybe(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else change(tensor)

        return Columns(maybe(self.ids_BT), maybe(self.hidden_BTD), change(self.mask_BT), maybe(self.positions_BT))


class History:
    """All columns of a session, in order."""

    def __init__(self) -> None:
        self._pieces: list[Columns] = []
        self.length = 0
        self.padded = False

    def copy(self) -> History:
        """Another history of the same columns; the tensors are shared and never changed."""
        other = History()
        other._pieces, other.length, other.padded = list(self._pieces), self.length, self.padded
        return other

    def append(self, columns: Columns) -> None:
        self._pieces.append(columns)
        self.length += columns.width
        self.padded = self.padded or not bool(columns.mask_BT.all())

    def truncate(self, length: int) -> None:
        """Forget columns from `length` on."""
        while self._pieces and self.length > length:
            last = self._pieces.pop()
            self.length -= last.width
            if self.length < length:
                self._pieces.append(last.cut(0, length - self.length))
                self.length = length

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order."""
        rows_N = torch.tensor(list(rows))
        self._pieces = [piece.select(rows_N) for piece in self._pieces]

    def slice(self, start: int, end: int) -> list[Columns]:
        """Columns [start, end) as pieces that are each of one kind."""
        found, at = [], 0
        for piece in self._pieces:
            low, high = max(start, at), min(end, at + piece.width)
            if low < high:
                found.append(piece.cut(low - at, high - at))
            at += piece.width
        return _merged(found)

    def counted(self, start: int, end: int) -> torch.Tensor:
        """Position ids [B, end - start] of columns: real tokens before each one, as `transformers` counts them."""
        if not self.padded:
            batch = int(self._pieces[0].mask_BT.shape[0]) if self._pieces else 1
            return torch.arange(start, end).expand(batch, end - start)
        mask_BT = torch.cat([piece.mask_BT for piece in self._pieces], dim=1)[:, :end]
        return (mask_BT.long().cumsum(dim=1) - 1).clamp_(min=0)[:, start:]


def _merged(pieces: list[Columns]) -> list[Columns]:
    """Neighbours that are both plain token ids become one piece: decoded tokens came one by one."""
    merged: list[list[Columns]] = []
    for piece in pieces:
        plain = piece.ids_BT is not None and piece.positions_BT is None
        if merged and plain and merged[-1][0].ids_BT is not None and merged[-1][0].positions_BT is None:
            merged[-1].append(piece)
        else:
            merged.append([piece])
    return [group[0] if len(group) == 1 else _joined(group) for group in merged]


def _joined(group: list[Columns]) -> Columns:
    ids = [piece.ids_BT for piece in group if piece.ids_BT is not None]
    return Columns(torch.cat(ids, dim=1), None, torch.cat([piece.mask_BT for piece in group], dim=1), None)
