from __future__ import annotations

import asyncio

import pytest

from swarm.errors import FrameTooLarge, PeerLost, ProtocolError
from swarm.wire.frames import FrameStream
from swarm.wire.v1 import chain_pb2 as pb


async def pair(cap: int = 1 << 20) -> tuple[FrameStream[pb.Frame], FrameStream[pb.Frame], asyncio.StreamWriter]:
    """Two ends of a real socket, and the raw writer of the first."""
    accepted: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Future()
    server = await asyncio.start_server(lambda r, w: accepted.set_result((r, w)), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    other = await accepted
    server.close()
    sent: list[int] = []
    one = FrameStream(reader, writer, pb.Frame, count=sent.append, max_payload_bytes=cap)
    one.sent = sent  # type: ignore[attr-defined]
    return one, FrameStream(*other, pb.Frame, max_payload_bytes=cap), writer


async def test_frames_arrive_in_order_and_bytes_are_counted() -> None:
    one, two, _ = await pair()
    total = 0
    for seq in range(5):
        frame, payload = pb.Frame(forward=pb.Forward(seq=seq)), bytes([seq]) * 1000 * seq
        await one.send(frame, payload)
        total += 8 + len(frame.SerializeToString()) + len(payload)
        received = await two.receive()
        assert received == (frame, payload)
    assert sum(one.sent) == total  # type: ignore[attr-defined]
    one.close()
    assert await two.receive() is None


@pytest.mark.parametrize("raw", [b"\xff\xff\xff\xff\x00\x00\x00\x00", b"\x00\x00\x00\x02\xff\xff\xff\xff"])
async def test_announced_lengths_beyond_the_caps_are_refused_unread(raw: bytes) -> None:
    _, two, writer = await pair()
    writer.write(raw)
    with pytest.raises(FrameTooLarge):
        await two.receive()


async def test_a_frame_cut_anywhere_is_a_lost_peer() -> None:
    frame = pb.Frame(forward=pb.Forward(seq=7)).SerializeToString()
    raw = len(frame).to_bytes(4, "big") + (4).to_bytes(4, "big") + frame + b"data"
    for end in range(1, len(raw)):
        _, two, writer = await pair()
        writer.write(raw[:end])
        writer.close()
        with pytest.raises(PeerLost):
            await two.receive()


async def test_a_header_that_does_not_parse() -> None:
    _, two, writer = await pair()
    writer.write(b"\x00\x00\x00\x03\x00\x00\x00\x00\xff\xff\xff")
    with pytest.raises(ProtocolError):
        await two.receive()


async def test_sending_beyond_the_cap_is_refused_before_anything_is_sent() -> None:
    one, two, _ = await pair(cap=10)
    with pytest.raises(FrameTooLarge):
        await one.send(pb.Frame(close=pb.Close()), bytes(11))
    await one.send(pb.Frame(close=pb.Close()), bytes(10))
    assert await two.receive() == (pb.Frame(close=pb.Close()), bytes(10))
