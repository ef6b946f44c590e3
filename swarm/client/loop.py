"""An event loop on a thread of its own that owns one SwarmClient, for callers that are not asynchronous.

In: functions that return coroutines, from any thread. Out: their results, or what they raise. Ctrl-C in
the caller cancels the coroutine, waits until it has ended and is then raised as ever: no call goes on
behind the caller's back. The thread is a daemon; `close` (or the end of the interpreter, through the
owner's finalizer) leaves the client, so that the libp2p daemon ends with it.

Never blocks the event loop, and never blocks in `spawn`, which finalizers call.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any, TypeVar

from swarm.client.swarm import SwarmClient
from swarm.errors import SessionError

T = TypeVar("T")

_CANCEL_TIMEOUT_S = 10.0
"""A cancelled step ends within milliseconds unless the loop itself is stuck."""
_CLOSE_TIMEOUT_S = 30.0


class ClientLoop:
    """A thread that runs an event loop inside `async with opening as client`. Raises what entering that raises."""

    def __init__(self, opening: AbstractAsyncContextManager[SwarmClient]) -> None:
        """opening: a client, or what yields one (`open_client`)."""
        self._opening = opening
        self._loop = _new_loop()
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._loop.run_forever, name="swarm-client", daemon=True)
        self._thread.start()
        try:
            self.client = self.call(self._enter)
        except BaseException:
            self._closed = True
            self._end()
            raise

    @property
    def closed(self) -> bool:
        return self._closed

    def call(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run `make()` on the loop and return its result. Raises what it raises, and SessionError once closed."""
        self._refuse_if_closed()
        return self._run(make)

    def spawn(self, make: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Run `make()` on the loop some time and forget it; nothing happens once closed. Safe in finalizers."""
        if not self._closed:
            with suppress(RuntimeError):  # closed by another thread just now
                self._loop.call_soon_threadsafe(self._start, make, Future[object]())

    def close(self) -> None:
        """Leave the client and end the thread. Safe to call twice, and from the thread itself."""
        # A finalizer can run inside another call of this method, in the same thread: never wait for the lock.
        if not self._lock.acquire(blocking=False):
            return
        try:
            if self._closed:
                return
            self._closed = True
            if threading.current_thread() is self._thread:
                task = self._loop.create_task(self._leave())
                task.add_done_callback(lambda _: self._loop.stop())
                return
            try:
                self._run(self._leave, _CLOSE_TIMEOUT_S)
            finally:
                self._end()
        finally:
            self._lock.release()

    async def _enter(self) -> SwarmClient:
        return await self._opening.__aenter__()

    async def _leave(self) -> None:
        await self._opening.__aexit__(None, None, None)

    def _run(self, make: Callable[[], Coroutine[Any, Any, T]], timeout_s: float | None = None) -> T:
        if threading.current_thread() is self._thread:
            raise SessionError("a call from the client's own event loop would wait for itself", "use SwarmClient there")
        outcome: Future[T] = Future()
        started: list[asyncio.Task[T]] = []
        self._loop.call_soon_threadsafe(lambda: started.append(self._start(make, outcome)))
        try:
            return outcome.result(timeout_s)
        except BaseException:
            if not outcome.done():  # Ctrl-C, or the time limit
                self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in started])
                _wait(outcome)
            raise

    def _start(self, make: Callable[[], Coroutine[Any, Any, T]], outcome: Future[T]) -> asyncio.Task[T]:
        async def supervised() -> T:
            return await make()

        task = self._loop.create_task(supervised())
        task.add_done_callback(lambda done: _settle(done, outcome))
        return task

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=_CLOSE_TIMEOUT_S)
        if not self._thread.is_alive():
            self._loop.run_until_complete(_cancel(asyncio.all_tasks(self._loop)))
            self._loop.close()

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise SessionError("the model's connection to the swarm was closed", "load the model again")


def _settle(task: asyncio.Task[T], outcome: Future[T]) -> None:
    if task.cancelled():
        outcome.set_exception(SessionError("the call was cancelled", "make it again"))
    elif (error := task.exception()) is not None:
        outcome.set_exception(error)
    else:
        outcome.set_result(task.result())


async def _cancel(tasks: set[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _wait(outcome: Future[Any]) -> None:
    """Until a cancelled call has ended, however it ended."""
    try:
        outcome.exception(_CANCEL_TIMEOUT_S)
    except TimeoutError:
        return


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
