"""Batches made on a thread, so that tokenizing never holds the event loop up: of an inner step while the one before it
is computed.

In: a function that makes the batch of a step from nothing but the step's number. Out: the same batches in the same
order, and what a step's batch fails with at that step. A thread cannot be cancelled: whoever leaves
waits for it, so nothing is tokenized for nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


async def on_thread(function: Callable[..., T], *args: object) -> T:
    """`function(*args)` on a thread; if the caller is cancelled, once the thread is done."""
    task = asyncio.create_task(asyncio.to_thread(function, *args))
    try:
        return await asyncio.shield(task)
    finally:
        await _end(task)


class OneAhead(Generic[T]):
    """What `make(step)` gives, step by step, one step ahead of who takes it. Of one event loop; close it."""

    def __init__(self, make: Callable[[int], T], steps: int) -> None:
        """steps: their number; nothing beyond the last one is made."""
        self._make = make
        self._steps = steps
        self._coming: tuple[int, asyncio.Task[T]] | None = None

    async def take(self, step: int) -> T:
        """The batch of this step. Raises what `make` does."""
        if self._coming is None or self._coming[0] != step:
            await self.close()
            self._begin(step)
        assert self._coming is not None
        made = await asyncio.shield(self._coming[1])
        self._coming = None
        if step + 1 < self._steps:
            self._begin(step + 1)
        return made

    def _begin(self, step: int) -> None:
        self._coming = (step, asyncio.create_task(asyncio.to_thread(self._make, step)))

    async def close(self) -> None:
        """Returns once no thread makes anything; what was not taken is dropped."""
        if self._coming is not None:
            await _end(self._coming[1])
            self._coming = None

    async def __aenter__(self) -> OneAhead[T]:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


async def _end(task: asyncio.Task[T]) -> None:
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()  # looked at: who needed it was told, and for anybody else it is no failure
