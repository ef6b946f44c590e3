"""The bootstrap node: a DHT and relay peer that join strings name. It holds no model and no data."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import structlog

from swarm.datadir import DataDir
from swarm.identity import Identity
from swarm.model.checkpoint import Checkpoint
from swarm.net.join import JoinInfo
from swarm.net.p2p import Peer, PeerSettings

log = structlog.get_logger()


@dataclass(frozen=True)
class BootstrapSettings:
    checkpoint: Checkpoint
    data_dir: Path
    peer: PeerSettings
    others: tuple[str, ...] = ()
    """Multiaddrs of further bootstrap nodes of the same swarm."""


async def run_bootstrap(settings: BootstrapSettings, ready: Callable[[JoinInfo], None]) -> None:
    """Serve until cancelled. Raises any SwarmError of starting up or of libp2p; nothing is left running then."""
    checkpoint = settings.checkpoint
    _ = checkpoint.config  # a model that no node could read is refused here
    async with AsyncExitStack() as stack:
        data_dir = stack.enter_context(DataDir(settings.data_dir))
        identity = Identity.load_or_create(data_dir.path / "identity.key")
        peer = await Peer.start(identity, settings.others, settings.peer)
        stack.push_async_callback(peer.stop)
        join = JoinInfo(
            bootstrap=(*peer.addrs, *settings.others),
            model=checkpoint.name,
            revision=checkpoint.revision,
            model_hash=checkpoint.model_hash,
        )
        log.info("bootstrap_ready", peer=peer.peer_id, addrs=list(peer.addrs))
        ready(join)
        await peer.lost()
