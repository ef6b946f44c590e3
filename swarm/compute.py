"""One thread that runs torch, fed by a priority queue: of a node, and of a client for its head.

The event loop never computes and the thread never does I/O. Work is ordered by kind, then by rank,
then by arrival: a decoded token does not wait behind a training microbatch that was queued earlier.
A running piece is never interrupted, so pieces are kept short (one block span, one batch).
"""

from __future__ import annotations

import asyncio
import enum
import itertools
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from swarm.errors import OutOfMemory

T = TypeVar("T")


class Priority(enum.IntEnum):
    """Lower runs first."""

    DECODE = 0
    PREFILL = 1
    TRAIN = 2
    BACKGROUND = 3


class Compute:
    """The compute thread of one device. `stop` ends it after the piece that runs."""

    def __init__(self) -> None:
        self._queue: queue.PriorityQueue[tuple[int, float, int, Callable[[], None] | None]] = queue.PriorityQueue()
        self._order = itertools.count()
        self._thread = threading.Thread(target=self._work, name="compute", daemon=True)
        self.completed = 0
        """Pieces done since the start: progress, reported apart from liveness."""
        self._thread.start()

    @property
    def waiting(self) -> int:
        return self._queue.qsize()

    async def run(self, priority: Priority, function: Callable[..., T], *args: Any, rank: float = 0.0) -> T:
        """Run `function(*args)` on the thread and return its result. `rank`: lower runs first within a priority.

        Raises what it raises; running out of memory becomes OutOfMemory. If the caller is
        cancelled before its turn, the piece is skipped.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def deliver(result: T | None, error: BaseException | None) -> None:
            if not future.done():
                if error is None:
                    future.set_result(result)  # type: ignore[arg-type]
                else:
                    future.set_exception(error)

        def piece() -> None:
            if future.cancelled():
                return
            result, failure = None, None
            try:
                result = function(*args)
            except Exception as error:
                failure = as_out_of_memory(error) or error
            self.completed += 1
            loop.call_soon_threadsafe(deliver, result, failure)

        self._queue.put((priority, rank, next(self._order), piece))
        return await future

    def post(self, priority: Priority, piece: Callable[[], None]) -> None:
        """Queue a piece that delivers its own results and raises nothing."""

        def counted() -> None:
            piece()
            self.completed += 1

        self._queue.put((priority, 0.0, next(self._order), counted))

    def stop(self) -> None:
        self._queue.put((-1, 0.0, next(self._order), None))
        self._thread.join(timeout=30)

    def _work(self) -> None:
        while True:
            *_, piece = self._queue.get()
            if piece is None:
                return
            piece()


def as_out_of_memory(error: Exception) -> OutOfMemory | None:
    """The typed error for what an allocator raised; None for anything else."""
    allocator_failed = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or allocator_failed:
        failure = OutOfMemory("this node ran out of memory while computing")
        failure.__cause__ = error
        return failure
    return None
