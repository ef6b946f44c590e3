"""Steps on blobs in threads, of which one machine has few: whoever would wait in one waits before it.

In: a step that blocks and the blob it is about. Out: its result. A blob may take minutes to be compared with its
name, and dozens may ask for it meanwhile: each would block a thread that a job's durable steps need.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Concatenate, ParamSpec, TypeVar

from coordinator.blobs import STRIPES, stripe

P = ParamSpec("P")
T = TypeVar("T")


class Turns:
    """One turn for each lock of `coordinator.blobs`: a thread that has begun finds it free."""

    def __init__(self) -> None:
        self._turns = [asyncio.Lock() for _ in range(STRIPES)]

    async def take(
        self, step: Callable[Concatenate[bytes, P], T], sha256: bytes, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Raises what `step` raises. One that has begun goes on if the caller is cancelled, and keeps its turn."""
        turn = self._turns[stripe(sha256)]
        await turn.acquire()
        running = asyncio.ensure_future(asyncio.to_thread(step, sha256, *args, **kwargs))
        running.add_done_callback(partial(_over, turn))
        return await asyncio.shield(running)


def _over(turn: asyncio.Lock, _: asyncio.Future[T]) -> None:
    turn.release()
