"""What runs torch: of a node, and of a client for its head. One piece of work computes at any moment.

The event loop never computes and the computing threads never do I/O. Work is ordered by kind, then by rank,
then by arrival. Serving and training have a thread each, because a decoded token cannot wait for the end of a
microbatch: training asks between layers whether to give way (`give_way`), and `swarm.baton` decides, so that
both keep their share. Otherwise a running piece is never interrupted, so pieces are kept short.
"""

from __future__ import annotations

import asyncio
import enum
import heapq
import itertools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from swarm.baton import TRAINING_SHARE, Baton, Side
from swarm.errors import OutOfMemory

T = TypeVar("T")


class Priority(enum.IntEnum):
    """Lower runs first."""

    DECODE = 0
    PREFILL = 1
    TRAIN = 2
    BACKGROUND = 3


_SIDES = {
    Priority.DECODE: Side.SERVE,
    Priority.PREFILL: Side.SERVE,
    Priority.TRAIN: Side.TRAIN,
    Priority.BACKGROUND: Side.TRAIN,
}


class Compute:
    """The computing threads of one device. `stop` ends them after the piece that runs."""

    def __init__(self, training_share: float = TRAINING_SHARE, settle: Callable[[], None] | None = None) -> None:
        """As `swarm.baton.Baton` has them. Threads start with their first piece."""
        self._baton = Baton(training_share, settle)
        self._lanes = {side: _Lane(side, self._baton) for side in Side}
        self._order = itertools.count()
        self.completed = 0
        """Pieces done since the start: progress, reported apart from liveness."""

    @property
    def waiting(self) -> int:
        return sum(lane.waiting for lane in self._lanes.values())

    async def run(self, priority: Priority, function: Callable[..., T], *args: Any, rank: float = 0.0) -> T:
        """Run `function(*args)` on a computing thread and return its result. `rank`: lower runs first within a
        priority.

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

        self._lanes[_SIDES[priority]].put(priority, rank, next(self._order), piece)
        return await future

    def post(self, priority: Priority, piece: Callable[[], None]) -> None:
        """Queue a piece that delivers its own results and raises nothing."""

        def counted() -> None:
            piece()
            self.completed += 1

        self._lanes[_SIDES[priority]].put(priority, 0.0, next(self._order), counted)

    def give_way(self) -> None:
        """Called by a piece that trains, where serving may go first. Returns once it may go on."""
        self._baton.give_way()

    def stop(self) -> None:
        for lane in self._lanes.values():
            lane.stop()


class _Lane:
    """One thread and what waits for it."""

    def __init__(self, side: Side, baton: Baton) -> None:
        self._side = side
        self._baton = baton
        self._pieces: list[tuple[int, float, int, Callable[[], None] | None]] = []
        """A heap."""
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> int:
        return len(self._pieces)

    def put(self, priority: int, rank: float, number: int, piece: Callable[[], None] | None) -> None:
        with self._changed:
            heapq.heappush(self._pieces, (priority, rank, number, piece))
            self._changed.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=f"compute-{self._side.value}", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        if self._thread is not None:
            self.put(-1, 0.0, 0, None)
            self._thread.join(timeout=30)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pieces)
            # Which piece it is shows once this side may compute: a later one may go before.
            self._baton.take(self._side)
            try:
                with self._changed:
                    *_, piece = heapq.heappop(self._pieces)
                if piece is None:
                    return
                piece()
            finally:
                self._baton.give()
            del piece  # it holds what it computed on


def settle(device: torch.device) -> None:
    """Wait until the device has done what was asked of it: a GPU answers before it has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def as_out_of_memory(error: Exception) -> OutOfMemory | None:
    """The typed error for what an allocator raised; None for anything else."""
    allocator_failed = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or allocator_failed:
        failure = OutOfMemory("this node ran out of memory while computing")
        failure.__cause__ = error
        return failure
    return None
