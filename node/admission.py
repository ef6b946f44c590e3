"""Who may hold KV on this node: sessions wait for room in a queue, fair between clients.

A session is admitted when what all admitted sessions expect to hold fits into the budget; memory
itself is charged as it is used. In: sizes in bytes. Out: an admission, a place in the queue, or Busy
when the deadline passes. Never evicts anybody: `node.sessions` does.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from node.fair import FairClock
from swarm.errors import Busy, OutOfMemory

MOST_WAITING = 1024
_TELL_EVERY_S = 1.0


@dataclass(eq=False)
class _Waiting:
    size: int
    rank: tuple[float, int]
    admitted: asyncio.Event = field(default_factory=asyncio.Event)


class Admission:
    """The queue of one node. Loop only."""

    def __init__(self, room_bytes: Callable[[], int]) -> None:
        """room_bytes: what KV caches may take together, now."""
        self._room_bytes = room_bytes
        self._expected: dict[str, int] = {}
        self._queue: list[_Waiting] = []
        self._fair = FairClock()
        self._order = itertools.count()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def expected_bytes(self) -> int:
        return sum(self._expected.values())

    async def admit(
        self,
        session_id: str,
        client: str,
        size: int,
        deadline_s: float,
        tell: Callable[[int, str], Awaitable[None]],
    ) -> None:
        """Wait for room for `size` bytes. `tell(position, reason)` is called while waiting.

        Raises OutOfMemory (it can never fit) and Busy (no room within `deadline_s`).
        """
        room = self._room_bytes()
        if size > room:
            raise OutOfMemory(
                f"the session expects {size >> 20} MiB of KV cache, this node has {max(room, 0) >> 20} MiB for all",
                "ask for fewer tokens or rows, or use nodes with more memory",
            )
        if not self._queue and self.expected_bytes + size <= room:
            self._expected[session_id] = size
            return
        if len(self._queue) >= MOST_WAITING:
            raise Busy(f"{MOST_WAITING} sessions already wait for this node")
        place = _Waiting(size, (self._fair.start(client, size), next(self._order)))
        self._queue.append(place)
        self._queue.sort(key=lambda w: w.rank)
        try:
            await self._wait(place, deadline_s, tell)
            self._fair.began(place.rank[0])
            self._expected[session_id] = size
        finally:
            if place in self._queue:
                self._queue.remove(place)
            self.advance()

    async def _wait(self, place: _Waiting, deadline_s: float, tell: Callable[[int, str], Awaitable[None]]) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + deadline_s
        self.advance()
        while not place.admitted.is_set():
            position = self._queue.index(place) + 1
            left_s = until - loop.time()
            if left_s <= 0:
                raise Busy(f"no room for the session within {deadline_s:.0f} s; it was number {position} in the queue")
            await tell(position, f"waiting for {place.size >> 20} MiB of KV cache")
            try:
                async with asyncio.timeout(min(_TELL_EVERY_S, left_s)):
                    await place.admitted.wait()
            except TimeoutError:
                continue

    def release(self, session_id: str) -> None:
        """The session ended; whoever fits now is admitted."""
        if self._expected.pop(session_id, None) is not None:
            self.advance()

    def advance(self) -> None:
        """Admit from the front of the queue while there is room."""
        room = self._room_bytes() - self.expected_bytes
        for place in self._queue:
            if place.admitted.is_set():
                room -= place.size  # on its way out of the queue
                continue
            if place.size > room:
                return  # no overtaking: a large session would starve
            place.admitted.set()
            room -= place.size
