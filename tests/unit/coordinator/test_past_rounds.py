"""The adapter of every committed round can be had, long after its files made room: it is made from the updates."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from coordinator_sim import download, job_spec, submit
from coordinator_swarm import ONE, ONE_PIPELINE, Swarm, opened

from coordinator.round_model import JobState
from swarm.errors import BlobAbsent, CorruptData, JobConflict
from swarm.wire.v1 import coordinator_pb2 as pb

ROUNDS = 5
Files = dict[str, bytes]


async def _adapter(swarm: Swarm, round: int) -> Files:
    status = await swarm.service.get_job("me", pb.GetJobRequest(job="poems", adapter_round=round))
    assert status.adapter_round == round
    return {file.name: await download(swarm.service, "me", file.sha256, file.size) for file in status.adapter}


async def _train(swarm: Swarm, first: int, last: int) -> dict[int, Files]:
    """Train these rounds; each one's adapter as it was when it was the newest."""
    found: dict[int, Files] = {}
    for number in range(first, last + 1):
        await swarm.round("a", "b")
        await swarm.until(lambda number=number: swarm.driver.committed_round == number)
        found[number] = await _adapter(swarm, number)
        swarm.clock.advance(2)
    return found


async def _start(swarm: Swarm) -> None:
    await swarm.join(*ONE_PIPELINE)
    await submit(swarm.service, "me", job_spec(schedule=ONE | {"rounds": ROUNDS}))


async def test_adapters_of_all_rounds(tmp_path: Path) -> None:
    async with opened(tmp_path, kept_rounds=1, blob_grace_s=1.0) as swarm:
        await _start(swarm)
        adapters = await _train(swarm, 1, ROUNDS)
        await swarm.until(lambda: swarm.driver.state.job is JobState.FINISHED)
        assert len({files["adapter_model.safetensors"] for files in adapters.values()}) == ROUNDS
    whole = tmp_path / "blobs" / "whole"
    async with opened(tmp_path, kept_rounds=1, blob_grace_s=1.0) as swarm:
        swarm.clock.advance(10)
        await swarm.coordinator._shared.collector.collect()
        kept = {path.name for path in whole.iterdir()}
        assert swarm.driver.kept_rounds == [ROUNDS]
        rounds = [4, *range(1, ROUNDS + 1)]
        assert await asyncio.gather(*(_adapter(swarm, number) for number in rounds)) == [adapters[n] for n in rounds]
        swarm.clock.advance(10)
        await swarm.coordinator._shared.collector.collect()
        assert {path.name for path in whole.iterdir()} == kept, "what was made for a reader makes room again"
        for number in (0, ROUNDS + 1):
            with pytest.raises(JobConflict, match=f"poems has not committed a round {number}"):
                await _adapter(swarm, number)


@pytest.mark.parametrize("harm", ["damaged", "gone"])
async def test_an_update_that_is_lost_is_named(tmp_path: Path, harm: str) -> None:
    """Rounds before it, and those with a snapshot after it, do not need it."""
    async with opened(tmp_path, kept_rounds=1, blob_grace_s=1.0) as swarm:
        await _start(swarm)
        adapters = await _train(swarm, 1, ROUNDS)
        lost = swarm.coordinator._shared.storage.outcomes.of(swarm.driver.job.job_id, 3).update_blob
    path = tmp_path / "blobs" / "whole" / lost.hex()
    content = path.read_bytes()
    path.unlink()
    if harm == "damaged":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    async with opened(tmp_path, kept_rounds=1, blob_grace_s=1.0) as swarm:
        swarm.clock.advance(10)
        await swarm.coordinator._shared.collector.collect()
        for number in (1, 2, ROUNDS):
            assert await _adapter(swarm, number) == adapters[number]
        for number in (3, 4):
            with pytest.raises(CorruptData, match=f"files of round {number} .* the update of round 3 cannot be used"):
                await _adapter(swarm, number)


async def test_discarded_rounds_are_gone(tmp_path: Path) -> None:
    async with opened(tmp_path, kept_rounds=3, blob_grace_s=1.0) as swarm:
        await _start(swarm)
        first = await _train(swarm, 1, 4)
        await swarm.service.pause_job("me", pb.GetJobRequest(job="poems"))
        await swarm.until(lambda: swarm.driver.state.job is JobState.PAUSED)
        discarded = swarm.coordinator._shared.storage.outcomes.of(swarm.driver.job.job_id, 4).files[-1].sha256
        await swarm.service.resume_job("me", pb.ResumeJobRequest(job="poems", round=3))
        with pytest.raises(JobConflict, match="has not committed a round 4"):
            await _adapter(swarm, 4)
        swarm.clock.advance(10)
        await swarm.coordinator._shared.collector.collect()
        with pytest.raises(BlobAbsent):
            await swarm.service.get_piece("me", pb.GetPieceRequest(sha256=discarded, length=1))
        again = await _train(swarm, 4, ROUNDS)
        swarm.clock.advance(10)
        await swarm.coordinator._shared.collector.collect()
        for number, files in ({1: first[1], 2: first[2], 3: first[3]} | again).items():
            assert await _adapter(swarm, number) == files
