"""libp2p, through hivemind's daemon wrapper, in our own event loop.

One `Peer` a process: it owns the daemon (`swarm.net.daemon`), dials by peer id, opens and accepts
long-lived streams of capped frames, and holds the DHT node. It never uses `hivemind.DHT`, which
forks a process that gRPC does not survive.
"""

from __future__ import annotations

import asyncio
import os
import platform
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import structlog
from google.protobuf.message import Message
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError
from hivemind.p2p.p2p_daemon_bindings.datastructures import PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure
from hivemind.utils.multiaddr import Multiaddr

from swarm.errors import (
    ClockError,
    IdentityError,
    InputError,
    JoinError,
    NetworkError,
    PeerLost,
    PlatformError,
    PortInUse,
    SwarmError,
)
from swarm.identity import Identity
from swarm.net.daemon import ended, libp2p_daemon, wait_end
from swarm.net.records import SignedRecords
from swarm.wire.frames import FrameStream

_LEAVE_TIMEOUT_S = 2.0
_ANSWER_TIMEOUT_S = 2.0
_BAN_S = 2.0
"""How long the DHT waits for a peer, and how long it then asks others instead (doubled each time it is silent
again). A record lives for 7 s: with hivemind's 3 and 5 s, one frozen peer made living ones vanish from the view,
and a thawed one take its neighbours for dead."""
M = TypeVar("M", bound=Message)
log = structlog.get_logger()


@dataclass(frozen=True)
class PeerSettings:
    """How a process takes part in libp2p."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 to be reachable from other machines."""
    port: int = 0
    announce: tuple[str, ...] = ()
    """Multiaddrs to publish instead of the ones we listen on (behind a router or proxy)."""
    relay: bool = True
    """Let peers that cannot be dialled be reached through relays."""
    client_only: bool = False
    """Dial only: no listening, and no duties in the DHT (for prompting)."""
    join_timeout_s: float = 12.0


def check_platform() -> None:
    """Raises PlatformError where the bundled daemon cannot run."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise PlatformError(f"this is {platform.system()} on {platform.machine()}")


class Peer:
    """A running libp2p daemon and DHT node. Make with `start`, end with `stop`."""

    def __init__(self, p2p: Any, dht: Any, identity: Identity, addrs: tuple[str, ...], running: AsyncExitStack) -> None:
        self._p2p = p2p
        self._dht = dht
        self._running = running
        self._handlers: set[asyncio.Task[None]] = set()
        self.identity = identity
        self.addrs = addrs
        """Where others dial this process; each ends in /p2p/<peer id>."""

    @property
    def peer_id(self) -> str:
        return self.identity.peer_id

    @classmethod
    async def start(cls, identity: Identity, bootstrap: Sequence[str], settings: PeerSettings) -> Peer:
        """Start the daemon and join the DHT.

        Raises PlatformError, PortInUse, ClockError, InputError (an address that cannot be used), and
        JoinError when no bootstrap node answers within `join_timeout_s`; nothing is left running then.
        """
        check_platform()
        if identity.path is None:
            raise IdentityError("a libp2p peer needs its identity in a file")
        if settings.port and not settings.client_only:
            _check_port(settings.host, settings.port)
        listen = f"/ip4/{settings.host}/tcp/{settings.port}"
        if bootstrap:
            log.info("joining", bootstrap=list(bootstrap))
        async with AsyncExitStack() as starting:
            try:
                async with asyncio.timeout(settings.join_timeout_s):
                    p2p = await starting.enter_async_context(
                        libp2p_daemon(
                            initial_peers=list(bootstrap) or None,
                            host_maddrs=None if settings.client_only else [listen],
                            announce_maddrs=list(settings.announce) or None,
                            identity_path=str(identity.path),
                            # It would start a second daemon to find out; two processes cannot share the
                            # locked data folder.
                            check_if_identity_free=False,
                            no_listen=settings.client_only,
                            dht_mode="client" if settings.client_only else "server",
                            nat_port_map=False,
                            auto_nat=True,
                            use_relay=settings.relay,
                            use_auto_relay=False,
                        )
                    )
                    dht = await DHTNode.create(
                        p2p=p2p,
                        # The same after a restart. With a new one others would know this peer twice, send it every
                        # record twice, and take its refusal of the second for nobody's having the first.
                        node_id=DHTID.generate(source=identity.peer_id),
                        initial_peers=list(bootstrap) or None,
                        client_mode=settings.client_only,
                        record_validator=SignedRecords(identity),
                        # A lookup must see a record that another process stored a moment ago.
                        cache_locally=False,
                        cache_on_store=False,
                        cache_nearest=0,
                        cache_refresh_before_expiry=0,
                        num_replicas=5,
                        wait_timeout=_ANSWER_TIMEOUT_S,
                        blacklist_time=_BAN_S,
                    )
                    addrs = () if settings.client_only else tuple(str(a) for a in await p2p.get_visible_maddrs())
            except Exception as error:
                _raise_start_error(error, bootstrap, settings)
            return cls(p2p, dht, identity, addrs, starting.pop_all())

    async def stop(self) -> None:
        """Leave: streams end, the daemon exits, its sockets are removed."""
        for task in self._handlers:
            task.cancel()
        await asyncio.gather(*self._handlers, return_exceptions=True)
        with suppress(Exception):
            # Waits for the daemon's answers, which a daemon that just ended does not give.
            async with asyncio.timeout(_LEAVE_TIMEOUT_S):
                await self._dht.shutdown()
        await self._running.aclose()

    async def lost(self) -> NoReturn:
        """Wait until the daemon ends by itself, and raise NetworkError then."""
        status = await wait_end(self._p2p)
        raise NetworkError(f"the libp2p daemon of this process ended (exit status {status})", "start it again")

    async def serve(
        self,
        protocol: str,
        kind: type[M],
        handler: Callable[[FrameStream[M]], Awaitable[None]],
        count: Callable[[int], None] | None = None,
        *,
        max_received_bytes: int | None = None,
    ) -> None:
        """Accept streams of `protocol`; `handler` owns each until it returns. Its errors end the stream only.

        `max_received_bytes`: the largest payload a frame from the other side may have; None: any frame's."""

        async def accept(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            stream = FrameStream(
                reader,
                writer,
                kind,
                peer=info.peer_id.to_base58(),
                count=count,
                max_received_bytes=max_received_bytes,
            )
            task = asyncio.current_task()
            assert task is not None
            self._handlers.add(task)
            try:
                await handler(stream)
            except SwarmError as error:
                log.warning("stream_ended", protocol=protocol, peer=stream.peer, error=str(error))
            except asyncio.CancelledError:
                pass  # stop(): the daemon is going away
            except Exception:
                # A bug in one stream must not take the others with it; the other side sees its stream end.
                log.exception("stream_failed", protocol=protocol, peer=stream.peer)
            finally:
                self._handlers.discard(task)
                stream.close()

        await self._p2p.add_binary_stream_handler(protocol, accept)

    async def dial(
        self,
        peer_id: str,
        addrs: Sequence[str],
        protocol: str,
        kind: type[M],
        *,
        timeout_s: float = 10.0,
        count: Callable[[int], None] | None = None,
    ) -> FrameStream[M]:
        """Open a stream to a peer. Raises PeerLost."""
        try:
            async with asyncio.timeout(timeout_s):
                target = PeerID.from_base58(peer_id)
                if peer_id != self.peer_id and addrs:
                    # The record names addresses, so no search for the peer is needed. (The wrapper has
                    # no public call for it.)
                    bare = [Multiaddr(a.split("/p2p/")[0]) if "/p2p-circuit" not in a else Multiaddr(a) for a in addrs]
                    await self._p2p._client.connect(target, bare)
                _, reader, writer = await self._p2p.call_binary_stream_handler(target, protocol)
        except (
            TimeoutError,
            OSError,
            ControlFailure,
            P2PDaemonError,
            asyncio.IncompleteReadError,
            ValueError,
        ) as error:
            raise PeerLost(f"node {peer_id} does not answer").blaming(peer_id) from error
        return FrameStream(reader, writer, kind, peer=peer_id, count=count)

    async def publish(self, key: str, subkey: str, value: bytes, ttl_s: float) -> bool:
        """Store a record of ours under `key`; it is signed and expires after `ttl_s`. False: nobody took it."""
        if ended(self._p2p):
            return False
        expires = _dht_time() + ttl_s
        return bool(await self._dht.store(key, value, expires, subkey=f"{self.peer_id}/{subkey}"))

    async def lookup(self, key: str) -> dict[tuple[str, str], bytes]:
        """Live records under `key` as {(peer id, subkey): value}; signatures are already checked."""
        found = await self._dht.get(key, latest=True)
        if found is None or not isinstance(found.value, dict):
            return {}
        records = {}
        for name, entry in found.value.items():
            if isinstance(name, str) and isinstance(entry.value, bytes) and "/" in name:
                peer, _, subkey = name.partition("/")
                records[(peer, subkey)] = entry.value
        return records


def _dht_time() -> float:
    from hivemind.utils.timed_storage import get_dht_time

    return float(get_dht_time())


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PortInUse(f"cannot listen at {host}:{port}: {os.strerror(error.errno or 0)}") from error


def _raise_start_error(error: Exception, bootstrap: Sequence[str], settings: PeerSettings) -> NoReturn:
    """Turn what hivemind raises into the error that tells what to do."""
    if isinstance(error, SwarmError):
        raise error
    text = str(error)
    if "local time must be within" in text:
        raise ClockError("the clocks of this machine and of the swarm differ by more than 3 s") from error
    if "can't access this node" in text:
        raise NetworkError(
            f"the bootstrap node cannot dial this node back at {settings.host}:{settings.port}",
            "forward the port and pass --announce, or check the firewall",
        ) from error
    if "address already in use" in text:
        raise PortInUse(f"cannot listen at {settings.host}:{settings.port}: address already in use") from error
    if "multiaddr" in text.lower() or "failed to listen" in text:
        raise InputError(
            f"cannot use the addresses of this process: {text}",
            "give --host an IPv4 address of this machine, and --announce multiaddrs such as /ip4/1.2.3.4/tcp/31330",
        ) from error
    if bootstrap and isinstance(error, (TimeoutError, RuntimeError, P2PDaemonError, ControlFailure, OSError)):
        raise JoinError(f"no bootstrap node answers at {', '.join(bootstrap)}") from error
    raise NetworkError(f"the libp2p daemon did not start: {text}", "run again with --log-level debug") from error
