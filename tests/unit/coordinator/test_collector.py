"""Room is made by the clock, by a full disk and by a job's end, whether or not a round is ever committed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from coordinator_sim import DATASET, job_spec, submit, upload
from coordinator_swarm import ONE, ONE_PIPELINE, Swarm, opened

from coordinator.collector import PASSES_A_GRACE
from coordinator.round_model import JobState
from swarm.errors import DiskFull, StorageError
from swarm.ids import sha256
from swarm.wire.v1 import coordinator_pb2 as pb

GRACE_S = 3600.0
EVERY_S = GRACE_S / PASSES_A_GRACE
LATER_S = 100.0
SLOW = ONE | {"round_deadline_s": 1e6}


def _whole(folder: Path) -> list[str]:
    return os.listdir(folder / "blobs" / "whole")


async def _until_just_stale(swarm: Swarm) -> None:
    """What was used `LATER_S` after the start is past its grace, and every pass that the clock brought is over."""
    await swarm.clock.sleep_over(EVERY_S - LATER_S)
    for _ in range(PASSES_A_GRACE - 1):
        await swarm.clock.sleep_over(EVERY_S)
    await swarm.coordinator._shared.collector.collect()
    swarm.clock.advance(LATER_S + 1)


async def test_a_coordinator_without_jobs_removes_what_nobody_refers_to(tmp_path: Path) -> None:
    async with opened(tmp_path, blob_grace_s=GRACE_S) as swarm:
        await upload(swarm.service, "somebody", b"left" * 100)
        await swarm.service.put_piece("somebody", pb.PutPieceRequest(sha256=sha256(b"half"), size=4, data=b"ha"))
        for _ in range(PASSES_A_GRACE - 1):
            await swarm.clock.sleep_over(EVERY_S)
        await swarm.coordinator._shared.collector.collect()
        assert len(_whole(tmp_path)) == len(os.listdir(tmp_path / "blobs" / "partial")) == 1, "within their grace"
        for _ in range(2):
            await swarm.clock.sleep_over(EVERY_S)
    # Closing waits for the pass under way.
    assert _whole(tmp_path) == os.listdir(tmp_path / "blobs" / "partial") == []


async def test_uploads_that_were_given_up_make_room_for_others(tmp_path: Path) -> None:
    async with opened(tmp_path, blob_grace_s=GRACE_S, max_partials=3) as swarm:
        swarm.clock.advance(LATER_S)
        for number in range(3):
            request = pb.PutPieceRequest(sha256=sha256(bytes([number])), size=100, data=b"1")
            await swarm.service.put_piece("somebody", request)
        with pytest.raises(StorageError, match="too many uploads are unfinished"):
            await upload(swarm.service, "me", DATASET)
        await _until_just_stale(swarm)
        assert (await submit(swarm.service, "me", job_spec())).state == "waiting"


async def test_a_disk_full_of_what_nobody_needs_is_not_full(tmp_path: Path) -> None:
    left = sha256(b"left").hex()

    def point(name: str) -> None:
        if armed and name == "before blob write" and left in _whole(tmp_path):
            raise OSError(28, "No space left on device")

    armed = False
    async with opened(tmp_path, durable_point=point, blob_grace_s=GRACE_S, silent_s=1e9) as swarm:
        swarm.clock.advance(LATER_S)
        await swarm.join(*ONE_PIPELINE)
        await upload(swarm.service, "somebody", b"left")
        await submit(swarm.service, "me", job_spec(schedule=SLOW))
        await _until_just_stale(swarm)
        armed = True
        for name in ("a", "b"):
            node = swarm.nodes[name]
            await node.train(await node.assigned())
        await swarm.until(lambda: "SW704" in swarm.driver.reason)
        await swarm.clock.sleep_over(5)
        await swarm.until(lambda: swarm.driver.committed_round == 1)
        assert left not in _whole(tmp_path)


async def test_an_upload_that_meets_a_full_disk_has_room_made(tmp_path: Path) -> None:
    left = sha256(b"left").hex()

    def point(name: str) -> None:
        if armed and name == "before piece write" and left in _whole(tmp_path):
            raise OSError(28, "No space left on device")

    armed = False
    async with opened(tmp_path, durable_point=point, blob_grace_s=GRACE_S) as swarm:
        swarm.clock.advance(LATER_S)
        await upload(swarm.service, "somebody", b"left")
        armed = True
        with pytest.raises(DiskFull):
            await upload(swarm.service, "me", DATASET)
        await _until_just_stale(swarm)
        await upload(swarm.service, "me", DATASET)
        assert _whole(tmp_path) == [sha256(DATASET).hex()]


@pytest.mark.parametrize("end", ["scored", "stopped"])
async def test_an_ended_job_makes_room_at_once(tmp_path: Path, end: str) -> None:
    """However it ends: by the score of its last round, or stopped while it rests between two."""
    rounds = 1 if end == "scored" else 2
    spec = job_spec(schedule=SLOW | {"rounds": rounds}, eval={"data": "heldout.jsonl"})
    get = pb.GetJobRequest(job="poems")
    async with opened(tmp_path, blob_grace_s=GRACE_S, silent_s=1e9) as swarm:
        swarm.clock.advance(LATER_S)
        lead, _ = await swarm.join(*ONE_PIPELINE)
        await submit(swarm.service, "me", spec)
        await swarm.round("a", "b")
        await swarm.until(lambda: swarm.driver.state.scorer is not None)
        if end == "stopped":
            await swarm.service.pause_job("me", get)
        await _until_just_stale(swarm)
        assert sha256(DATASET).hex() in _whole(tmp_path)
        if end == "stopped":
            await swarm.service.stop_job("me", get)
        else:
            await lead.score(await lead.assigned())
        await swarm.until(lambda: swarm.driver.state.job is JobState.FINISHED)
    assert sha256(DATASET).hex() not in _whole(tmp_path)
