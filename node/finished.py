"""Adapters of finished jobs, on their way from the coordinator into this node's store.

In: what each poll names. Out: files that are kept and announced. One download at a time, beside the poll, which is this
node's heartbeat. What fails is said and tried again while polls name it; it never ends the node.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import structlog

from node.adapters import AdapterStore
from node.link import Link
from swarm.errors import SwarmError
from swarm.net.view import AdapterInfo, FileInfo
from swarm.wire.v1 import coordinator_pb2 as pb

_AGAIN_S = 30.0
log = structlog.get_logger()


class FinishedAdapters:
    """Of one coordinator. Used on the loop."""

    def __init__(self, link: Link, store: AdapterStore, again_s: float = _AGAIN_S) -> None:
        self._link = link
        self._store = store
        self._again_s = again_s
        self._named: dict[str, AdapterInfo] = {}
        self._task: asyncio.Task[None] | None = None

    def name(self, finished: Iterable[pb.FinishedAdapter]) -> None:
        """These are to be held, the last one of a name; returns at once."""
        self._named = {adapter.name: _info(adapter) for adapter in finished}
        if self._missing() and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._fetch_missing())

    def _missing(self) -> list[AdapterInfo]:
        return [info for info in self._named.values() if not self._store.holds(info)]

    async def _fetch_missing(self) -> None:
        while missing := self._missing():
            for info in missing:
                try:
                    await self._fetch(info)
                except SwarmError as error:
                    log.warning("adapter_not_held", name=info.name, round=info.round, error=str(error))
            if self._missing():
                await asyncio.sleep(self._again_s)

    async def _fetch(self, info: AdapterInfo) -> None:
        contents = {}
        for file in info.files:
            contents[file.name] = await self._link.call(
                lambda client, f=file: client.get_blob(f.sha256, f.size)  # type: ignore[misc]
            )
        await asyncio.to_thread(self._store.add, info, contents)
        await self._store.announce()

    async def settled(self) -> None:
        """Returns once all that was named is held."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


def _info(finished: pb.FinishedAdapter) -> AdapterInfo:
    files = tuple(FileInfo(file.name, file.sha256, file.size) for file in finished.files)
    return AdapterInfo(finished.name, finished.job_id, finished.round, files, ())
