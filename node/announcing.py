"""Keep a record alive in the DHT: write it again and again, whatever a single write does.

In: a function that writes the record and says whether anybody took it. A peer of the DHT that hangs holds a write up
for seconds, so the next one does not wait for it; one that a newer write has overtaken is refused for its age, which
is no failure. Neither is a single refusal: hivemind hands a peer that was out of reach for a moment all records once
it is met again, so it may have this one already.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

import structlog

WRITES_AT_ONCE = 4
"""What may hang before the oldest write is waited for."""
AGAIN_S = 1.0
"""Between writes when nobody took the last one."""
log = structlog.get_logger()


async def keep_announced(
    write: Callable[[], Coroutine[None, None, bool]], first: Callable[[], None], refresh_s: float
) -> None:
    """Write every `refresh_s` seconds until cancelled; `first` is called once a write was taken.

    Raises what `write` and `first` raise.
    """
    clock_s = asyncio.get_running_loop().time
    writes: dict[asyncio.Task[bool], int] = {}
    begun, newest_taken, newest_refused, refusals, pause_s = 0, 0, 0, 0, refresh_s
    try:
        while True:
            if len(writes) < WRITES_AT_ONCE:
                begun += 1
                writes[asyncio.create_task(write())] = begun
            began_s = clock_s()
            while writes and (left_s := began_s + pause_s - clock_s()) > 0:
                ended, _ = await asyncio.wait(writes, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    number, taken = writes.pop(task), task.result()
                    if not taken:
                        newest_refused = max(newest_refused, number)
                        continue
                    if not newest_taken:
                        first()
                    newest_taken, refusals, pause_s = max(newest_taken, number), 0, refresh_s
                # A newer one under way may be what stood in the way of an older one.
                if newest_refused > max(newest_taken, *writes.values(), 0):
                    newest_refused, refusals, pause_s = 0, refusals + 1, AGAIN_S
                    if refusals > 1:
                        log.warning("not_announced", reason="no DHT peer took the record; trying again")
            await asyncio.sleep(max(0.0, began_s + pause_s - clock_s()))
    finally:
        for task in writes:
            task.cancel()
        await asyncio.gather(*writes, return_exceptions=True)
