"""A coordinator behind its real gRPC server, called over TLS as a volunteer calls it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from coordinator_sim import identity
from coordinator_swarm import Swarm, opened
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from swarm.wire.rpc import COORDINATOR_SERVICE, Channel, RpcServer
from swarm.wire.tls import ServerTls


class RemoteService:
    """The methods of the service by their Python names; each call is signed by the caller's own key."""

    def __init__(self, channels: dict[str, Channel]) -> None:
        self._channels = channels

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        method = COORDINATOR_SERVICE.methods_by_name["".join(word.capitalize() for word in name.split("_"))]
        reply = GetMessageClass(method.output_type)

        async def call(caller: str, request: Message) -> Any:
            path = f"/{COORDINATOR_SERVICE.full_name}/{method.name}"
            return await self._channels[caller].call(path, request, reply, 30.0)

        return call


@asynccontextmanager
async def served(folder: Path, callers: tuple[str, ...], **settings: object) -> AsyncIterator[Swarm]:
    """An open coordinator whose `service` is the one at the other end of a socket, for these callers."""
    tls = ServerTls.load_or_create(folder)
    async with opened(folder, **settings) as swarm:
        server = RpcServer(COORDINATOR_SERVICE, swarm.service, tls)
        port = await server.start("127.0.0.1", 0)
        channels = {
            identity(name).peer_id: await Channel.connect(f"127.0.0.1:{port}", tls.fingerprint, identity(name))
            for name in callers
        }
        swarm.service = RemoteService(channels)  # type: ignore[assignment]
        try:
            yield swarm
        finally:
            for channel in channels.values():
                await channel.close()
            await server.stop(0)
