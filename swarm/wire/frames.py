"""Length-capped frames on a libp2p stream: a protobuf header and a raw payload.

    u32 header length | u32 payload length | header | payload        (big endian)

hivemind's own protobuf streams trust an 8-byte length and read without bound; these check both
lengths against caps before reading anything. A clean end of stream reads as None; an end inside
a frame is PeerLost.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

from google.protobuf.message import DecodeError, Message

from swarm.errors import FrameTooLarge, PeerLost, ProtocolError

_LENGTHS = struct.Struct(">II")
MAX_HEADER_BYTES = 256 * 1024
MAX_PAYLOAD_BYTES = 256 * 1024 * 1024
_DISCARD_BYTES = 1024 * 1024

M = TypeVar("M", bound=Message)


class FrameStream(Generic[M]):
    """One end of a stream of frames whose headers are of message type `kind`.

    Sends are serialized by a lock, so several tasks may send; one task at a time receives.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        kind: type[M],
        *,
        peer: str = "",
        count: Callable[[int], None] | None = None,
        max_payload_bytes: int = MAX_PAYLOAD_BYTES,
        max_received_bytes: int | None = None,
    ) -> None:
        """`max_received_bytes`: of a payload that comes, where less is allowed than of one that goes."""
        self._reader = reader
        self._writer = writer
        self._kind = kind
        self._count = count
        self._lock = asyncio.Lock()
        self._max_payload_bytes = max_payload_bytes
        self._max_received_bytes = max_payload_bytes if max_received_bytes is None else max_received_bytes
        self.peer = peer

    async def send(self, header: M, payload: bytes = b"") -> None:
        """Write one frame and wait until the transport took it. Raises PeerLost."""
        data = header.SerializeToString()
        if len(data) > MAX_HEADER_BYTES or len(payload) > self._max_payload_bytes:
            raise FrameTooLarge(f"frame of {len(data)} + {len(payload)} bytes is over the cap")
        async with self._lock:
            try:
                # Together: two writes become two libp2p messages, and the second wakes everyone on the way again.
                self._writer.writelines((_LENGTHS.pack(len(data), len(payload)) + data, payload))
                await self._writer.drain()
            except (ConnectionError, RuntimeError) as error:
                raise PeerLost(f"the connection to {self.peer or 'the peer'} broke while sending") from error
        if self._count is not None:
            self._count(_LENGTHS.size + len(data) + len(payload))

    async def receive(self) -> tuple[M, bytes] | None:
        """Read one frame; None at a clean end. Raises PeerLost, FrameTooLarge, ProtocolError."""
        try:
            lengths = await self._reader.readexactly(_LENGTHS.size)
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise PeerLost(f"{self.peer or 'the peer'} went away inside a frame") from error
            return None
        except ConnectionError:
            return None
        header_bytes, payload_bytes = _LENGTHS.unpack(lengths)
        if header_bytes > MAX_HEADER_BYTES or payload_bytes > self._max_received_bytes:
            raise FrameTooLarge(
                f"{self.peer or 'the peer'} announced a frame of {header_bytes} + {payload_bytes} bytes"
            )
        try:
            data = await self._reader.readexactly(header_bytes)
            payload = await self._reader.readexactly(payload_bytes) if payload_bytes else b""
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise PeerLost(f"{self.peer or 'the peer'} went away inside a frame") from error
        try:
            return self._kind.FromString(data), payload
        except DecodeError as error:
            raise ProtocolError(f"{self.peer or 'the peer'} sent a frame header that does not parse") from error

    async def discard(self) -> None:
        """Read and forget what still comes, until the other side closes. Not while a frame is being received."""
        with suppress(ConnectionError):
            while await self._reader.read(_DISCARD_BYTES):
                pass

    def close(self) -> None:
        """Close both directions; the other side reads a clean end."""
        self._writer.close()
