"""The bootstrap node: a DHT and relay peer that join strings name.

It runs no model; the files that it was started with it serves to newcomers that have none.
"""

from __future__ import annotations

import asyncio
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
from swarm.net.weights import serve_weights

log = structlog.get_logger()


@dataclass(frozen=True)
class BootstrapSettings:
    checkpoint: Checkpoint
    data_dir: Path
    peer: PeerSettings
    others: tuple[str, ...] = ()
    """Multiaddrs of further bootstrap nodes of the same swarm."""
    seal: bool = False
    """Hash all weights into the join string, so that one honest peer is enough to fetch them from."""


async def run_bootstrap(settings: BootstrapSettings, ready: Callable[[JoinInfo], None]) -> None:
    """Serve until cancelled. Raises any SwarmError of starting up or of libp2p; nothing is left running then."""
    checkpoint = settings.checkpoint
    _ = checkpoint.config  # a model that no node could read is refused here
    async with AsyncExitStack() as stack:
        data_dir = stack.enter_context(DataDir(settings.data_dir))
        identity = Identity.load_or_create(data_dir.path / "identity.key")
        peer = await Peer.start(identity, settings.others, settings.peer)
        stack.push_async_callback(peer.stop)
        holdings = await serve_weights(peer, checkpoint)
        seal_hash = b""
        if settings.seal:
            log.info("sealing", model=checkpoint.name)
            seal_hash = await asyncio.to_thread(holdings.make_seal)
        join = JoinInfo(
            bootstrap=(*peer.addrs, *settings.others),
            model=checkpoint.name,
            revision=checkpoint.revision,
            model_hash=checkpoint.model_hash,
            tokenizer_hash=checkpoint.tokenizer_hash,
            seal_hash=seal_hash,
        )
        log.info("bootstrap_ready", peer=peer.peer_id, addrs=list(peer.addrs))
        ready(join)
        await peer.lost()
