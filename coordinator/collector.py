"""When the blobs that nobody needs any more are removed.

In: the rows that refer to blobs, and the blobs. Out: room: now and then by the clock, and whenever it is asked for,
by a full disk or at a job's end; not with every round, since a pass goes through the rows and blobs of all rounds.
One pass at a time; never of what a row refers to, nor of what was used a moment ago (`coordinator.blobs`). A pass that
a disk refuses loses nothing but room, and is logged.
"""

from __future__ import annotations

import asyncio

import structlog

from coordinator.background import Background
from coordinator.blobs import Blobs
from coordinator.ports import Clock, CoordinatorSettings
from coordinator.storage import Storage
from swarm.errors import StorageError

PASSES_A_GRACE = 4
"""What is unused for the whole grace is gone after a quarter more at the latest."""
_LEAST_S = 1.0

log = structlog.get_logger()


class Collector:
    """Collects from `start` until `stop`."""

    def __init__(self, storage: Storage, blobs: Blobs, settings: CoordinatorSettings, clock: Clock) -> None:
        self._storage = storage
        self._blobs = blobs
        self._kept_rounds = settings.kept_rounds
        self._every_s = max(settings.blob_grace_s / PASSES_A_GRACE, _LEAST_S)
        self._clock = clock
        self._background = Background(clock, settings.retry_s, lambda: None)
        self._lock = asyncio.Lock()
        self._begun = 0

    def start(self) -> None:
        self._background.set_alarm(self._clock.monotonic() + self._every_s, self._ring)

    async def stop(self) -> None:
        """Finish the pass under way, begin no other."""
        await self._background.stop()

    async def collect(self) -> None:
        """One whole pass from now on. Those who ask while one is under way share the next."""
        before = self._begun
        async with self._lock:
            if self._begun == before:
                self._begun += 1
                await self._pass()

    def _ring(self) -> None:
        self._background.insist("making room", self.collect)
        self.start()

    async def _pass(self) -> None:
        try:
            referenced = await asyncio.to_thread(self._storage.referenced_blobs, self._kept_rounds)
            removed = await asyncio.to_thread(self._blobs.collect, referenced)
        except StorageError as error:
            log.warning("collect_failed", error=str(error))
            return
        if removed:
            log.info("blobs_removed", files=removed)
