"""Real libp2p peers on loopback, each with its own identity."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from swarm.identity import Identity
from swarm.net.p2p import Peer, PeerSettings

StartPeer = Callable[[str], Awaitable[Peer]]


@pytest.fixture
async def start_peer(tmp_path: Path) -> AsyncIterator[StartPeer]:
    """Start a peer by name; the first one is everybody's bootstrap node. All stop at the end."""
    async with AsyncExitStack() as stack:
        bootstrap: list[str] = []

        async def start(name: str) -> Peer:
            identity = Identity.load_or_create(tmp_path / f"{name}.key")
            peer = await Peer.start(identity, bootstrap, PeerSettings())
            stack.push_async_callback(peer.stop)
            bootstrap.extend(peer.addrs if not bootstrap else ())
            return peer

        yield start
