"""Blobs of committed rounds that are damaged or gone, made again: once for all who wait for the same round.

In: a job's results and the round a blob is of. Out: the blob is whole, as it was; otherwise an error for everybody
who waited, and the next who asks begins anew. Nothing is removed for it: a damaged blob is replaced.
"""

from __future__ import annotations

import asyncio
from functools import partial

from coordinator.blobs import Blobs
from coordinator.results import JobResults
from coordinator.storage import Storage
from swarm.errors import BlobAbsent, CorruptData


class Remakes:
    """Those under way. Call `stop` before the storage is closed."""

    def __init__(self, storage: Storage, blobs: Blobs) -> None:
        self._storage = storage
        self._blobs = blobs
        self._under_way: dict[tuple[str, int], asyncio.Task[None]] = {}

    async def stop(self) -> None:
        """Finish what is under way."""
        if self._under_way:
            await asyncio.wait(self._under_way.values())

    async def remake(self, results: JobResults, round: int, blob: bytes) -> None:
        """Raises CorruptData: what it was made of is damaged or gone, too; StorageError: disk or store refuse."""
        key = (results.job_id, round)
        if key in self._under_way:
            await asyncio.shield(self._under_way[key])
        # It may have been made by now; or not, by one that had come past this blob before the damage was found.
        if await asyncio.to_thread(self._blobs.size, blob) is not None:
            return
        if key not in self._under_way:
            task = asyncio.get_running_loop().create_task(self._make(results, round))
            self._under_way[key] = task
            task.add_done_callback(partial(self._ended, key))
        await asyncio.shield(self._under_way[key])

    async def _make(self, results: JobResults, round: int) -> None:
        try:
            await asyncio.to_thread(results.remake, self._storage, round)
        except (BlobAbsent, CorruptData) as error:
            raise CorruptData(
                f"the files of round {round} are damaged or gone and cannot be made again: {error.cause}",
                "go on from a later round, or restore the coordinator's data folder from a backup",
            ) from error

    def _ended(self, key: tuple[str, int], _: asyncio.Task[None]) -> None:
        del self._under_way[key]
