"""Waking long polls: a broadcast that nobody can miss on one event loop.

Take a ticket, test the condition, then wait on that ticket: a `notify` between the three wakes
the waiter at once. Times out by the injected clock; never polls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from coordinator.ports import Clock

T = TypeVar("T")


class Signal:
    def __init__(self) -> None:
        self._event = asyncio.Event()

    def ticket(self) -> asyncio.Event:
        return self._event

    def notify(self) -> None:
        """Wake everyone who holds a ticket taken before now."""
        self._event.set()
        self._event = asyncio.Event()


async def wait_until(
    condition: Callable[[], Awaitable[T | None]], signal: Signal, timeout_s: float, clock: Clock
) -> T | None:
    """The first value of `condition` that is not None, tested again at every notification.

    None once `timeout_s` has passed. The timer exists only while there is something to wait for.
    """
    ticket = signal.ticket()
    value = await condition()
    if value is not None or timeout_s <= 0:
        return value
    timer = asyncio.ensure_future(clock.sleep(timeout_s))
    try:
        while True:
            woken = asyncio.ensure_future(ticket.wait())
            try:
                await asyncio.wait((woken, timer), return_when=asyncio.FIRST_COMPLETED)
            finally:
                woken.cancel()
            ticket = signal.ticket()
            value = await condition()
            if value is not None or timer.done():
                return value
    finally:
        timer.cancel()
