"""When to start a batch: of the steps of a node's sessions, and of a client's hidden states for its head.

While one batch runs, items gather for the next. Two rows cost nearly what eight do, and sessions that go
round a chain of nodes scatter into batches of two by themselves; so a batch starts when half of the sources
that are active have an item, or after as long as a batch takes. A single source never waits.
`add` and `finished` belong to the event loop, `take` to the thread that computes.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

_ACTIVE_S = 0.3
_ACTIVE_BATCHES = 8
"""A source that added an item so lately, in seconds or batches, is expected to add another."""
_WEIGHT = 0.2
T = TypeVar("T")


class Gatherer(Generic[T]):
    """Items that wait to be computed together."""

    def __init__(self, start: Callable[[], None], most: int) -> None:
        """start: queues a batch, which must `take` and, in the end, be `finished`. most: items worth waiting for."""
        self._start = start
        self._most = most
        self._lock = threading.Lock()
        self._items: list[T] = []
        self._seen_s: dict[str, float] = {}
        self._started = False
        self._timer: asyncio.TimerHandle | None = None
        self._batch_s = 0.02

    def add(self, item: T, source: str) -> None:
        """An item is ready. Starts a batch, now or in a while."""
        self._seen_s.pop(source, None)
        self._seen_s[source] = time.monotonic()
        with self._lock:
            self._items.append(item)
        self._consider()

    def take(self, leave: Callable[[list[T]], list[T]] | None = None) -> list[T]:
        """The items of the batch that starts; `leave` takes from a list those that wait for the next one."""
        with self._lock:
            items = self._items
            self._items = [] if leave is None else leave(items)
        return items

    def finished(self, took_s: float) -> None:
        """The batch that was started is done."""
        self._started = False
        self._batch_s += _WEIGHT * (took_s - self._batch_s)
        self._consider()

    def _consider(self) -> None:
        if self._started or not self._items:
            return
        if len(self._items) >= self._enough():
            self._begin()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._batch_s, self._begin)

    def _begin(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._started = True
        self._start()

    def _enough(self) -> int:
        since_s = time.monotonic() - max(_ACTIVE_BATCHES * self._batch_s, _ACTIVE_S)
        for source, seen_s in list(self._seen_s.items()):
            if seen_s >= since_s:
                break  # they are in the order in which they were seen
            del self._seen_s[source]
        return min((len(self._seen_s) + 1) // 2, self._most)
