"""Work that outlives the call that caused it: steps tried until they succeed, and one alarm.

In: coroutines. Out: their effects, `trouble` in words while a step keeps failing, and on `stop`
an orderly end: the step under way is finished, nothing new begins. Never swallows an error: each
is logged and shown. A step that meets a full disk has room made before it is tried again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import structlog

from coordinator.ports import Clock
from swarm.errors import DiskFull, SwarmError

T = TypeVar("T")
log = structlog.get_logger()


class Background:
    """`changed` is called whenever `trouble` changes, `make_room` before a step that met a full disk is tried again."""

    def __init__(
        self,
        clock: Clock,
        retry_s: float,
        changed: Callable[[], None],
        make_room: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._clock = clock
        self._retry_s = retry_s
        self._changed = changed
        self._make_room = make_room
        self._steps: set[asyncio.Task[Any]] = set()
        self._pauses: set[asyncio.Task[None]] = set()
        self._alarm: tuple[float, asyncio.Task[None]] | None = None
        self._stop = asyncio.Event()
        self.trouble = ""

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def insist(self, what: str, step: Callable[[], Awaitable[object]]) -> None:
        """Run `step` now, and again after a pause until it raises nothing."""
        if not self.stopping:
            self._track(self._steps, self._until_done(what, step))

    async def uncancelled(self, step: Coroutine[Any, Any, T]) -> T:
        """Await `step`, which goes on if the caller is cancelled: a durable step has no half."""
        return await asyncio.shield(self._track(self._steps, step))

    def set_alarm(self, at_s: float | None, ring: Callable[[], None]) -> None:
        """Call `ring` at monotonic `at_s`, in place of any earlier alarm."""
        if at_s == (self._alarm[0] if self._alarm else None):
            return
        if self._alarm is not None:
            self._alarm[1].cancel()
        self._alarm = None
        if at_s is not None and not self.stopping:
            self._alarm = (at_s, self._track(self._pauses, self._ring_at(at_s, ring)))

    async def stop(self) -> None:
        self._stop.set()
        while running := (*self._steps, *self._pauses):
            for pause in self._pauses:
                pause.cancel()
            await asyncio.wait(running)

    async def _until_done(self, what: str, step: Callable[[], Awaitable[object]]) -> None:
        failed, full = "", False
        while not self._stop.is_set():
            try:
                if full and self._make_room is not None:
                    await self._make_room()
                await step()
            except Exception as error:  # whatever it is: the job must not stand still unexplained
                if self._stop.is_set():
                    return
                full = isinstance(error, DiskFull)
                failed = f"{what} failed and is tried again: {error}"
                log.error("step_failed", step=what, error=str(error), exc_info=not isinstance(error, SwarmError))
                self._set_trouble(failed)
                await asyncio.wait((self._track(self._pauses, self._clock.sleep(self._retry_s)),))
            else:
                if failed and self.trouble == failed:
                    self._set_trouble("")
                return

    def _set_trouble(self, trouble: str) -> None:
        self.trouble = trouble
        self._changed()

    async def _ring_at(self, at_s: float, ring: Callable[[], None]) -> None:
        await self._clock.sleep(max(0.0, at_s - self._clock.monotonic()))
        self._alarm = None
        ring()

    @staticmethod
    def _track(group: set[asyncio.Task[T]], work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        group.add(task)
        task.add_done_callback(group.discard)
        return task
