"""Nodes that leave when nothing of theirs is awaited: nobody waits for them afterwards, before or after a restart."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

from coordinator_sim import SimNode, job_spec, submit
from coordinator_swarm import ONE, Swarm, opened

from coordinator.round_model import Standing
from swarm.errors import DiskFull
from swarm.ids import Span
from swarm.wire.v1 import coordinator_pb2 as pb

SILENT_S = 15.0
WHOLE = Span(0, 4)
SCHEDULE = ONE | {"rounds": 9, "round_deadline_s": 3000.0}


async def with_pipelines(swarm: Swarm, *names: str) -> list[SimNode]:
    """Each node alone is a pipeline of round 1 of a job that is scored; in the order in which they are asked."""
    nodes = await swarm.join(*((name, WHOLE) for name in names))
    spec = job_spec(schedule=SCHEDULE | {"min_pipelines": len(names)}, eval={"data": "heldout.jsonl"})
    await submit(swarm.service, "me", spec)
    parts = {node.peer: await node.assigned() for node in nodes}
    return sorted(nodes, key=lambda node: parts[node.peer].pipeline_id)


async def contribute(*nodes: SimNode) -> None:
    for node in nodes:
        assert (await node.train(await node.assigned())).verdict == pb.VERDICT_HELD


async def all_leave_but(swarm: Swarm, *staying: SimNode) -> None:
    """Silence, and it is noticed."""
    swarm.clock.advance(0.7 * SILENT_S)
    for node in staying:
        await node.poll()
    swarm.clock.advance(0.7 * SILENT_S)
    async with asyncio.timeout(20):
        while len(swarm.coordinator.nodes) > len(staying):
            await swarm.coordinator._shared.assignments.ticket().wait()


def asked(swarm: Swarm) -> str | None:
    """The lead that is asked for a score."""
    scorer = swarm.driver.state.scorer
    pipeline = None if scorer is None else swarm.driver.state.pipeline(scorer)
    return None if pipeline is None else pipeline.members[0].peer


async def test_who_left_after_contributing_is_not_asked_for_a_score(tmp_path: Path) -> None:
    async with opened(tmp_path, silent_s=SILENT_S) as swarm:
        first, other = await with_pipelines(swarm, "a", "b")
        await contribute(first)
        await all_leave_but(swarm, other)
        await contribute(other)
        now_s = swarm.clock.now_s
        await swarm.until(lambda: asked(swarm) == other.peer)
        part = (await other.poll()).assignment
        assert part.score
        await other.score(part)
        await swarm.until(lambda: swarm.driver.state.round == 2)
        assert swarm.clock.now_s == now_s


async def test_who_came_back_with_other_blocks_is_not_asked_for_a_score(tmp_path: Path) -> None:
    async with opened(tmp_path, silent_s=SILENT_S) as swarm:
        first, other = await with_pipelines(swarm, "a", "b")
        await contribute(first)
        first.span = Span(0, 1)
        await first.register()
        await contribute(other)
        await swarm.until(lambda: asked(swarm) == other.peer)


async def test_two_that_leave_together_are_replaced_by_the_third(tmp_path: Path) -> None:
    async with opened(tmp_path, silent_s=SILENT_S) as swarm:
        first, second, third = await with_pipelines(swarm, "a", "b", "c")
        await contribute(first, second, third)
        await swarm.until(lambda: asked(swarm) == first.peer)
        seen = []
        async with asyncio.TaskGroup() as group:
            group.create_task(all_leave_but(swarm, third))
            await swarm.until(lambda: seen.append(asked(swarm)) or asked(swarm) == third.peer)
        assert second.peer not in seen


class Refusing:
    """A disk that has no room for one kind of record once it is told so; knows when a node was forgotten."""

    def __init__(self) -> None:
        self.record = ""
        self._forgot = threading.Event()

    async def forgot(self) -> None:
        assert await asyncio.to_thread(self._forgot.wait, 20)

    def __call__(self, name: str) -> None:
        if name == "after commit node lost":
            self._forgot.set()
        if self.record and name.startswith("before commit") and self.record in name:
            raise DiskFull(f"cannot store '{name}'")


async def test_a_restart_between_forgetting_a_node_and_giving_up_its_pipeline(tmp_path: Path) -> None:
    disk = Refusing()
    async with opened(tmp_path, silent_s=SILENT_S, durable_point=disk) as swarm:
        first, other = await with_pipelines(swarm, "a", "b")
        disk.record = "PipelineLost"
        await all_leave_but(swarm, other)
        await swarm.until(lambda: "recording a lost node failed" in swarm.driver.reason)
        await disk.forgot()
        assert len(swarm.driver.state.with_standing(Standing.ACTIVE)) == 2
    async with opened(tmp_path) as swarm:
        await swarm.until(lambda: len(swarm.driver.state.with_standing(Standing.ACTIVE)) == 1)
        (lost,) = swarm.driver.state.with_standing(Standing.LOST)
        assert lost.members[0].peer == first.peer
        assert "had left when the coordinator was started again" in lost.reason


async def test_a_restart_between_forgetting_a_node_and_asking_another_for_a_score(tmp_path: Path) -> None:
    disk = Refusing()
    async with opened(tmp_path, silent_s=SILENT_S, durable_point=disk) as swarm:
        first, other = await with_pipelines(swarm, "a", "b")
        await contribute(first, other)
        await swarm.until(lambda: asked(swarm) == first.peer)
        disk.record = "ScoringBegun"
        await all_leave_but(swarm, other)
        await swarm.until(lambda: "recording a lost node failed" in swarm.driver.reason)
        await disk.forgot()
        assert asked(swarm) == first.peer
    async with opened(tmp_path) as swarm:
        await swarm.until(lambda: asked(swarm) == other.peer)
