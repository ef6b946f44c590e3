"""Held contributions that are damaged or gone when their round is aggregated, and rounds that cannot be aggregated.

What can be used is aggregated without the rest, durably; a failure of another kind is waited out, unless the owner
wants the job to rest or to end.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from coordinator_sim import job_spec, submit
from coordinator_swarm import ONE, ONE_PIPELINE, Swarm, opened
from damaged_runner import TWO, cut, flip, held, payload_of, rot

from coordinator.round_model import JobState, Phase, Standing
from swarm.wire.v1 import coordinator_pb2 as pb

RUNNER = Path(__file__).parent / "damaged_runner.py"
ROOT = Path(__file__).parents[3]
POEMS = pb.GetJobRequest(job="poems")
RETRY_S = 5.0


def blob(folder: Path, digest: bytes) -> Path:
    return folder / "blobs" / "whole" / digest.hex()


async def log_of(swarm: Swarm) -> list[pb.LogLine]:
    return list((await swarm.service.job_log("me", pb.JobLogRequest(job="poems"))).lines)


async def refused_by_disk(swarm: Swarm, folder: Path) -> Path:
    """One pipeline's round is frozen, and what its lead sent cannot be read. Where that lies, beside a copy."""
    await swarm.join(*ONE_PIPELINE)
    await submit(swarm.service, "me", job_spec(schedule=ONE))
    await held(swarm, "a")
    path = blob(folder, payload_of(swarm, "a"))
    path.rename(folder / "kept")
    path.mkdir()
    await held(swarm, "b")
    await swarm.until(lambda: "aggregating failed" in swarm.driver.reason)
    assert swarm.driver.state.phase is Phase.FROZEN
    return path


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink], ids=["flipped", "cut", "gone"])
async def test_the_rest_is_aggregated_without_it(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    finals = []
    for damaged in (False, True):
        folder = tmp_path / str(damaged)
        async with opened(folder, silent_s=1000.0) as swarm:
            await swarm.join(*TWO)
            await submit(swarm.service, "me", job_spec(schedule=ONE | {"min_pipelines": 2}))
            a, c = swarm.nodes["a"], swarm.nodes["c"]
            if damaged:
                (part,) = await held(swarm, "a")
                damage(blob(folder, payload_of(swarm, "a")))
                await held(swarm, "c")
                await a.settle(part)
                assert a.receipts[1].verdict == pb.VERDICT_LATE
                assert f"the contribution of {a.peer} cannot be used any more" in a.receipts[1].reason
            else:
                await held(swarm, "c")
                swarm.clock.advance(100.0)
            await swarm.until(lambda: swarm.driver.committed_round == 1)
            assert swarm.driver.reason == ""
            await c.settle(await c.assigned())
            finals.append(swarm.driver.published[1].params_hash)
            lost = [line for line in await log_of(swarm) if line.kind == "pipeline_lost"]
            assert len(lost) == damaged
            # Its samples are the first that are leased again.
            await swarm.until(lambda: swarm.driver.state.round == 2)
            leases = [lease.ranges[0].start for lease in swarm.driver._book.open]
            assert sorted(leases)[0] < 12
    assert finals[0] == finals[1]


async def test_without_anything_left_the_round_is_formed_again(tmp_path: Path) -> None:
    async with opened(tmp_path) as swarm:
        await rot(swarm, tmp_path, "all")
        await swarm.until(lambda: swarm.driver.state.generation == 2)
        for node in swarm.nodes.values():
            receipt = pb.Receipt.FromString(await swarm.driver.stored_receipt(1, node.peer) or b"")
            assert receipt.verdict == pb.VERDICT_LATE
            assert "the pipeline was given up" in receipt.reason
        for number in (1, 2, 3):
            await swarm.until(lambda number=number: swarm.driver.state.round == number)
            await swarm.round("a", "b")
        await swarm.until(lambda: swarm.driver.state.job is JobState.FINISHED)
        assert swarm.nodes["a"].leased[1, 1] == swarm.nodes["a"].leased[1, 2] == [(0, 6)]
        (line,) = [line for line in await log_of(swarm) if line.kind == "round_reopened"]
        assert line.round == 1


async def test_a_disk_that_refuses_is_waited_for(tmp_path: Path) -> None:
    async with opened(tmp_path) as swarm:
        path = await refused_by_disk(swarm, tmp_path)
        path.rmdir()
        (tmp_path / "kept").rename(path)
        await swarm.clock.sleep_over(RETRY_S)
        await swarm.until(lambda: swarm.driver.committed_round == 1)
        assert swarm.driver.reason == ""


async def test_an_order_does_not_wait_for_a_round_that_cannot_be_aggregated(tmp_path: Path) -> None:
    async with opened(tmp_path) as swarm:
        path = await refused_by_disk(swarm, tmp_path)
        await swarm.service.pause_job("me", POEMS)
        assert swarm.driver.state.phase is Phase.FROZEN
        await swarm.clock.sleep_over(RETRY_S)
        await swarm.until(lambda: swarm.driver.state.job is JobState.PAUSED)
        assert swarm.driver.reason == "paused by its owner"
        path.rmdir()
        await swarm.service.resume_job("me", pb.ResumeJobRequest(job="poems"))
        await swarm.until(lambda: swarm.driver.state.generation == 2)
        await swarm.round("a", "b")
        await swarm.until(lambda: swarm.driver.state.round == 2)
    # Ordered before it fails, and found by the next start.
    async with opened(tmp_path) as swarm:
        await swarm.join(*ONE_PIPELINE)
        await held(swarm, "a")
        path = blob(tmp_path, payload_of(swarm, "a"))
        path.unlink()
        path.mkdir()
        await held(swarm, "b")
        await swarm.service.stop_job("me", POEMS)
    async with opened(tmp_path) as swarm:
        await swarm.until(lambda: swarm.driver.state.job is JobState.FINISHED)
        assert swarm.driver.committed_round == 1
        assert not swarm.driver.state.busy_peers()


async def test_a_lost_outer_state_leaves_the_way_back(tmp_path: Path) -> None:
    """Round 2 can neither be read nor made again: the reason says so, and the job goes on from round 1."""
    async with opened(tmp_path) as swarm:
        await swarm.join(*ONE_PIPELINE)
        await submit(swarm.service, "me", job_spec(schedule=ONE))
        await swarm.round("a", "b")
        await swarm.until(lambda: swarm.driver.state.round == 2)
        (part,) = await held(swarm, "a")
        payload = payload_of(swarm, "a")
        await held(swarm, "b")
        await swarm.nodes["a"].settle(part)
        await swarm.until(lambda: swarm.driver.state.round == 3)
        blob(tmp_path, payload).unlink()
        flip(blob(tmp_path, swarm.driver.published[2].state_blob))
        await held(swarm, "a", "b")
        await swarm.until(lambda: "cannot be made again" in swarm.driver.reason)
        assert "resume it from the end of an earlier round" in swarm.driver.reason
        await swarm.service.pause_job("me", POEMS)
        await swarm.clock.sleep_over(RETRY_S)
        await swarm.until(lambda: swarm.driver.state.job is JobState.PAUSED)
        await swarm.service.resume_job("me", pb.ResumeJobRequest(job="poems", round=1))
        for number in (2, 3):
            await swarm.until(lambda number=number: swarm.driver.state.round == number)
            for node in swarm.nodes.values():
                part = await node.assigned()
                assert (await node.train(part)).verdict == pb.VERDICT_HELD
        await swarm.until(lambda: swarm.driver.state.job is JobState.FINISHED)


POINTS = [
    (which, f"{when} commit {records}")
    for which, records in (("some", "PipelineLost"), ("all", "PipelineLost + RoundReopened + JobChanged"))
    for when in ("before", "after")
]


@pytest.mark.parametrize(("which", "point"), POINTS)
async def test_killed_while_it_is_left_out(tmp_path: Path, which: str, point: str) -> None:
    """P1: what the next start does is what would have been done."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    killed.mkdir()
    command = [sys.executable, str(RUNNER), str(killed), which, point]
    running = await asyncio.create_subprocess_exec(*command, env=environment)
    assert await running.wait() == -signal.SIGKILL
    async with opened(whole) as swarm:
        await rot(swarm, whole, which)
        await swarm.until(lambda: left_out(swarm, which))
        expected = [lease.ranges for lease in swarm.driver._book.open], swarm.driver.published.get(1)
    async with opened(killed) as swarm:
        await swarm.until(lambda: left_out(swarm, which))
        assert ([lease.ranges for lease in swarm.driver._book.open], swarm.driver.published.get(1)) == expected
        lost = [line.text for line in await log_of(swarm) if line.kind == "pipeline_lost"]
        assert len(lost) == 1
        assert "cannot be used any more" in lost[0]


def left_out(swarm: Swarm, which: str) -> bool:
    """What follows has been done: the next round is open, or this one is formed again."""
    state = swarm.driver.state
    formed = bool(state.with_standing(Standing.ACTIVE))
    return formed and (state.round, state.generation) == ((1, 2) if which == "all" else (2, 1))
