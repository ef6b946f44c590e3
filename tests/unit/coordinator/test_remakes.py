"""A file of a kept round that is damaged or gone is made again, as often as it takes; the round stays."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from coordinator_sim import TinyAdapters, download, job_spec, model_facts, submit
from coordinator_swarm import ONE, ONE_PIPELINE, Swarm, opened

from coordinator.ports import Tensors
from swarm.config import LoraMethod
from swarm.errors import BlobAbsent, CorruptData, DiskFull
from swarm.ids import sha256
from swarm.wire.v1 import coordinator_pb2 as pb


class CountedAdapters(TinyAdapters):
    """How many outcomes were made is how often their adapter was exported."""

    made = 0

    def export(self, method: LoraMethod, params: Tensors, model_name: str) -> dict[str, bytes]:
        self.made += 1
        return super().export(method, params, model_name)


async def _train(swarm: Swarm, rounds: int) -> None:
    await swarm.join(*ONE_PIPELINE)
    await submit(swarm.service, "me", job_spec(schedule=ONE))
    for _ in range(rounds):
        await swarm.round("a", "b")
    await swarm.until(lambda: swarm.driver.state.round == rounds + 1)


def _harm(path: Path, harm: str) -> bytes:
    """Its content before."""
    content = path.read_bytes()
    path.unlink()
    if harm == "damaged":
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    return content


@pytest.mark.parametrize("harm", ["damaged", "gone"])
async def test_a_remake_that_fails_is_begun_again(tmp_path: Path, harm: str) -> None:
    """And those who ask at the same time share the one that succeeds."""
    full = False

    def point(name: str) -> None:
        if full and name == "before blob write":
            raise OSError(28, "No space left on device")

    adapters = CountedAdapters()
    model = replace(model_facts(), adapters=adapters)
    async with opened(tmp_path, model=model, durable_point=point) as swarm:
        await _train(swarm, 1)
        outcome = swarm.driver.published[1]
        path = tmp_path / "blobs" / "whole" / outcome.snapshot_blob.hex()
        content = _harm(path, harm)
        full = True
        for _ in range(2):
            made = adapters.made
            reads = (download(swarm.service, f"n{n}", outcome.snapshot_blob, len(content)) for n in range(8))
            failed = await asyncio.gather(*reads, return_exceptions=True)
            assert all(isinstance(error, DiskFull) for error in failed)
            assert adapters.made > made
        assert path.exists() == (harm == "damaged"), "replaced, never removed first"
        full, made = False, adapters.made
        reads = (download(swarm.service, f"n{n}", outcome.snapshot_blob, len(content)) for n in range(8))
        assert await asyncio.gather(*reads) == [content] * 8
        assert adapters.made == made + 1


@pytest.mark.parametrize("harm", ["damaged", "gone"])
async def test_the_newest_round_is_kept_whatever_became_of_its_files(tmp_path: Path, harm: str) -> None:
    """A coordinator that starts again goes on from it; who needs a file has it made again."""
    async with opened(tmp_path) as swarm:
        await _train(swarm, 2)
        outcome = swarm.driver.published[2]
    for blob in outcome.blobs:
        _harm(tmp_path / "blobs" / "whole" / blob.hex(), harm)
    async with opened(tmp_path) as swarm:
        assert 2 in swarm.driver.kept_rounds
        await swarm.join(*ONE_PIPELINE)
        request = pb.AwaitRoundRequest(job_id=swarm.driver.job.job_id, round=2)
        assert (await swarm.service.await_round("joiner", request)).committed
        await swarm.round("a", "b")
        await swarm.until(lambda: swarm.driver.committed_round == 3)
        for blob in outcome.blobs:
            await swarm.service.get_piece("me", pb.GetPieceRequest(sha256=blob, length=1))
    for blob in outcome.blobs:
        assert sha256((tmp_path / "blobs" / "whole" / blob.hex()).read_bytes()) == blob


async def test_what_cannot_be_made_again_says_why(tmp_path: Path) -> None:
    async with opened(tmp_path) as swarm:
        await _train(swarm, 1)
        held = swarm.coordinator._shared.storage.contributions(swarm.driver.job.job_id, 1)
        outcome = swarm.driver.published[1]
        snapshot = outcome.snapshot_blob
        for blob in (held[0].payload, snapshot, outcome.update_blob):
            _harm(tmp_path / "blobs" / "whole" / blob.hex(), "gone")
        with pytest.raises(CorruptData, match=r"round 1 are damaged or gone and cannot be made again: .* is no blob"):
            await swarm.service.get_piece("me", pb.GetPieceRequest(sha256=snapshot, length=1))
        with pytest.raises(BlobAbsent):
            await swarm.service.get_piece("me", pb.GetPieceRequest(sha256=sha256(b"unknown"), length=1))
