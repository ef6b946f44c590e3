"""The adapter of every committed round can be had, long after its files made room: it is made from the updates."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from coordinator_sim import TinyAdapters, download, job_spec, model_facts, submit
from coordinator_swarm import ONE, ONE_PIPELINE, Swarm, opened

from coordinator.ports import Tensors
from coordinator.records import Outcome
from coordinator.round_model import JobState
from swarm.config import LoraMethod
from swarm.errors import BeingMade, BlobAbsent, CorruptData, JobConflict
from swarm.wire.v1 import coordinator_pb2 as pb

ROUNDS = 5
FEW = {"kept_rounds": 1, "blob_grace_s": 1.0}
WEIGHTS = "adapter_model.safetensors"
Files = dict[str, bytes]


class Gated(TinyAdapters):
    """Exports once the gate is open, and counts how often."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.made = 0

    def export(self, method: LoraMethod, params: Tensors, model_name: str) -> dict[str, bytes]:
        assert self.gate.wait(20)
        self.made += 1
        return super().export(method, params, model_name)


class NextRelease(TinyAdapters):
    """Writes other files for the same parameters."""

    def export(self, method: LoraMethod, params: Tensors, model_name: str) -> dict[str, bytes]:
        return {name: content + b" " for name, content in super().export(method, params, model_name).items()}


def _outcome(swarm: Swarm, round: int) -> Outcome:
    return swarm.coordinator._shared.storage.outcomes.of(swarm.driver.job.job_id, round)


async def _files(swarm: Swarm, round: int) -> dict[str, tuple[bytes, int]]:
    status = await swarm.service.get_job("me", pb.GetJobRequest(job="poems", adapter_round=round))
    assert status.adapter_round == round
    return {file.name: (file.sha256, file.size) for file in status.adapter}


async def _adapter(swarm: Swarm, round: int) -> Files:
    found = await _files(swarm, round)
    return {name: await download(swarm.service, "me", *file) for name, file in found.items()}


async def _weights(swarm: Swarm, round: int) -> Callable[[], Awaitable[pb.GetPieceReply]]:
    digest, size = (await _files(swarm, round))[WEIGHTS]
    return lambda: swarm.service.get_piece("anybody", pb.GetPieceRequest(sha256=digest, length=size))


async def _start(swarm: Swarm, **spec: object) -> None:
    await swarm.join(*ONE_PIPELINE)
    await submit(swarm.service, "me", job_spec(schedule=ONE | {"rounds": ROUNDS}, **spec))


async def _train(swarm: Swarm, first: int, last: int) -> dict[int, Files]:
    """Train these rounds; each one's adapter as it was when it was the newest."""
    found: dict[int, Files] = {}
    for number in range(first, last + 1):
        await swarm.round("a", "b")
        await swarm.until(lambda number=number: swarm.driver.committed_round == number)
        found[number] = await _adapter(swarm, number)
        swarm.clock.advance(2)
    return found


async def _make_room(swarm: Swarm) -> None:
    swarm.clock.advance(10)
    await swarm.coordinator._shared.collector.collect()


def _harm(folder: Path, blob: bytes, harm: str) -> None:
    path = folder / "blobs" / "whole" / blob.hex()
    content = path.read_bytes()
    path.unlink()
    if harm == "damaged":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


async def test_adapters_of_all_rounds(tmp_path: Path) -> None:
    async with opened(tmp_path, **FEW) as swarm:
        await _start(swarm)
        adapters = await _train(swarm, 1, ROUNDS)
        await swarm.until(lambda: swarm.driver.state.job is JobState.FINISHED)
        assert len({files[WEIGHTS] for files in adapters.values()}) == ROUNDS
    # What is not tensors names the model, and in real ones the release of PEFT: it stays as it was.
    renamed = replace(model_facts(), name="the same model elsewhere")
    async with opened(tmp_path, model=renamed, **FEW) as swarm:
        await _make_room(swarm)
        whole = tmp_path / "blobs" / "whole"
        kept = {path.name for path in whole.iterdir()}
        assert swarm.driver.kept_rounds == [ROUNDS]
        rounds = [4, *range(1, ROUNDS + 1)]
        assert await asyncio.gather(*(_adapter(swarm, number) for number in rounds)) == [adapters[n] for n in rounds]
        assert {path.name for path in whole.iterdir()} == kept, "nothing is written"
        for number in (0, ROUNDS + 1):
            with pytest.raises(JobConflict, match=f"poems has not committed a round {number}"):
                await _adapter(swarm, number)


@pytest.mark.parametrize("harm", ["damaged", "gone"])
async def test_an_update_that_is_lost_is_named(tmp_path: Path, harm: str) -> None:
    """Rounds before it, and those whose state is here, do not need it."""
    async with opened(tmp_path, **FEW) as swarm:
        await _start(swarm)
        adapters = await _train(swarm, 1, ROUNDS)
        lost = _outcome(swarm, 2).update_blob
    _harm(tmp_path, lost, harm)
    async with opened(tmp_path, **FEW) as swarm:
        await _make_room(swarm)
        for number in (1, ROUNDS):
            assert await _adapter(swarm, number) == adapters[number]
        for number in (2, 3, 4):
            with pytest.raises(CorruptData, match=f"adapter of round {number} .* the update of round 2 cannot be used"):
                await _adapter(swarm, number)


async def test_another_release_may_write_other_files(tmp_path: Path) -> None:
    async with opened(tmp_path, **FEW) as swarm:
        await _start(swarm)
        await _train(swarm, 1, 3)
    async with opened(tmp_path, model=replace(model_facts(), adapters=NextRelease()), **FEW) as swarm:
        await _make_room(swarm)
        with pytest.raises(CorruptData, match="adapter of round 1 was written by another release"):
            await _adapter(swarm, 1)


async def test_discarded_rounds_are_gone(tmp_path: Path) -> None:
    async with opened(tmp_path, kept_rounds=3, blob_grace_s=1.0) as swarm:
        await _start(swarm)
        first = await _train(swarm, 1, 4)
        await swarm.service.pause_job("me", pb.GetJobRequest(job="poems"))
        await swarm.until(lambda: swarm.driver.state.job is JobState.PAUSED)
        discarded = _outcome(swarm, 4).files[-1].sha256
        await swarm.service.resume_job("me", pb.ResumeJobRequest(job="poems", round=2))
        with pytest.raises(JobConflict, match="has not committed a round 4"):
            await _adapter(swarm, 4)
        await _make_room(swarm)
        with pytest.raises(BlobAbsent):
            await swarm.service.get_piece("me", pb.GetPieceRequest(sha256=discarded, length=1))
        assert await _adapter(swarm, 1) == first[1]
    async with opened(tmp_path, kept_rounds=3, blob_grace_s=1.0) as swarm:
        assert swarm.driver.kept_rounds == [2], "only what can be gone on from"
        await swarm.join(*ONE_PIPELINE)
        again = await _train(swarm, 3, ROUNDS)
        await _make_room(swarm)
        for number, files in ({1: first[1], 2: first[2]} | again).items():
            assert await _adapter(swarm, number) == files


async def test_who_asks_again_finds_it_made_once(tmp_path: Path) -> None:
    """A call ends before a long work does, and the work goes on."""
    adapters = Gated()
    async with opened(tmp_path, model=replace(model_facts(), adapters=adapters), making_wait_s=0.05, **FEW) as swarm:
        await _start(swarm)
        await _train(swarm, 1, 4)
        await _make_room(swarm)
        read, made = await _weights(swarm, 2), adapters.made
        adapters.gate.clear()
        for answer in await asyncio.gather(*(read() for _ in range(5)), return_exceptions=True):
            assert isinstance(answer, BeingMade), answer
        cancelled = asyncio.create_task(read())
        await asyncio.sleep(0)
        cancelled.cancel()
        adapters.gate.set()
        await swarm.coordinator.jobs._past._under_way.copy().popitem()[1]
        assert (await read()).data == (await read()).data
        assert adapters.made == made + 1


async def test_few_rounds_wait_to_be_made_and_none_holds_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.past._MOST", 2)
    adapters = Gated()
    async with opened(tmp_path, model=replace(model_facts(), adapters=adapters), making_wait_s=0.05, **FEW) as swarm:
        await _start(swarm)
        await _train(swarm, 1, ROUNDS)
        await _make_room(swarm)
        reads, made = [await _weights(swarm, number) for number in (1, 2, 3)], adapters.made
        adapters.gate.clear()
        answers = await asyncio.gather(*(read() for read in reads), return_exceptions=True)
        assert all(isinstance(answer, BeingMade) for answer in answers)
        assert sum("2 other rounds are made first" in str(answer) for answer in answers) == 1
        closing = asyncio.create_task(swarm.coordinator.jobs._past.stop())
        await asyncio.sleep(0)
        adapters.gate.set()
        await closing
        assert adapters.made == made + 1, "the one that was under way; what waited is given up"


@pytest.mark.parametrize("lost", [("snapshot",), ("snapshot", "state"), ("state", "snapshot", "payloads")])
async def test_a_kept_rounds_adapter_is_made_from_whatever_is_whole(tmp_path: Path, lost: tuple[str, ...]) -> None:
    async with opened(tmp_path, **FEW) as swarm:
        await _start(swarm)
        adapters = await _train(swarm, 1, 3)
        outcome = _outcome(swarm, 3)
        held = swarm.coordinator._shared.storage.contributions(swarm.driver.job.job_id, 3)
    parts = {
        "snapshot": [outcome.snapshot_blob],
        "state": [outcome.state_blob],
        "payloads": [contribution.payload for contribution in held],
    }
    for blob in [outcome.files[-1].sha256, *(blob for part in lost for blob in parts[part])]:
        _harm(tmp_path, blob, "damaged")
    async with opened(tmp_path, **FEW) as swarm:
        assert await _adapter(swarm, 3) == adapters[3]


async def test_two_files_of_one_round_asked_for_at_once(tmp_path: Path) -> None:
    async with opened(tmp_path, **FEW) as swarm:
        await _start(swarm)
        await _train(swarm, 1, 2)
        outcome = _outcome(swarm, 2)
        lost = [outcome.update_blob, outcome.snapshot_blob, *(file.sha256 for file in outcome.files)]
        for blob in lost:
            _harm(tmp_path, blob, "gone")
        asked = (swarm.service.get_piece("a", pb.GetPieceRequest(sha256=blob, length=1)) for blob in lost)
        assert all(reply.data for reply in await asyncio.gather(*asked))
