"""Start and stop a coordinator's process: identity, TLS, the coordinator itself, and its gRPC server.

`run_coordinator` returns when it is cancelled or fails, as it does when the disk fails an fsync. It reads
the base model's configuration and tensor table, never its weights.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import structlog

from coordinator.app import Coordinator
from coordinator.ports import CoordinatorSettings, ModelFacts
from swarm.adapters.registry import ModelAdapters
from swarm.identity import Identity
from swarm.model.checkpoint import open_for
from swarm.model.families import cuts
from swarm.model.shard import head_blocks, n_blocks
from swarm.net.join import JoinInfo
from swarm.wire.rpc import COORDINATOR_SERVICE, RpcServer
from swarm.wire.tls import ServerTls

log = structlog.get_logger()


@dataclass(frozen=True)
class CoordinatorStart:
    """What whoever launches a coordinator chooses."""

    join: JoinInfo
    data_dir: Path
    model: str = ""
    host: str = "127.0.0.1"
    port: int = 31340
    announce_host: str = ""
    """Name or address that volunteers dial; empty: the one listened on."""
    blobs: str = ""
    """Folder or URL of complete blobs; empty: in the data folder."""
    settings: CoordinatorSettings = CoordinatorSettings()


async def run_coordinator(start: CoordinatorStart, ready: Callable[[JoinInfo], None]) -> None:
    """Serve until cancelled. `ready` is given the join string's content that names this coordinator.

    Raises any SwarmError of starting up, and SyncFailed; nothing is left running then.
    """
    join = start.join
    checkpoint = await asyncio.to_thread(open_for, join.model, join.revision, join.model_hash, start.model)
    facts = ModelFacts(
        name=join.model,
        revision=join.revision,
        model_hash=join.model_hash,
        n_blocks=n_blocks(checkpoint.config),
        adapters=ModelAdapters(checkpoint),
        cuts=cuts(checkpoint.config),
        head_blocks=await asyncio.to_thread(head_blocks, checkpoint),
    )
    data_dir = start.data_dir.expanduser().resolve()
    async with AsyncExitStack() as stack:
        identity = Identity.load_or_create(data_dir / "identity.key")
        tls = ServerTls.load_or_create(data_dir)
        coordinator = await Coordinator.open(data_dir, facts, identity, start.settings, blobs_at=start.blobs)
        stack.push_async_callback(coordinator.close)
        server = RpcServer(COORDINATOR_SERVICE, coordinator.service, tls)
        stack.push_async_callback(server.stop)
        port = await server.start(start.host, start.port)
        address = f"{start.announce_host or start.host}:{port}"
        log.info("coordinator_ready", address=address, peer=identity.peer_id)
        ready(join.with_coordinator(address, tls.fingerprint))
        await coordinator.halted()
