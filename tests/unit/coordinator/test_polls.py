"""Long polls are woken by what changes in them, and by nothing else."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from coordinator_sim import TWO_PIPELINES, SimNode, job_spec, submit
from coordinator_swarm import ONE, opened

from coordinator.round_model import JobState
from swarm.wire.v1 import coordinator_pb2 as pb

POEMS = pb.GetJobRequest(job="poems")


async def test_a_held_contribution_wakes_no_poll(tmp_path: Path) -> None:
    async with opened(tmp_path) as swarm:
        nodes = await swarm.join(*TWO_PIPELINES)
        await submit(swarm.service, "me", job_spec(schedule=ONE | {"min_pipelines": 2}))
        parts = {node.name: await node.assigned() for node in nodes}
        ticket = swarm.coordinator._shared.assignments.ticket()
        for node in nodes[:3]:
            await node.train(parts[node.name])
        assert sum(len(pipeline.held) for pipeline in swarm.driver.state.pipelines) == 3
        assert not ticket.is_set()
        # The last one closes the round: everybody has a part in the next.
        following = [asyncio.create_task(node.assigned(parts[node.name])) for node in nodes]
        await nodes[3].train(parts[nodes[3].name])
        assert {part.round for part in await asyncio.gather(*following)} == {2}


async def test_whatever_changes_in_a_poll_wakes_it(tmp_path: Path) -> None:
    """Over the life of a job: at every step of it, a poll that would say something else has been woken."""
    async with opened(tmp_path) as swarm:
        nodes = await swarm.join(*TWO_PIPELINES)
        asked = [*nodes, SimNode(swarm.service, "stranger", nodes[0].span)]
        signal = swarm.coordinator._shared.assignments
        seen: set[int] = set()

        async def versions() -> list[int]:
            return [(await node.poll()).version for node in asked]

        async def watch() -> None:
            ticket, before = signal.ticket(), await versions()
            while swarm.driver.state.job is not JobState.FINISHED:
                stepped = swarm.driver.changed.ticket()
                now = await versions()
                assert now == before or ticket.is_set()
                seen.update(now)
                ticket, before = signal.ticket(), now
                await stepped.wait()

        async def owner() -> None:
            await swarm.until(lambda: swarm.driver.committed_round == 1)
            await swarm.service.pause_job("me", POEMS)
            await swarm.until(lambda: swarm.driver.state.job is JobState.PAUSED)
            await swarm.service.change_job("me", pb.ChangeJobRequest(job="poems", settings={"inner.lr": "0.5"}))
            await swarm.service.resume_job("me", pb.ResumeJobRequest(job="poems", round=0))

        spec = job_spec(schedule=ONE | {"min_pipelines": 2, "rounds": 3}, eval={"data": "heldout.jsonl"})
        await submit(swarm.service, "me", spec)
        async with asyncio.TaskGroup() as group:
            for node in nodes:
                node.owner_interferes = True
            running = [group.create_task(node.run()) for node in nodes]
            group.create_task(owner())
            await group.create_task(watch())
            for task in running:
                task.cancel()
        adapters = {tuple(a.round for a in (await node.poll()).adapters) for node in asked}
        assert adapters == {(3,)}
        assert len(seen) > 3 * len(nodes)


async def test_a_log_never_runs_ahead_of_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads that a job is paused finds it paused: it would wait for a line that never comes."""
    async with opened(tmp_path) as swarm:
        await swarm.join(*TWO_PIPELINES)
        await submit(swarm.service, "me", job_spec(schedule=ONE | {"min_pipelines": 9}))
        stored, go_on = threading.Event(), threading.Event()
        store = swarm.driver.ledger.store

        def store_and_stop(*args: Any) -> Any:
            try:
                return store(*args)
            finally:
                stored.set()
                go_on.wait()

        monkeypatch.setattr(swarm.driver.ledger, "store", store_and_stop)
        pausing = asyncio.create_task(swarm.service.pause_job("me", POEMS))
        try:
            await asyncio.to_thread(stored.wait)
            reading = asyncio.create_task(swarm.service.job_log("me", pb.JobLogRequest(job="poems")))
            early, _ = await asyncio.wait({reading}, timeout=0.3)
            assert not early
        finally:
            go_on.set()
        assert (await reading).lines[-1].kind == "job_paused"
        assert swarm.driver.state.job is JobState.PAUSED
        await pausing
