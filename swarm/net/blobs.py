"""Files between peers, named by hash: how an adapter reaches whoever needs it.

One stream a file: the request names a SHA-256 and where to go on, the answer is the size and
then pieces of at most 256 KiB. The reader verifies the hash; a peer that sends anything else is
skipped and the next holder is asked.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence

import structlog

from swarm.errors import AdapterNotFound, CorruptData, FrameTooLarge, PeerLost, ProtocolError, SwarmError
from swarm.net.p2p import Peer
from swarm.net.view import AdapterInfo, FileInfo
from swarm.wire.frames import FrameStream
from swarm.wire.v1 import common_pb2
from swarm.wire.v1 import records_pb2 as pb

PROTOCOL = "/swarm/blob/1"
_PIECE_BYTES = 256 * 1024
_IDLE_TIMEOUT_S = 15.0
log = structlog.get_logger()


async def serve_blobs(peer: Peer, find: Callable[[bytes], bytes | None]) -> None:
    """Answer requests from `find(sha256) -> content or None`."""

    async def handle(stream: FrameStream[pb.BlobFrame]) -> None:
        received = await stream.receive()
        if received is None:
            return
        request = received[0].request
        content = find(request.sha256)
        if content is None:
            missing = AdapterNotFound(f"this node does not hold the file {request.sha256.hex()[:16]}")
            error = common_pb2.Error(code=missing.code, cause=missing.cause, fix=missing.fix)
            await stream.send(pb.BlobFrame(error=error))
            return
        await stream.send(pb.BlobFrame(size=len(content)))
        for start in range(min(request.offset, len(content)), len(content), _PIECE_BYTES):
            await stream.send(pb.BlobFrame(piece=pb.Piece()), content[start : start + _PIECE_BYTES])
        await stream.receive()  # the reader closes once it has everything

    await peer.serve(PROTOCOL, pb.BlobFrame, handle, max_received_bytes=0)


async def fetch_adapter(peer: Peer, adapter: AdapterInfo, max_bytes: int) -> dict[str, bytes]:
    """All files of an announced adapter, by name. Raises AdapterNotFound, FrameTooLarge."""
    return {file.name: await fetch_file(peer, adapter.holders, file, max_bytes) for file in adapter.files}


async def fetch_file(
    peer: Peer, holders: Sequence[tuple[str, tuple[str, ...]]], file: FileInfo, max_bytes: int
) -> bytes:
    """One file from whichever holder answers first in order; verified by hash."""
    if file.size > max_bytes:
        raise FrameTooLarge(f"the file {file.name} has {file.size} bytes, {max_bytes} are allowed")
    reasons = []
    for peer_id, addrs in holders:
        try:
            return await _fetch_from(peer, peer_id, addrs, file)
        except SwarmError as error:
            log.warning("blob_holder_failed", peer=peer_id, file=file.name, error=str(error))
            reasons.append(f"{peer_id[-6:]}: {error.cause}")
    raise AdapterNotFound(f"no node could send {file.name} ({'; '.join(reasons) or 'nobody announces it'})")


async def _fetch_from(peer: Peer, peer_id: str, addrs: tuple[str, ...], file: FileInfo) -> bytes:
    stream = await peer.dial(peer_id, addrs, PROTOCOL, pb.BlobFrame)
    try:
        await stream.send(pb.BlobFrame(request=pb.BlobRequest(sha256=file.sha256)))
        content = bytearray()
        size = -1
        while size < 0 or len(content) < size:
            async with asyncio.timeout(_IDLE_TIMEOUT_S):
                received = await stream.receive()
            if received is None:
                raise PeerLost(f"node {peer_id} closed the stream")
            reply, piece = received
            if reply.HasField("error"):
                raise SwarmError.from_code(reply.error.code, reply.error.cause, reply.error.fix)
            if reply.HasField("size"):
                size = reply.size
                if size != file.size:
                    raise ProtocolError(f"node {peer_id} holds {size} bytes, {file.size} announced")
            content += piece
            if size >= 0 and len(content) > size:
                raise ProtocolError(f"node {peer_id} sends more than it announced")
    except TimeoutError as error:
        raise PeerLost(f"node {peer_id} stopped sending") from error
    finally:
        stream.close()
    if hashlib.sha256(content).digest() != file.sha256:
        raise CorruptData(f"node {peer_id} sent another content for {file.name}")
    return bytes(content)
