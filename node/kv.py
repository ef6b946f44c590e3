"""One session's KV cache on this node: it grows by what is asked for, and can be rolled back.

Memory follows use: a cache holds the columns it was given, never the most it might be given. All
methods but the properties run on the compute thread.
"""

from __future__ import annotations

from typing import Any

import torch

from swarm.errors import ProtocolError, SessionError
from swarm.model.shard import View

_ROLLBACK_COLUMNS = 64
"""Columns that a sliding window keeps beyond its own, so that a speculated step can be taken back."""


class SessionCache:
    """KV of `batch` rows; every row has `length` columns, padding included."""

    def __init__(self, view: View, batch: int) -> None:
        self._view = view
        self.batch = batch
        self.mask_BS: torch.Tensor | None = None
        """[batch, length] bool, False on padding; None while there is none."""
        self._start()

    def _start(self) -> None:
        self.kv: Any = self._view.new_cache()
        self.length = 0
        for layer in self._windows():
            layer.activate_past_recording()

    def drop(self) -> None:
        """Give the memory back at once, whoever still holds this object. It must not be used again."""
        self.kv = None
        self.mask_BS = None
        self.length = 0

    def _windows(self) -> list[Any]:
        return [layer for layer in getattr(self.kv, "layers", ()) if getattr(layer, "is_sliding", False)]

    def prepare(self, position: int, time: int, rows: list[int], mask_BT: torch.Tensor | None) -> None:
        """Make the cache end at `position` in these rows, and note the mask of `time` columns to come.

        Raises SessionError (columns are missing, or cannot be taken back), ProtocolError (no such row).
        """
        if position > self.length:
            raise SessionError(f"the session holds {self.length} tokens, a step at {position} does not follow")
        if rows:
            if not all(row < self.batch for row in rows):
                raise ProtocolError(f"the session has {self.batch} rows, a step continues row {max(rows)}")
            if rows != list(range(self.batch)):
                self._select(torch.tensor(rows))
        if position < self.length:
            self._rollback(position)
        if mask_BT is not None and bool(mask_BT.all()):
            mask_BT = None
        if self.mask_BS is not None or mask_BT is not None:
            old = self.mask_BS if self.mask_BS is not None else torch.ones((self.batch, self.length), dtype=torch.bool)
            new = mask_BT if mask_BT is not None else torch.ones((self.batch, time), dtype=torch.bool)
            if tuple(new.shape) != (self.batch, time):
                raise ProtocolError(f"a mask of {list(new.shape)} for a step of {self.batch} rows and {time} columns")
            self.mask_BS = torch.cat([old, new], dim=1)

    def positions(self, time: int) -> torch.Tensor:
        """Position ids [batch, time] of the `time` newest columns that `prepare` noted: real tokens, counted."""
        if self.mask_BS is None:
            return torch.arange(self.length, self.length + time).expand(self.batch, time)
        return (self.mask_BS.long().cumsum(dim=1) - 1).clamp_(min=0)[:, -time:]

    def grew(self, time: int) -> None:
        """The blocks appended `time` columns."""
        self.length += time
        for layer in self._windows():
            keep = layer.sliding_window - 1 + _ROLLBACK_COLUMNS
            if layer.is_initialized and layer.keys.shape[-2] > keep + _ROLLBACK_COLUMNS:
                layer.keys = layer.keys[:, :, -keep:]
                layer.values = layer.values[:, :, -keep:]

    def _rollback(self, position: int) -> None:
        if position == 0:
            self._start()
        else:
            remove = self.length - position
            try:
                for layer in self._windows():
                    if layer.keys.shape[-2] - remove < min(layer.sliding_window - 1, position):
                        raise ValueError("beyond what the sliding window keeps")
                self.kv.crop(-remove)
            except (RuntimeError, ValueError, NotImplementedError, AttributeError) as error:
                raise SessionError(
                    f"this model's cache cannot be rolled back from {self.length} to {position} tokens",
                    "open a new session and send the tokens again",
                ) from error
        self.length = position
        if self.mask_BS is not None:
            self.mask_BS = self.mask_BS[:, :position]

    def _select(self, rows_N: torch.Tensor) -> None:
        if self.length:
            self.kv.reorder_cache(rows_N)
        self.batch = len(rows_N)
        if self.mask_BS is not None:
            self.mask_BS = self.mask_BS[rows_N]
