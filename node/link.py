"""The node's connection to its coordinator, which may be away for a while.

Every call the node makes is idempotent at the coordinator, so an outage is waited out: calls are
repeated with a growing pause until they succeed or the task is cancelled, and `reason` says
meanwhile what is being waited for. So is a coordinator's disk that is full or failed, and its blob store that
is away. Other errors the coordinator answers are passed on, not repeated.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from swarm.client.coordinator import CoordinatorClient
from swarm.errors import BlobStoreAway, CoordinatorLost, DiskFull, SyncFailed
from swarm.identity import Identity
from swarm.metrics import Traffic
from swarm.net.join import JoinInfo

T = TypeVar("T")
_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 5.0
log = structlog.get_logger()


class Link:
    """Calls that outlive a coordinator's restart."""

    def __init__(self, join: JoinInfo, identity: Identity, traffic: Traffic) -> None:
        self._join = join
        self._identity = identity
        self._traffic = traffic
        self._client: CoordinatorClient | None = None
        self._connecting = asyncio.Lock()
        self.reason = ""
        """Why the node waits for the coordinator, in words; empty while it answers."""

    async def call(self, action: Callable[[CoordinatorClient], Awaitable[T]]) -> T:
        """Do `action` with a connected client, again and again while nobody answers or its storage refuses."""
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                result = await action(await self._connected())
            except (CoordinatorLost, DiskFull, SyncFailed, BlobStoreAway) as error:
                if not self.reason:
                    log.warning("coordinator_away", cause=error.cause)
                self.reason = f"waiting for the coordinator: {error.cause}"
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                continue
            if self.reason:
                log.info("coordinator_back")
                self.reason = ""
            return result

    async def _connected(self) -> CoordinatorClient:
        async with self._connecting:
            if self._client is None:
                self._client = await CoordinatorClient.connect(
                    self._join.coordinator, self._join.tls_fingerprint, self._identity, self._traffic
                )
            return self._client

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
