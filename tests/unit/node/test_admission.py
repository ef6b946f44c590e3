from __future__ import annotations

import asyncio

import pytest

from node.admission import Admission
from swarm.errors import Busy, OutOfMemory


async def _silent(position: int, reason: str) -> None:
    pass


async def _turns() -> None:
    """Let tasks that were just made come to their first real wait."""
    for _ in range(3):
        await asyncio.sleep(0)


async def test_who_does_not_fit_waits_until_somebody_leaves() -> None:
    admission = Admission(lambda: 100)
    await admission.admit("a", "one", 80, 1.0, _silent)
    told: list[int] = []

    async def tell(position: int, reason: str) -> None:
        told.append(position)

    waiting = asyncio.create_task(admission.admit("b", "two", 40, 10.0, tell))
    await _turns()
    assert told == [1]
    assert admission.waiting == 1
    admission.release("a")
    await waiting
    assert admission.expected_bytes == 40


async def test_a_deadline_names_the_place_in_the_queue() -> None:
    admission = Admission(lambda: 100)
    await admission.admit("a", "one", 100, 1.0, _silent)
    with pytest.raises(Busy, match="number 1"):
        await admission.admit("b", "two", 1, 0.05, _silent)
    assert admission.waiting == 0


async def test_what_can_never_fit_is_refused_at_once() -> None:
    with pytest.raises(OutOfMemory):
        await Admission(lambda: 100).admit("a", "one", 101, 60.0, _silent)


async def test_a_client_with_many_sessions_does_not_shut_others_out() -> None:
    admission = Admission(lambda: 10)
    await admission.admit("first", "greedy", 10, 1.0, _silent)
    order: list[str] = []

    async def ask(name: str, client: str) -> None:
        await admission.admit(name, client, 10, 10.0, _silent)
        order.append(name)
        admission.release(name)

    tasks = []
    for name, client in [("g1", "greedy"), ("g2", "greedy"), ("g3", "greedy"), ("m1", "modest")]:
        tasks.append(asyncio.create_task(ask(name, client)))
        await _turns()
        assert admission.waiting == len(tasks)
    admission.release("first")
    await asyncio.gather(*tasks)
    assert order.index("m1") <= 1


async def test_who_gives_up_leaves_the_queue() -> None:
    admission = Admission(lambda: 10)
    await admission.admit("a", "one", 10, 1.0, _silent)
    waiting = asyncio.create_task(admission.admit("b", "two", 10, 60.0, _silent))
    await _turns()
    assert admission.waiting == 1
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    admission.release("a")
    assert admission.waiting == 0
    assert admission.expected_bytes == 0
