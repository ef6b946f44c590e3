"""Adapters of committed rounds that are not kept: made when a file is asked for, held while it is read.

In: a job's results, a round and the hash of a file. Out: its bytes, the same as when the round was committed. Nothing
is written: what is made stays in memory until it has not been read for a while, or room is needed for others. One
round at a time is made, for all who wait for it, and few may wait: each takes a core, whoever asks for how many.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog

from coordinator.replay import Parameters
from coordinator.results import JobResults
from coordinator.storage import Storage
from swarm.errors import BeingMade, CorruptData
from swarm.ids import sha256

_MOST = 8
"""Rounds being made or waiting for it."""
_LEAST_HELD = 2
"""Whatever their size: two who read in turns must not make each other's round be made again for every piece."""
_HELD_BYTES = 512 * 1024**2
"""What more of them may take together."""
_IDLE_S = 60.0
Key = tuple[str, bytes]
"""Job, and the hash of the parameters: a round that was discarded has other ones."""
log = structlog.get_logger()


@dataclass(frozen=True)
class _Made:
    round: int
    params: Parameters
    """To make a later round from."""
    files: Mapping[bytes, bytes]

    @property
    def size(self) -> int:
        return sum(value.nbytes for value in self.params.values()) + sum(map(len, self.files.values()))


class PastRounds:
    """Of all jobs. Use from the loop; call `stop` before the storage is closed."""

    def __init__(self, storage: Storage, wait_s: float) -> None:
        self._storage = storage
        self._wait_s = wait_s
        self._one = asyncio.Lock()
        self._under_way: dict[Key, asyncio.Task[_Made]] = {}
        self._held: OrderedDict[Key, _Made] = OrderedDict()
        self._idle: asyncio.TimerHandle | None = None
        self._stopping = False

    async def stop(self) -> None:
        """Give up what is under way."""
        self._stopping = True
        if self._under_way:
            await asyncio.wait(self._under_way.values())
        if self._idle is not None:
            self._idle.cancel()

    async def file(self, results: JobResults, kept: Collection[int], round: int, digest: bytes) -> bytes:
        """A file of the round's adapter. `kept`: rounds whose state is here, to make it from.

        Raises BeingMade: not within the time of a call, or others wait already; CorruptData: an update is damaged or
        gone, or this release writes other files; StorageError.
        """
        outcome = await asyncio.to_thread(self._storage.outcomes.of, results.job_id, round)
        make = partial(self._make, results, kept, round)
        made = await self._get((results.job_id, outcome.params_hash), round, make)
        content = made.files.get(digest)
        if content is None:
            raise CorruptData(
                f"the adapter of round {round} was written by another release, or under another name of the model:"
                f" none of its files is {digest.hex()[:12]} now",
                "export a later round, or use the release that trained it",
            )
        return content

    async def _get(self, key: Key, round: int, make: Callable[[Key], Coroutine[Any, Any, _Made]]) -> _Made:
        made = self._held.get(key)
        if made is None:
            task = self._under_way.get(key)
            if task is None:
                if len(self._under_way) >= _MOST:
                    await asyncio.wait(
                        self._under_way.values(), timeout=self._wait_s, return_when=asyncio.FIRST_COMPLETED
                    )
                    raise BeingMade(f"the adapters of {_MOST} other rounds are made first")
                task = asyncio.get_running_loop().create_task(make(key))
                task.add_done_callback(lambda ended: ended.exception())  # nobody may be waiting any more
                self._under_way[key] = task
            # Not cancelled with its caller: who asks again finds it further.
            done, _ = await asyncio.wait({task}, timeout=self._wait_s)
            if not done:
                raise BeingMade(f"the adapter of round {round} is being made")
            made = task.result()
        self._hold(key, made)
        return made

    async def _make(self, results: JobResults, kept: Collection[int], round: int, key: Key) -> _Made:
        try:
            async with self._one:
                start = await self._start(results.job_id, round)
                params, exported = await asyncio.to_thread(
                    results.replay, self._storage, round, start, kept, lambda: self._stopping
                )
                made = _Made(round, params, {sha256(content): content for content in exported.values()})
                self._hold(key, made)
                log.info("past_round_made", job_id=results.job_id, round=round)
                return made
        except CorruptData as error:
            raise CorruptData(
                f"the adapter of round {round} cannot be made: {error.cause}",
                "export another round, or restore the coordinator's data folder from a backup",
            ) from error
        finally:
            del self._under_way[key]

    async def _start(self, job_id: str, round: int) -> tuple[int, Parameters] | None:
        """The nearest earlier round that is held and was not discarded."""
        earlier = [(made.round, key) for key, made in self._held.items() if key[0] == job_id and made.round < round]
        for number, key in sorted(earlier, reverse=True):
            outcome = await asyncio.to_thread(self._storage.outcomes.find, job_id, number)
            if outcome is not None and outcome.params_hash == key[1] and key in self._held:
                return number, self._held[key].params
        return None

    def _hold(self, key: Key, made: _Made) -> None:
        self._held[key] = made
        self._held.move_to_end(key)
        while len(self._held) > _LEAST_HELD and sum(other.size for other in self._held.values()) > _HELD_BYTES:
            self._held.popitem(last=False)
        if self._idle is not None:
            self._idle.cancel()
        self._idle = asyncio.get_running_loop().call_later(_IDLE_S, self._held.clear)
