"""An open coordinator with its clock and its simulated nodes by name: what tests of its service start from."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from coordinator_sim import ManualClock, SimNode, identity, model_facts

from coordinator.app import Coordinator
from coordinator.driver import JobDriver
from coordinator.ports import CoordinatorSettings, ModelFacts
from swarm.ids import Span
from swarm.wire.v1 import coordinator_pb2 as pb

ONE_PIPELINE = (("a", Span(0, 2)), ("b", Span(2, 4)))
ONE = {"rounds": 3, "inner_steps": 3, "batch_size": 2, "max_length": 16, "round_deadline_s": 100.0}


class Swarm:
    """An open coordinator, its clock and its nodes by name."""

    def __init__(self, coordinator: Coordinator, clock: ManualClock) -> None:
        self.coordinator = coordinator
        self.service = coordinator.service
        self.clock = clock
        self.nodes: dict[str, SimNode] = {}
        self._ended: dict[str, pb.Assignment] = {}

    async def join(self, *named: tuple[str, Span]) -> list[SimNode]:
        nodes = [SimNode(self.service, name, span) for name, span in named]
        for node in nodes:
            await node.register()
            self.nodes[node.name] = node
        return nodes

    @property
    def driver(self) -> JobDriver:
        return self.coordinator.jobs.all()[0]

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what the coordinator does by itself."""
        async with asyncio.timeout(20):
            while True:
                ticket = self.driver.changed.ticket()
                if condition():
                    return
                await ticket.wait()

    async def round(self, *names: str) -> None:
        """The named nodes train the open round to its end."""
        await asyncio.gather(*(self.one(name) for name in names))

    async def one(self, name: str) -> pb.Receipt:
        # What a node has just settled may still be assigned until the next round opens.
        part = await self.nodes[name].assigned(self._ended.get(name))
        receipt = await self.nodes[name].train(part)
        await self.nodes[name].settle(part)
        self._ended[name] = part
        return receipt


@asynccontextmanager
async def opened(
    folder: Path, clock: ManualClock | None = None, model: ModelFacts | None = None, **changes: object
) -> AsyncIterator[Swarm]:
    clock = clock or ManualClock()
    settings = replace(CoordinatorSettings(), **changes)  # type: ignore[arg-type]
    coordinator = await Coordinator.open(folder, model or model_facts(), identity(), settings, clock)
    try:
        yield Swarm(coordinator, clock)
    finally:
        await coordinator.close()
