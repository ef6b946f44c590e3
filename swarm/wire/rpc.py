"""Signed gRPC: what every control-plane call goes through, on both sides.

A call carries its caller's peer id, time, a nonce and an ed25519 signature over method, time,
nonce, the server's TLS fingerprint (so that it is void at any other server) and the body. The
server acts on the verified peer id only. Bodies are signed as the raw bytes that travel, hence
the handlers parse and serialize themselves instead of gRPC's generated stubs.

A SwarmError raised by the implementation reaches the caller as the same error.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
import structlog
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from swarm.errors import (
    ClockError,
    CoordinatorLost,
    FrameTooLarge,
    PortInUse,
    ProtocolError,
    SignatureError,
    SwarmError,
)
from swarm.identity import Identity, verify
from swarm.wire.tls import SERVER_NAME, ServerTls, fetch_pinned_certificate
from swarm.wire.v1 import common_pb2, coordinator_pb2

MAX_MESSAGE_BYTES = 8 * 1024 * 1024
MAX_CLOCK_SKEW_S = 60.0
_MAX_NONCES = 200_000
_GRPC_PREFIX_BYTES = 5
_ERROR_KEY = "swarm-error-bin"

R = TypeVar("R", bound=Message)
log = structlog.get_logger()


def _signed_text(method: str, stamp: str, nonce: str, fingerprint: bytes, body: bytes) -> bytes:
    parts = ("swarm-rpc-v1", method, stamp, nonce, fingerprint.hex(), hashlib.sha256(body).hexdigest())
    return "\x1f".join(parts).encode()


class _Gate:
    """Decides who called: signature, clock, and no nonce twice within the clock window."""

    def __init__(self, fingerprint: bytes) -> None:
        self._fingerprint = fingerprint
        self._nonces: OrderedDict[str, float] = OrderedDict()

    def caller(self, metadata: dict[str, str], method: str, body: bytes, now: float) -> str:
        try:
            peer, stamp, nonce = metadata["swarm-peer"], metadata["swarm-time"], metadata["swarm-nonce"]
            signature = bytes.fromhex(metadata["swarm-signature"])
            sent = float(stamp)
        except (KeyError, ValueError) as error:
            raise SignatureError("the call is not signed") from error
        if not abs(now - sent) <= MAX_CLOCK_SKEW_S:
            raise ClockError(f"the caller's clock is {sent - now:+.0f} s away from the coordinator's")
        verify(peer, _signed_text(method, stamp, nonce, self._fingerprint, body), signature)
        while self._nonces and next(iter(self._nonces.values())) < now - 2 * MAX_CLOCK_SKEW_S:
            self._nonces.popitem(last=False)
        key = f"{peer}/{nonce}"
        if key in self._nonces:
            raise SignatureError("the call was already made: it is a replay")
        if len(self._nonces) >= _MAX_NONCES:
            raise SignatureError("too many calls within a minute", "slow down")
        self._nonces[key] = now
        return peer


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


class RpcServer:
    """Serves one protobuf service; method `FooBar` is answered by `implementation.foo_bar(caller, request)`."""

    def __init__(self, service: ServiceDescriptor, implementation: object, tls: ServerTls) -> None:
        self._gate = _Gate(tls.fingerprint)
        self._server = grpc.aio.server(
            options=[
                # Two servers on one port would share its calls silently.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_concurrent_streams", 1024),
            ]
        )
        handlers = {
            method.name: grpc.unary_unary_rpc_method_handler(
                self._handler(
                    f"/{service.full_name}/{method.name}",
                    GetMessageClass(method.input_type),
                    getattr(implementation, _snake(method.name)),
                )
            )
            for method in service.methods
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))
        self._credentials = grpc.ssl_server_credentials([(tls.key_pem, tls.certificate_pem)])

    def _handler(
        self, method: str, request_type: type[Message], answer: Callable[[str, Any], Awaitable[Message]]
    ) -> Callable[[bytes, Any], Awaitable[bytes]]:
        async def handle(body: bytes, context: Any) -> bytes:
            try:
                metadata = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
                caller = self._gate.caller(metadata, method, body, time.time())
                try:
                    request = request_type.FromString(body)
                except DecodeError as error:
                    raise ProtocolError(f"the body of {method} does not parse") from error
                return (await answer(caller, request)).SerializeToString()
            except SwarmError as error:
                trailer = common_pb2.Error(code=error.code, cause=error.cause, fix=error.fix).SerializeToString()
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, error.code, ((_ERROR_KEY, trailer),))
            except asyncio.CancelledError:
                raise
            except Exception:
                # The caller gets no internals; the log of the server has them.
                log.exception("call_failed", method=method)
                raise
            raise AssertionError("abort() raises")

        return handle

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port (useful with 0). Raises PortInUse."""
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            bound = int(self._server.add_secure_port(address, self._credentials))
        except RuntimeError as error:
            raise PortInUse(f"cannot listen at {address}") from error
        if bound == 0:
            raise PortInUse(f"cannot listen at {address}")
        await self._server.start()
        return bound

    async def stop(self, grace_s: float = 1.0) -> None:
        await self._server.stop(grace_s)


class Channel:
    """A signed, pinned connection to one coordinator. Reconnects by itself; calls do not retry."""

    def __init__(self, channel: Any, address: str, fingerprint: bytes, identity: Identity) -> None:
        self._channel = channel
        self.address = address
        self._fingerprint = fingerprint
        self._identity = identity

    @classmethod
    async def connect(cls, address: str, fingerprint: bytes, identity: Identity, timeout_s: float = 10.0) -> Channel:
        """Raises CoordinatorLost, PinError."""
        host, _, port = address.rpartition(":")
        certificate = await fetch_pinned_certificate(host.strip("[]"), int(port), fingerprint, timeout_s)
        channel = grpc.aio.secure_channel(
            address,
            grpc.ssl_channel_credentials(root_certificates=certificate),
            options=[
                ("grpc.ssl_target_name_override", SERVER_NAME),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.initial_reconnect_backoff_ms", 200),
                ("grpc.max_reconnect_backoff_ms", 2000),
                ("grpc.keepalive_time_ms", 20_000),
                ("grpc.keepalive_timeout_ms", 10_000),
            ],
        )
        return cls(channel, address, fingerprint, identity)

    async def call(
        self,
        method: str,
        request: Message,
        reply_type: type[R],
        timeout_s: float,
        *,
        sent: Callable[[int], None] | None = None,
        received: Callable[[int], None] | None = None,
    ) -> R:
        """One call. Raises the SwarmError the server raised, or CoordinatorLost."""
        body = request.SerializeToString()
        if len(body) > MAX_MESSAGE_BYTES:
            raise FrameTooLarge(f"a message of {len(body)} bytes is over the cap of {MAX_MESSAGE_BYTES}")
        stamp, nonce = f"{time.time():.3f}", os.urandom(16).hex()
        signature = self._identity.sign(_signed_text(method, stamp, nonce, self._fingerprint, body))
        metadata = (
            ("swarm-peer", self._identity.peer_id),
            ("swarm-time", stamp),
            ("swarm-nonce", nonce),
            ("swarm-signature", signature.hex()),
        )
        if sent is not None:
            sent(_GRPC_PREFIX_BYTES + len(body))
        try:
            data: bytes = await self._channel.unary_unary(method)(body, metadata=metadata, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            trailer = dict(error.trailing_metadata() or ()).get(_ERROR_KEY)
            if trailer is not None:
                wire = common_pb2.Error.FromString(trailer)
                raise SwarmError.from_code(wire.code, wire.cause, wire.fix) from error
            raise CoordinatorLost(
                f"the coordinator at {self.address} did not answer {method.rsplit('/', 1)[-1]} ({error.code().name})"
            ) from error
        if received is not None:
            received(_GRPC_PREFIX_BYTES + len(data))
        return reply_type.FromString(data)

    async def close(self) -> None:
        await self._channel.close()


COORDINATOR_SERVICE: ServiceDescriptor = coordinator_pb2.DESCRIPTOR.services_by_name["Coordinator"]
