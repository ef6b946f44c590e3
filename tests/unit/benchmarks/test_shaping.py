from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.links import LinkProcess
from benchmarks.shaping import Lane, Link, Shape

PIECES = st.lists(st.tuples(st.floats(0, 0.5), st.integers(1, 20_000)), min_size=1, max_size=40)


@given(PIECES, st.floats(1_000, 1e7))
def test_a_lane_keeps_order_and_never_exceeds_its_rate(pieces: list[tuple[float, int]], rate: float) -> None:
    lane, shape = Lane(), Shape(rate_bytes_s=rate)
    ready_s, sent = 100.0, []
    for wait_s, size in pieces:
        ready_s += wait_s
        sent.append((ready_s, lane.admit(ready_s, size, shape), size))
    for first in range(len(sent)):
        total = 0
        for _, left_s, size in sent[first:]:
            total += size
            # All these bytes went out after the first of them was ready, one after the other.
            assert left_s >= sent[first][0] + total / rate - 1e-6
    left = [left_s for _, left_s, _ in sent]
    assert left == sorted(left)
    # An idle line sends at once: the last byte leaves no later than everything before it allows.
    total = sum(size for _, _, size in sent)
    assert left[-1] <= max(ready for ready, _, _ in sent) + total / rate + 1e-6


def test_impossible_shapes() -> None:
    for wrong in ({"delay_s": -1.0}, {"rate_bytes_s": 0.0}):
        with pytest.raises(ValueError):
            Shape(**wrong)


@asynccontextmanager
async def echo(chunk: int = 1 << 16) -> AsyncIterator[tuple[str, int]]:
    """A server that sends back what it gets, and ends when the other side ends."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(chunk):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield "127.0.0.1", int(server.sockets[0].getsockname()[1])


async def dial(link: Link) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", link.port)


async def test_bytes_pass_unchanged_are_counted_and_never_come_early() -> None:
    async with echo() as target, Link(target, Shape(0.01)) as link:
        reader, writer = await dial(link)
        payload = bytes(range(256)) * 4000
        writer.write(payload)
        assert await reader.readexactly(len(payload)) == payload
        took_s = []
        for _ in range(10):
            sent_s = time.perf_counter()
            writer.write(b"ping")
            await reader.readexactly(4)
            took_s.append(time.perf_counter() - sent_s)
        assert min(took_s) >= 0.02
        assert median(took_s) < 0.04  # 1 ms over, on an idle machine
        counts = link.counts
        assert (counts.up_bytes, counts.down_bytes) == (len(payload) + 40, len(payload) + 40)
        assert (counts.connections, counts.open) == (1, 1)
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()
        async with asyncio.timeout(5):
            await link.idle.wait()


async def test_connections_share_the_rate_and_a_new_one_takes_a_round_trip() -> None:
    rate, size = 1_000_000.0, 100_000
    async with echo() as target, Link(target, Shape(0.02, rate)) as link:

        async def one() -> float:
            began_s = time.perf_counter()
            reader, writer = await dial(link)
            writer.write(bytes(size))
            await reader.readexactly(size)
            writer.close()
            return time.perf_counter() - began_s

        # There and back 2 × 20 ms, connecting 40 ms; the way back starts while the way there still sends.
        assert await one() >= 0.08 + size / rate
        assert max(await asyncio.gather(one(), one())) >= 0.08 + 2 * size / rate


async def test_a_receiver_that_does_not_read_stops_the_sender_and_memory_stays_bounded() -> None:
    release = asyncio.Event()
    got = asyncio.get_running_loop().create_future()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        total = 0
        while data := await reader.read(1 << 20):
            total += len(data)
        writer.close()
        got.set_result(total)

    server = await asyncio.start_server(slow, "127.0.0.1", 0)
    shape = Shape(0.001, 50_000_000.0)
    async with server, Link(("127.0.0.1", server.sockets[0].getsockname()[1]), shape) as link:
        _, writer = await dial(link)
        size = 64 << 20
        writer.write(bytes(size))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await writer.drain()  # the sender waits
        release.set()
        writer.write_eof()
        async with asyncio.timeout(20):
            assert await got == size
        assert shape.held_bytes <= link.counts.most_held_bytes <= shape.held_bytes + (1 << 18)  # and one read
        writer.close()


async def test_freezing_stalls_and_thawing_delivers_everything() -> None:
    async with echo() as target, Link(target) as link:
        reader, writer = await dial(link)
        writer.write(b"a")
        assert await reader.readexactly(1) == b"a"
        link.freeze()
        writer.write(b"bc")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await reader.readexactly(1)
        new = asyncio.create_task(dial(link))
        other_reader, other = await new
        other.write(b"x")
        link.thaw()
        assert await reader.readexactly(2) == b"bc"
        assert await other_reader.readexactly(1) == b"x"
        for each in (writer, other):
            each.close()


async def test_cutting_resets_old_and_new_connections_until_restored() -> None:
    async with echo() as target, Link(target, Shape(0.005)) as link:
        reader, writer = await dial(link)
        writer.write(b"a")
        assert await reader.readexactly(1) == b"a"
        link.cut()
        with pytest.raises(ConnectionError):
            await reader.readexactly(1)
        assert link.counts.open == 0
        reader, refused = await dial(link)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        link.restore()
        reader, again = await dial(link)
        again.write(b"b")
        assert await reader.readexactly(1) == b"b"
        for each in (writer, refused, again):
            each.close()


async def test_a_reset_and_a_missing_target_reach_the_one_who_dialled() -> None:
    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    target = ("127.0.0.1", server.sockets[0].getsockname()[1])
    async with Link(target) as link:
        for gone in (False, True):
            if gone:
                server.close()
                await server.wait_closed()
            reader, writer = await dial(link)
            with suppress(ConnectionError):
                assert await reader.read() == b""
            writer.close()
        async with asyncio.timeout(5):
            await link.idle.wait()


async def test_the_delay_changes_at_run_time() -> None:
    async with echo() as target, Link(target, Shape(30.0)) as link:
        link.reshape(Shape(0.0))
        reader, writer = await dial(link)
        link.reshape(Shape(30.0))
        writer.write(b"a")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await reader.readexactly(1)
        link.reshape(Shape(0.0))  # also for what is under way
        assert await reader.readexactly(1) == b"a"
        writer.close()


async def test_links_in_a_process_of_their_own(tmp_path: Path) -> None:
    async with echo() as target:
        with ExitStack() as stack:
            name = f"{target[0]}:{target[1]}"
            links = await asyncio.to_thread(LinkProcess, stack, tmp_path, [name, name], 5.0, 20.0)
            reader, writer = await asyncio.open_connection("127.0.0.1", links.ports[1])
            sent_s = time.perf_counter()
            writer.write(b"abc")
            assert await reader.readexactly(3) == b"abc"
            assert time.perf_counter() - sent_s >= 0.01
            first, second = await asyncio.to_thread(links.counts)
            assert (first.up_bytes, second.up_bytes, second.down_bytes) == (0, 3, 3)
            await asyncio.to_thread(links.order, "cut", 1)
            with pytest.raises(ConnectionError):
                await reader.readexactly(1)
            writer.close()
