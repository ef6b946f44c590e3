"""A record stays alive whatever single writes do, and a warning means that nobody has it."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from node.announcing import WRITES_AT_ONCE, keep_announced

_REFRESH_S = 0.01


class Dht:
    """Writes that end when the test says so."""

    def __init__(self) -> None:
        self.begun: asyncio.Queue[asyncio.Future[bool]] = asyncio.Queue()
        self.first = asyncio.Event()

    async def write(self) -> bool:
        ends = asyncio.get_running_loop().create_future()
        self.begun.put_nowait(ends)
        return bool(await ends)


async def test_it_writes_again_and_says_once_that_it_is_seen() -> None:
    dht = Dht()
    task = asyncio.create_task(keep_announced(dht.write, dht.first.set, _REFRESH_S))
    (await dht.begun.get()).set_result(True)
    await dht.first.wait()
    dht.first.clear()
    for _ in range(3):
        (await dht.begun.get()).set_result(True)
    assert not dht.first.is_set()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_write_that_hangs_delays_no_other_up_to_a_limit() -> None:
    dht = Dht()
    task = asyncio.create_task(keep_announced(dht.write, dht.first.set, _REFRESH_S))
    hanging = [await dht.begun.get() for _ in range(WRITES_AT_ONCE)]
    hanging[1].set_result(True)
    await dht.first.wait()
    (await dht.begun.get()).set_result(True)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert all(ends.cancelled() for ends in (hanging[0], *hanging[2:]))


async def test_refusing_an_overtaken_write_is_no_failure() -> None:
    dht = Dht()
    with capture_logs() as logs:
        task = asyncio.create_task(keep_announced(dht.write, dht.first.set, _REFRESH_S))
        older, newer = await dht.begun.get(), await dht.begun.get()
        newer.set_result(True)
        await dht.first.wait()
        older.set_result(False)
        (await dht.begun.get()).set_result(True)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert not logs


async def test_a_refusal_and_a_newer_success_at_once_are_no_failure() -> None:
    dht = Dht()
    with capture_logs() as logs:
        task = asyncio.create_task(keep_announced(dht.write, dht.first.set, _REFRESH_S))
        older, newer = await dht.begun.get(), await dht.begun.get()
        older.set_result(False)
        newer.set_result(True)
        await dht.first.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert not logs


async def test_a_refusal_while_a_newer_write_is_under_way_waits_for_its_end() -> None:
    """Replicas may have taken the newer one already, which then waits for one that hangs."""
    dht = Dht()
    with capture_logs() as logs:
        task = asyncio.create_task(keep_announced(dht.write, dht.first.set, _REFRESH_S))
        older, newer = await dht.begun.get(), await dht.begun.get()
        older.set_result(False)
        await dht.begun.get()  # so the older one has been looked at
        newer.set_result(True)
        await dht.first.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert not logs


@pytest.mark.parametrize(("refusals", "warnings"), [(1, 0), (2, 1), (3, 2)])
async def test_what_nobody_took_is_written_again_soon(refusals: int, warnings: int) -> None:
    """Once may mean that peers have the record already."""
    dht = Dht()
    with capture_logs() as logs:
        task = asyncio.create_task(keep_announced(dht.write, dht.first.set, 3600.0))
        async with asyncio.timeout(60):
            for _ in range(refusals):
                (await dht.begun.get()).set_result(False)
            (await dht.begun.get()).set_result(True)
        await dht.first.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert [entry["event"] for entry in logs] == ["not_announced"] * warnings
