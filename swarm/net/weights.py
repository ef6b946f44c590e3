"""A model's frozen tensors and small files, from a node that has them to one that joins.

`serve_weights` answers a stream's requests one after the other: the description of the checkpoint,
a small file, the manifest of a part, a tensor's raw bytes from any offset on, in pieces of at most
1 MiB. So many streams at once and no more; a reader that stalls is let go. `Ask` is the other end.
What is to be believed is decided in `swarm.net.peer_source`, not here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import structlog

from swarm.errors import (
    BlocksMissing,
    Busy,
    FrameTooLarge,
    InputError,
    PeerLost,
    ProtocolError,
    StorageError,
    SwarmError,
)
from swarm.model.checkpoint import Checkpoint
from swarm.model.holdings import Holdings, canonical
from swarm.model.sources import Located
from swarm.net.p2p import Peer
from swarm.wire.frames import FrameStream
from swarm.wire.v1 import common_pb2
from swarm.wire.v1 import weights_pb2 as pb
from swarm.wire.version import check_hello, hello

PROTOCOL = "/swarm/weights/1"
PIECE_BYTES = 1024 * 1024
_STREAMS = 4
"""Readers at once: each may keep a disk and the uplink busy."""
_REQUEST_TIMEOUT_S = 60.0
_SEND_TIMEOUT_S = 60.0
_TURN_AWAY_TIMEOUT_S = 5.0
_TURNED_AWAY = 16
"""Readers that are told so at once; others see their stream end."""
_RECEIVE_TIMEOUT_S = 30.0
_HASHING_TIMEOUT_S = 120.0
"""Of a first manifest: the holder may have to read a block of several GB from a slow disk."""
log = structlog.get_logger()
Content = bytes | Located
Holder = tuple[str, tuple[str, ...]]
"""Peer id and addresses."""


async def serve_weights(
    peer: Peer, checkpoint: Checkpoint, cache: Path | None = None, streams: int = _STREAMS
) -> Holdings:
    """Answer from a checkpoint until the peer stops. The holdings returned can make a seal."""
    holdings = Holdings(checkpoint, cache)
    busy = turned_away = 0

    async def handle(stream: FrameStream[pb.WeightsFrame]) -> None:
        nonlocal busy, turned_away
        if busy >= streams:
            if turned_away < _TURNED_AWAY:
                turned_away += 1
                try:
                    taken = Busy(f"this node sends weights to {busy} others already", "ask another node, or wait")
                    await _turn_away(stream, taken)
                finally:
                    turned_away -= 1
            return
        busy += 1
        try:
            await _answer(stream, holdings)
        except TimeoutError:
            log.info("weights_reader_let_go", peer=stream.peer, reason="it stalled")
        finally:
            busy -= 1

    await peer.serve(PROTOCOL, pb.WeightsFrame, handle, max_received_bytes=0)
    return holdings


async def _answer(stream: FrameStream[pb.WeightsFrame], holdings: Holdings) -> None:
    while True:
        async with asyncio.timeout(_REQUEST_TIMEOUT_S):
            received = await stream.receive()
        if received is None:
            return
        request = received[0].request
        try:
            check_hello(request.hello, holdings.checkpoint.model_hash)
            content = await asyncio.to_thread(_find, holdings, request)
            size = content.size if isinstance(content, Located) else len(content)
            if request.offset > size:
                raise InputError(f"'{request.name[:80]}' has {size} bytes, not {request.offset}")
        except SwarmError as error:
            await _refuse(stream, error)
            continue
        async with asyncio.timeout(_SEND_TIMEOUT_S):
            await stream.send(pb.WeightsFrame(size=size - request.offset))
        async for piece in _pieces(content, request.offset):
            async with asyncio.timeout(_SEND_TIMEOUT_S):
                await stream.send(pb.WeightsFrame(piece=pb.WeightsPiece()), piece)


def _find(holdings: Holdings, request: pb.WeightsRequest) -> Content:
    if request.item == pb.WEIGHTS_ITEM_DESCRIPTION:
        return holdings.describe()
    if request.item == pb.WEIGHTS_ITEM_FILE:
        return holdings.file(request.name)
    if request.item == pb.WEIGHTS_ITEM_MANIFEST:
        return canonical(holdings.manifest(request.name))
    if request.item == pb.WEIGHTS_ITEM_TENSOR:
        return holdings.tensor(request.name)
    raise ProtocolError(f"this node gives nothing of kind {request.item}")


async def _pieces(content: Content, offset: int) -> AsyncIterator[bytes]:
    """Content from an offset on; the disk is never read on the loop."""
    if isinstance(content, bytes):
        for at in range(offset, len(content), PIECE_BYTES):
            yield content[at : at + PIECE_BYTES]
        return
    left = content.size - offset
    with await asyncio.to_thread(content.path.open, "rb") as file:
        file.seek(content.offset + offset)
        while left > 0:
            piece = await asyncio.to_thread(file.read, min(left, PIECE_BYTES))
            if not piece:
                raise StorageError(f"{content.path} became shorter while it was sent")
            left -= len(piece)
            yield piece


async def _refuse(stream: FrameStream[pb.WeightsFrame], error: SwarmError) -> None:
    async with asyncio.timeout(_SEND_TIMEOUT_S):
        await stream.send(pb.WeightsFrame(error=common_pb2.Error(code=error.code, cause=error.cause, fix=error.fix)))


async def _turn_away(stream: FrameStream[pb.WeightsFrame], error: SwarmError) -> None:
    """Refuse and let the reader close: a stream closed under an unread request may lose the answer."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_TURN_AWAY_TIMEOUT_S):
            if await stream.receive() is not None:
                await _refuse(stream, error)
                await stream.receive()


class Ask:
    """A stream to one holder. Use from the loop; `close` when done."""

    def __init__(self, stream: FrameStream[pb.WeightsFrame], peer_id: str, model_hash: bytes) -> None:
        self._stream = stream
        self._model_hash = model_hash
        self.peer_id = peer_id

    @classmethod
    async def dial(cls, peer: Peer, holder: Holder, model_hash: bytes) -> Ask:
        """Raises PeerLost."""
        return cls(await peer.dial(holder[0], holder[1], PROTOCOL, pb.WeightsFrame), holder[0], model_hash)

    def close(self) -> None:
        with suppress(Exception):  # the daemon may be gone
            self._stream.close()

    async def whole(self, item: pb.WeightsItem.ValueType, name: str, max_bytes: int) -> bytes:
        """A description, file or manifest. Raises PeerLost, FrameTooLarge, ProtocolError, BlocksMissing, Busy."""
        left = await self.begin(item, name, 0)
        if left > max_bytes:
            raise FrameTooLarge(f"node {self.peer_id} wants to send {left} bytes as {name or 'description'}")
        content = bytearray()
        while len(content) < left:
            content += await self.piece(left - len(content))
        return bytes(content)

    async def begin(self, item: pb.WeightsItem.ValueType, name: str, offset: int) -> int:
        """Ask for something from an offset on; how many bytes come now.

        Raises PeerLost, ProtocolError, BlocksMissing (it does not hold that), Busy.
        """
        request = pb.WeightsRequest(hello=hello(self._model_hash), item=item, name=name, offset=offset)
        await self._stream.send(pb.WeightsFrame(request=request))
        header, _ = await self._receive(_HASHING_TIMEOUT_S)
        if not header.HasField("size"):
            raise ProtocolError(f"node {self.peer_id} answers with a piece of nothing")
        return header.size

    async def piece(self, left: int) -> bytes:
        """The next piece of at most `left` bytes. Raises PeerLost, ProtocolError."""
        header, payload = await self._receive(_RECEIVE_TIMEOUT_S)
        if not header.HasField("piece") or not 0 < len(payload) <= min(left, PIECE_BYTES):
            raise ProtocolError(f"node {self.peer_id} sends pieces that do not fit")
        return payload

    async def _receive(self, timeout_s: float) -> tuple[pb.WeightsFrame, bytes]:
        try:
            async with asyncio.timeout(timeout_s):
                received = await self._stream.receive()
        except TimeoutError as error:
            raise PeerLost(f"node {self.peer_id} stopped sending") from error
        if received is None:
            raise PeerLost(f"node {self.peer_id} closed the stream")
        header, payload = received
        if header.HasField("error"):
            cause = f"node {self.peer_id} refuses: {header.error.cause[:500]}"
            # A stranger chooses these words: no other kind, or it could pass for an error of this machine.
            known = {BlocksMissing.code: BlocksMissing, Busy.code: Busy}
            raise known.get(header.error.code, PeerLost)(cause, header.error.fix[:500])
        return header, payload
