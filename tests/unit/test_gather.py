from __future__ import annotations

import asyncio

from swarm.gather import Gatherer


class _Batches:
    """Starts are counted; the test decides when a batch takes its items and ends."""

    def __init__(self) -> None:
        self.starts = 0
        self.gatherer = Gatherer[str](self._start, most=64)

    def _start(self) -> None:
        self.starts += 1

    def run(self, took_s: float = 0.02) -> list[str]:
        items = self.gatherer.take()
        self.gatherer.finished(took_s)
        return items


async def test_a_single_source_never_waits() -> None:
    batches = _Batches()
    for number in range(3):
        batches.gatherer.add(str(number), "only")
        assert batches.starts == number + 1
        assert batches.run() == [str(number)]


async def test_what_comes_while_a_batch_runs_makes_the_next_one() -> None:
    batches = _Batches()
    batches.gatherer.add("a0", "a")
    taken = batches.gatherer.take()
    for source in "bcd":
        batches.gatherer.add(f"{source}0", source)
    assert batches.starts == 1
    batches.gatherer.finished(0.02)
    assert taken == ["a0"]
    assert batches.starts == 2
    assert batches.run() == ["b0", "c0", "d0"]


async def test_a_batch_waits_for_half_of_the_active_sources() -> None:
    batches = _Batches()
    for source in "abcd":
        batches.gatherer.add(source, source)
    batches.run()
    batches.run()
    started = batches.starts
    batches.gatherer.add("a", "a")
    assert batches.starts == started
    batches.gatherer.add("b", "b")
    assert batches.starts == started + 1
    assert sorted(batches.run()) == ["a", "b"]


async def test_nobody_waits_longer_than_a_batch_takes() -> None:
    batches = _Batches()
    for source in "abcdefgh":
        batches.gatherer.add(source, source)
    batches.run()
    batches.run()
    started, begun = batches.starts, asyncio.Event()
    inner = batches.gatherer._start
    batches.gatherer._start = lambda: (inner(), begun.set())[0]
    batches.gatherer.add("a", "a")
    assert batches.starts == started
    async with asyncio.timeout(1.0):
        await begun.wait()
    assert batches.run() == ["a"]


async def test_items_that_are_left_go_into_the_next_batch() -> None:
    batches = _Batches()
    for number in range(5):
        batches.gatherer.add(str(number), "only")

    def leave(items: list[str]) -> list[str]:
        rest = items[2:]
        del items[2:]
        return rest

    assert batches.gatherer.take(leave) == ["0", "1"]
    batches.gatherer.finished(0.02)
    assert batches.starts == 2
    assert batches.gatherer.take(leave) == ["2", "3"]
