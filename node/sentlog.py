"""What a hop sent on for a session, kept so that a replacement of the next hop can be filled from it.

Kept in the encoding it was sent in: 2 bytes a value and column, about a twentieth of the KV cache
that would be lost. Bounded: beyond its limit the log is dropped, and the client replays its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from swarm.wire.tensors import pack, unpack
from swarm.wire.v1 import common_pb2

_FRAME_COLUMNS = 256


@dataclass
class _Sent:
    position: int
    columns: int
    """Of the payload's columns, how many still count; the rest was rolled back."""
    meta: common_pb2.TensorMeta
    payload: bytes


class SentLog:
    """Columns [start, end) of what was sent. Empty: start == end."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._entries: list[_Sent] = []
        self.nbytes = 0
        self.start = 0
        self.end = 0

    def add(self, position: int, meta: common_pb2.TensorMeta, payload: bytes) -> None:
        """Columns from `position` on were sent; what was kept of later ones is void."""
        self.truncate(position)
        if position != self.end:
            self.clear(position)
        columns = int(meta.shape[1])
        self._entries.append(_Sent(position, columns, meta, payload))
        self.nbytes += len(payload)
        self.end = position + columns
        if self.nbytes > self._limit_bytes:
            self.clear(self.end)

    def truncate(self, position: int) -> None:
        """Forget columns from `position` on."""
        while self._entries and self._entries[-1].position >= position:
            self.nbytes -= len(self._entries.pop().payload)
        if self._entries:
            last = self._entries[-1]
            last.columns = min(last.columns, position - last.position)
        self.end = min(self.end, position)
        self.start = min(self.start, self.end)

    def clear(self, position: int = 0) -> None:
        """Forget everything; the next column is `position`."""
        self._entries.clear()
        self.nbytes = 0
        self.start = self.end = position

    def frames(self, start: int, end: int) -> Iterator[tuple[int, common_pb2.TensorMeta, bytes]]:
        """(position, meta, payload) that together are columns [start, end), as few frames as are sensible.

        The caller has checked `self.start <= start` and `end <= self.end`.
        """
        gathered: list[torch.Tensor] = []
        position, columns = start, 0
        for entry in [*self._entries, None]:
            full = columns >= _FRAME_COLUMNS
            if gathered and (entry is None or full):
                meta, payload = pack(torch.cat(gathered, dim=1), self._entries[0].meta.encoding)
                yield position, meta, payload
                position += columns
                gathered, columns = [], 0
            if entry is None or entry.position + entry.columns <= start or entry.position >= end:
                continue
            values = unpack(entry.meta, entry.payload, torch.float32, torch.device("cpu"))
            kept = values[:, max(0, start - entry.position) : min(entry.columns, end - entry.position)]
            gathered.append(kept)
            columns += kept.shape[1]
