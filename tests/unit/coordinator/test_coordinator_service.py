"""A coordinator in one process, called as the network would call it, with a clock that stands still."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from coordinator_sim import (
    DATASET,
    MODEL_HASH,
    TWO_PIPELINES,
    ManualClock,
    SimNode,
    download,
    identity,
    job_spec,
    model_facts,
    run_job,
    submit,
    upload,
)
from coordinator_swarm import ONE, ONE_PIPELINE, Swarm, opened

from coordinator.app import Coordinator
from coordinator.ledger import log_entry_hash
from coordinator.ports import CoordinatorSettings
from coordinator.round_model import Standing
from coordinator.storage import Storage
from swarm.config import InnerSettings, job_from_json
from swarm.errors import (
    ConfigError,
    ContributionError,
    JobConflict,
    JobNotFound,
    ModelMismatch,
    SpanError,
    StorageError,
    SwarmError,
    VersionError,
)
from swarm.identity import verify
from swarm.ids import Span, sha256
from swarm.optim.schedule import global_step, learning_rate
from swarm.wire.v1 import common_pb2
from swarm.wire.v1 import coordinator_pb2 as pb
from swarm.wire.version import hello


@pytest.fixture
async def swarm(tmp_path: Path) -> AsyncIterator[Swarm]:
    async with opened(tmp_path) as swarm:
        yield swarm


async def test_a_job_from_submission_to_adapter(tmp_path: Path) -> None:
    status = await run_job(tmp_path, job_spec(), CoordinatorSettings())
    assert (status.state, status.reason, status.round, status.adapter_round) == ("finished", "", 2, 2)
    assert [entry.phase for entry in status.history] == ["committed", "committed"]
    assert [entry.loss for entry in status.history] == [2.0, 1.0]
    assert [entry.tokens for entry in status.history] == [14, 14]
    # Two pipelines, two rounds, three inner steps, 560 parameters, two bytes each.
    assert (status.trainable_parameters, status.ddp_bf16_bytes) == (560, 2 * 2 * 3 * 560 * 2)
    assert status.contribution_bytes == sum(entry.contribution_bytes for entry in status.history) > 0
    assert sorted(file.name for file in status.adapter) == ["adapter_config.json", "adapter_model.safetensors"]
    async with opened(tmp_path) as swarm:
        (node,) = await swarm.join(("a", Span(0, 2)))
        (adapter,) = (await node.poll()).adapters
        assert (adapter.name, adapter.round) == ("poems", 2)
        files = [await download(swarm.service, "me", file.sha256, file.size) for file in adapter.files]
        assert json.loads(files[0])["base_model_name_or_path"] == "tiny"
        storage = swarm.coordinator._shared.storage
        stored = storage.rounds_state(status.job_id, swarm.driver.state.rules)
        assert stored == swarm.driver.state
        link = b""
        for number in (1, 2):
            entry = storage.log_entry(status.job_id, number)
            outcome = storage.outcomes.find(status.job_id, number)
            assert entry is not None
            assert outcome is not None
            sent = storage.contributions(status.job_id, number)
            link = log_entry_hash(link, status.job_id, number, sent, outcome.params_hash)
            assert entry.entry_hash == link
            verify(identity().peer_id, b"swarm-round-log-v1" + link, entry.signature)


async def test_joiners_count_from_the_next_round(swarm: Swarm) -> None:
    await swarm.join(*ONE_PIPELINE)
    await submit(swarm.service, "me", job_spec(schedule=ONE))
    await swarm.nodes["a"].assigned()
    joiner, _ = await swarm.join(("c", Span(0, 2)), ("d", Span(2, 4)))
    reply = await joiner.poll()
    assert not reply.HasField("assignment")
    assert reply.reason == "job poems takes nodes on when its next round starts"
    await swarm.round("a", "b")
    await swarm.until(lambda: swarm.driver.state.round == 2)
    assert len(swarm.driver.state.pipelines) == 2
    await swarm.round("a", "b", "c", "d")
    assert {node.receipts[2].verdict for node in swarm.nodes.values()} == {pb.VERDICT_ACCEPTED}
    assert joiner.hashes.keys() == {1}, "it started from the snapshot of round 1"


async def test_a_hundred_duplicates_are_one_contribution(swarm: Swarm) -> None:
    node, _ = await swarm.join(*ONE_PIPELINE)
    await submit(swarm.service, "me", job_spec(schedule=ONE))
    part = await node.assigned()
    first = await node.train(part)
    assert first.verdict == pb.VERDICT_HELD
    lease = swarm.driver.lease_id(1, 0)
    assert lease is not None
    frame = node.frame(part)
    again = await asyncio.gather(*(node.contribute(part, sha256(frame), len(frame), lease) for _ in range(100)))
    assert {receipt.SerializeToString() for receipt in again} == {first.SerializeToString()}
    other = await upload(swarm.service, node.peer, frame + b"\x00")
    refused = await node.contribute(part, other, len(frame) + 1, lease)
    assert refused.verdict == pb.VERDICT_REJECTED
    assert "another contribution" in refused.reason
    assert len(swarm.coordinator._shared.storage.contributions(part.job_id, 1)) == 1
    await swarm.one("b")
    final = await node.contribute(part, sha256(frame), len(frame), lease)
    assert final.verdict == pb.VERDICT_ACCEPTED


async def _other_blocks(node: SimNode, part: pb.Assignment) -> bytes:
    stage = pb.Assignment()
    stage.CopyFrom(part)
    stage.index = 1
    return node.frame(stage)


async def _other_round(node: SimNode, part: pb.Assignment) -> bytes:
    later = pb.Assignment()
    later.CopyFrom(part)
    later.round = 2
    node.hashes[1] = node.hashes[0]
    return node.frame(later, node.delta(part))


async def _truncated(node: SimNode, part: pb.Assignment) -> bytes:
    return node.frame(part)[:-1]


async def _flipped(node: SimNode, part: pb.Assignment) -> bytes:
    frame = bytearray(node.frame(part))
    frame[len(frame) // 2] ^= 1
    return bytes(frame)


@pytest.mark.parametrize("make", [_other_blocks, _other_round, _truncated, _flipped])
async def test_a_payload_that_does_not_decode_is_refused(
    swarm: Swarm, make: Callable[[SimNode, pb.Assignment], Awaitable[bytes]]
) -> None:
    node, part, lease = await _ready(swarm)
    frame = await make(node, part)
    receipt = await node.contribute(part, await upload(swarm.service, node.peer, frame), len(frame), lease)
    assert receipt.verdict == pb.VERDICT_REJECTED
    assert receipt.reason
    await _still_honest(swarm, node, part, lease)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"span": common_pb2.Span(start=0, end=3)}, "blocks 0:3, the node was assigned 0:2"),
        ({"inner_steps": 2}, "2 inner steps instead of 3"),
        ({"tokens": 1_000_000}, "1000000 tokens"),
        ({"loss": float("nan")}, "a loss of nan"),
        ({"lease_id": 77}, "lease 77"),
        ({"payload_size": 1}, "the payload has"),
        ({"payload_size": 10**9}, "a payload of 1000000000 bytes"),
        ({"payload_sha256": b"\x01" * 32}, "not uploaded"),
        ({"payload_sha256": b"short"}, "not a SHA-256"),
        ({"round": 9}, "round 9 is not open"),
        ({"pipeline_id": 9}, "not in pipeline 9"),
        ({"generation": 9}, "generation 9"),
    ],
)
async def test_a_request_that_is_wrong_is_refused(swarm: Swarm, changes: dict[str, object], reason: str) -> None:
    node, part, lease = await _ready(swarm)
    frame = node.frame(part)
    digest = await upload(swarm.service, node.peer, frame)
    receipt = await node.contribute(part, digest, len(frame), lease, **changes)
    assert receipt.verdict == pb.VERDICT_REJECTED
    assert reason in receipt.reason
    await _still_honest(swarm, node, part, lease)


async def test_a_stranger_is_refused(swarm: Swarm) -> None:
    node, part, lease = await _ready(swarm)
    frame = node.frame(part)
    digest = await upload(swarm.service, node.peer, frame)
    (stranger,) = await swarm.join(("z", Span(0, 2)))
    receipt = await stranger.contribute(part, digest, len(frame), lease)
    assert receipt.verdict == pb.VERDICT_REJECTED
    await _still_honest(swarm, node, part, lease)


async def _ready(swarm: Swarm) -> tuple[SimNode, pb.Assignment, int]:
    node, _ = await swarm.join(*ONE_PIPELINE)
    await submit(swarm.service, "me", job_spec(schedule=ONE))
    part = await node.assigned()
    await node.catch_up(part)
    lease = swarm.driver.lease_id(1, 0)
    assert lease is not None
    return node, part, lease


async def _still_honest(swarm: Swarm, node: SimNode, part: pb.Assignment, lease: int) -> None:
    """Nothing was stored, and the next honest call works."""
    assert swarm.coordinator._shared.storage.contributions(part.job_id, 1) == []
    assert (await node.train(part)).verdict == pb.VERDICT_HELD


async def test_the_deadline_leaves_the_slow_pipeline_out(tmp_path: Path) -> None:
    async with opened(tmp_path, silent_s=1000.0) as swarm:
        await swarm.join(*TWO_PIPELINES)
        await submit(swarm.service, "me", job_spec(schedule=ONE))
        slow = swarm.nodes["c"]
        part = await slow.assigned()
        mate = next(n for n in swarm.nodes.values() if n.peer == part.hops[1].peer_id)
        assert (await slow.train(part)).verdict == pb.VERDICT_HELD
        others = [name for name, node in swarm.nodes.items() if node not in (slow, mate)]
        async with asyncio.TaskGroup() as group:
            for name in others:
                group.create_task(swarm.one(name))
            group.create_task(slow.settle(part))
            await swarm.until(lambda: len(swarm.driver.state.with_standing(Standing.WHOLE)) == 1)
            swarm.clock.advance(100.0)
        assert slow.receipts[1].verdict == pb.VERDICT_LATE
        assert slow.receipts[1].reason == "the pipeline was not whole when round 1 froze"
        assert swarm.nodes[others[0]].receipts[1].verdict == pb.VERDICT_ACCEPTED
        own = pb.Assignment()
        own.CopyFrom(part)
        own.index = 1
        assert (await mate.train(own)).verdict == pb.VERDICT_LATE


async def test_an_abandoned_pipeline_is_formed_again_on_the_same_samples(swarm: Swarm) -> None:
    lead, stage = await swarm.join(*ONE_PIPELINE)
    await submit(swarm.service, "me", job_spec(schedule=ONE))
    part = await stage.assigned()
    assert (await stage.train(part)).verdict == pb.VERDICT_HELD
    before = await lead.assigned()
    error = common_pb2.Error(code="SW303", cause="the stage went away")
    request = pb.AbandonRequest(job_id=part.job_id, round=1, generation=1, pipeline_id=0, reason=error)
    with pytest.raises(ContributionError):
        await swarm.service.abandon("stranger", request)
    await swarm.service.abandon(lead.peer, request)
    await swarm.service.abandon(lead.peer, request)
    await stage.settle(part)
    assert stage.receipts[1].verdict == pb.VERDICT_LATE
    assert stage.receipts[1].reason == "the pipeline was given up: SW303 the stage went away"
    await swarm.until(lambda: swarm.driver.state.generation == 2)
    await swarm.round("a", "b")
    assert (before.generation, lead.leased[1, 2]) == (1, [(0, 6)])
    assert stage.receipts[1].verdict == pb.VERDICT_ACCEPTED
    await swarm.until(lambda: swarm.driver.state.round == 2)
    with pytest.raises(ContributionError, match="generation 1"):
        await swarm.service.lease(lead.peer, pb.LeaseRequest(job_id=part.job_id, round=1, generation=1))


async def test_a_node_whose_contribution_is_held_gives_nothing_up_by_leaving(swarm: Swarm) -> None:
    lead, stage = await swarm.join(*ONE_PIPELINE)
    await submit(swarm.service, "me", job_spec(schedule=ONE))
    part = await stage.assigned()
    assert (await stage.train(part)).verdict == pb.VERDICT_HELD
    request = pb.AbandonRequest(job_id=part.job_id, round=1, generation=1, pipeline_id=0)
    for blame in ("", stage.peer):
        request.reason.CopyFrom(common_pb2.Error(code="SW303", cause="it stops", blame=blame))
        await swarm.service.abandon(stage.peer, request)
    assert (await lead.train(await lead.assigned())).verdict in (pb.VERDICT_HELD, pb.VERDICT_ACCEPTED)
    await stage.settle(part)
    assert stage.receipts[1].verdict == pb.VERDICT_ACCEPTED
    assert swarm.driver.state.generation == 1


async def test_a_node_that_its_lead_cannot_reach_is_not_tried_again_before_it_calls(swarm: Swarm) -> None:
    lead, stage = await swarm.join(*ONE_PIPELINE)
    job_id = (await submit(swarm.service, "me", job_spec(schedule=ONE))).job_id
    await swarm.until(lambda: swarm.driver.state.generation == 1)
    error = common_pb2.Error(code="SW303", cause="the stage does not answer", blame=stage.peer)
    request = pb.AbandonRequest(job_id=job_id, round=1, generation=1, pipeline_id=0, reason=error)
    await swarm.service.abandon(lead.peer, request)
    await swarm.until(lambda: swarm.driver.reason == "no idle node holds blocks 2-3")
    await lead.poll()
    assert swarm.driver.state.generation == 1
    await stage.poll()
    await swarm.until(lambda: swarm.driver.state.generation == 2)
    await swarm.round("a", "b")
    assert lead.receipts[1].verdict == pb.VERDICT_ACCEPTED


async def test_silent_nodes_are_lost_and_may_come_back(swarm: Swarm) -> None:
    lead, stage = await swarm.join(*ONE_PIPELINE)
    await submit(swarm.service, "me", job_spec(schedule=ONE))
    await swarm.until(lambda: swarm.driver.state.generation == 1)
    swarm.clock.advance(10)
    await lead.poll()
    swarm.clock.advance(6)
    await swarm.until(lambda: "block" in swarm.driver.reason)
    assert swarm.driver.reason == "no idle node holds blocks 2-3"
    status = await swarm.service.list_jobs("me", pb.ListJobsRequest())
    assert [node.peer_id for node in status.nodes] == [lead.peer]
    assert status.nodes[0].doing == "idle: job poems waits: no idle node holds blocks 2-3"
    assert (await stage.poll()).register_again
    await stage.register()
    await swarm.until(lambda: swarm.driver.state.generation == 2)
    await swarm.round("a", "b")
    assert lead.leased[1, 2] == [(0, 6)]


async def test_a_node_in_a_long_poll_is_not_silent(swarm: Swarm) -> None:
    (node,) = await swarm.join(("a", Span(0, 2)))
    seen = (await node.poll()).version
    waiting = asyncio.create_task(node.poll(seen, 30))
    await swarm.clock.sleep_over(30)
    assert (await waiting).version == seen, "the poll ended by its time"
    assert swarm.coordinator.nodes.silent(swarm.clock.now_s) == []
    swarm.clock.advance(15.1)
    assert swarm.coordinator.nodes.silent(swarm.clock.now_s) == [node.peer]


async def test_three_fruitless_attempts_pause_the_job_until_it_is_resumed(swarm: Swarm) -> None:
    lead, _ = await swarm.join(*ONE_PIPELINE)
    job_id = (await submit(swarm.service, "me", job_spec(schedule=ONE))).job_id
    for generation in (1, 2, 3):
        await swarm.until(lambda generation=generation: swarm.driver.state.generation == generation)
        request = pb.AbandonRequest(job_id=job_id, round=1, generation=generation, pipeline_id=generation - 1)
        await swarm.service.abandon(lead.peer, request)
    status = await swarm.service.get_job("me", pb.GetJobRequest(job="poems"))
    assert status.state == "paused"
    assert "no contribution in 3 attempts" in status.reason
    assert (await lead.poll()).reason.startswith("job poems is paused: round 1 brought no contribution")
    await swarm.service.resume_job("me", pb.ResumeJobRequest(job="poems"))
    with pytest.raises(JobConflict):
        await swarm.service.resume_job("me", pb.ResumeJobRequest(job="poems"))
    await swarm.until(lambda: swarm.driver.state.generation == 4)
    await swarm.round("a", "b")
    assert lead.receipts[1].verdict == pb.VERDICT_ACCEPTED


async def test_a_second_job_waits_for_nodes_and_gets_them(swarm: Swarm) -> None:
    lead, _ = await swarm.join(*ONE_PIPELINE)
    await submit(swarm.service, "me", job_spec(schedule=ONE | {"rounds": 1}))
    await lead.assigned()
    second = await submit(swarm.service, "me", job_spec(name="prose", schedule=ONE | {"rounds": 1}))
    other = swarm.coordinator.jobs.find(second.job_id)
    await swarm.until(lambda: "work for" in other.reason)
    assert other.reason == "no idle node holds blocks 0-3 (2 work for poems)"
    await swarm.round("a", "b")
    async with asyncio.timeout(20):
        while (await lead.assigned()).job_name != "prose":
            await lead.poll((await lead.poll()).version, 30)
    for node in swarm.nodes.values():
        node.at_round = -1
    await swarm.round("a", "b")
    reply = await swarm.service.list_jobs("me", pb.ListJobsRequest())
    assert [(job.name, job.state) for job in reply.jobs] == [("poems", "finished"), ("prose", "finished")]


async def test_min_pipelines_holds_a_round_back(swarm: Swarm) -> None:
    await swarm.join(*ONE_PIPELINE)
    await submit(swarm.service, "me", job_spec())
    await swarm.until(lambda: "1 of at least 2" in swarm.driver.reason)
    assert swarm.driver.reason == ("1 of at least 2 pipelines can be formed: no idle node holds blocks 0-3")
    await swarm.join(*TWO_PIPELINES[2:])
    await swarm.until(lambda: swarm.driver.state.generation == 1)
    assert len(swarm.driver.state.pipelines) == 2


async def test_submissions_that_cannot_be_taken_store_nothing(swarm: Swarm) -> None:
    digest = await upload(swarm.service, "me", DATASET)
    good = pb.SubmitJobRequest(
        hello=hello(MODEL_HASH), spec_json=job_spec(), dataset=digest, dataset_size=len(DATASET), samples=64
    )
    cases: list[tuple[dict[str, object], type[SwarmError]]] = [
        ({"hello": hello(sha256(b"other model"))}, ModelMismatch),
        ({"hello": hello(MODEL_HASH, ("telepathy",))}, VersionError),
        ({"spec_json": "{}"}, ConfigError),
        ({"spec_json": job_spec(name="../../etc")}, ConfigError),
        ({"dataset": sha256(b"absent")}, StorageError),
        ({"dataset_size": 5, "samples": 1}, StorageError),
        ({"samples": 2**60}, ConfigError),
    ]
    for changes, error in cases:
        bad = pb.SubmitJobRequest()
        bad.CopyFrom(good)
        for field in changes:
            bad.ClearField(field)  # type: ignore[arg-type]
        bad.MergeFrom(pb.SubmitJobRequest(**changes))  # type: ignore[arg-type]
        with pytest.raises(error):
            await swarm.service.submit_job("me", bad)
    assert swarm.coordinator._shared.storage.jobs() == []
    await swarm.service.submit_job("me", good)
    with pytest.raises(JobConflict):
        await swarm.service.submit_job("me", good)
    assert len(swarm.coordinator._shared.storage.jobs()) == 1


async def test_calls_that_name_what_is_not_there(swarm: Swarm) -> None:
    node, _ = await swarm.join(*ONE_PIPELINE)
    with pytest.raises(JobNotFound):
        await swarm.service.get_job("me", pb.GetJobRequest(job="nope"))
    with pytest.raises(StorageError):
        await swarm.service.get_piece("me", pb.GetPieceRequest(sha256=sha256(b"nope"), length=5))
    node.span = Span(0, 5)
    with pytest.raises(SpanError):
        await node.register()
    job_id = (await submit(swarm.service, "me", job_spec(schedule=ONE))).job_id
    with pytest.raises(ContributionError, match="round 2 is not open"):
        await swarm.service.await_round("me", pb.AwaitRoundRequest(job_id=job_id, round=2))
    await swarm.until(lambda: swarm.driver.state.generation == 1)
    request = pb.LeaseRequest(job_id=job_id, round=1, generation=1, pipeline_id=0)
    with pytest.raises(ContributionError, match="only the lead"):
        await swarm.service.lease(swarm.nodes["b"].peer, request)


async def test_a_node_that_comes_back_with_other_blocks_breaks_its_pipeline(swarm: Swarm) -> None:
    await swarm.join(*ONE_PIPELINE)
    await submit(swarm.service, "me", job_spec(schedule=ONE))
    await swarm.until(lambda: swarm.driver.state.generation == 1)
    await swarm.join(("b", Span(3, 4)))
    await swarm.until(lambda: swarm.driver.reason == "no idle node holds block 2")
    await swarm.join(("b", Span(1, 4)))
    await swarm.until(lambda: swarm.driver.state.generation == 2)


async def test_an_orderly_restart_in_the_middle_of_a_round(tmp_path: Path) -> None:
    async with opened(tmp_path) as swarm:
        node, _ = await swarm.join(*ONE_PIPELINE)
        await submit(swarm.service, "me", job_spec(schedule=ONE))
        await node.train(await node.assigned())
        version = (await node.poll()).version
    async with opened(tmp_path) as swarm:
        node = SimNode(swarm.service, *ONE_PIPELINE[0])
        assert (await node.poll()).version == version, "known without registering again, same part"
        for _ in range(4):
            swarm.clock.advance(10)
            await node.poll()
        assert len(swarm.coordinator.nodes) == 2, "there is a grace after a start"
        (stage,) = await swarm.join(ONE_PIPELINE[1])
        await swarm.one("b")
        assert stage.receipts[1].verdict == pb.VERDICT_ACCEPTED


async def test_a_folder_belongs_to_one_model(tmp_path: Path) -> None:
    async with opened(tmp_path) as swarm:
        await submit(swarm.service, "me", job_spec())
    other = replace(model_facts(), model_hash=sha256(b"other model"))
    with pytest.raises(ModelMismatch, match="job poems in this data folder is of model"):
        await Coordinator.open(tmp_path, other, identity(), CoordinatorSettings(), ManualClock())


async def test_old_rounds_make_room(tmp_path: Path) -> None:
    async with opened(tmp_path, kept_rounds=1, blob_grace_s=1.0) as swarm:
        await swarm.join(*ONE_PIPELINE)
        job_id = (await submit(swarm.service, "me", job_spec(schedule=ONE))).job_id
        for number in (1, 2, 3):
            await swarm.until(lambda number=number: swarm.driver.state.round == number)
            await swarm.round("a", "b")
            swarm.clock.advance(2)
    # Closing waits for the removal after the last round.
    storage = Storage(tmp_path, lambda name: None)
    outcomes = [storage.outcomes.find(job_id, number) for number in range(4)]
    left = {bytes.fromhex(path.name) for path in (tmp_path / "blobs" / "whole").iterdir()}
    assert [o is not None and o.state_blob in left for o in outcomes] == [False, False, True, True]
    assert [o is not None and o.snapshot_blob in left for o in outcomes] == [False, False, False, True]
    assert [c.payload in left for n in (1, 2, 3) for c in storage.contributions(job_id, n)] == [
        *(False, False),
        *(False, False),
        *(True, True),
    ]
    storage.close()


async def test_a_failing_disk_is_named_and_tried_again(tmp_path: Path) -> None:
    failing = {"before commit RoundAggregated", "before blob fsync"}

    def point(name: str) -> None:
        if armed and name in failing:
            failing.discard(name)
            raise StorageError("cannot write: the disk is full")

    armed = False
    async with opened(tmp_path, durable_point=point) as swarm:
        await swarm.join(*ONE_PIPELINE)
        await submit(swarm.service, "me", job_spec(schedule=ONE))
        await swarm.nodes["a"].assigned()
        armed = True
        training = asyncio.gather(swarm.one("a"), swarm.one("b"))
        for left in (1, 0):
            await swarm.until(lambda left=left: len(failing) == left and swarm.driver.reason != "")
            assert "aggregating failed and is tried again" in swarm.driver.reason
            assert swarm.driver.state.phase == "frozen"
            await swarm.clock.sleep_over(5)
            if left:
                await swarm.until(lambda: not failing)
        await training
        assert swarm.driver.reason == ""
        assert swarm.nodes["a"].receipts[1].verdict == pb.VERDICT_ACCEPTED


async def test_a_write_whose_end_is_unknown_is_looked_up(tmp_path: Path) -> None:
    failing = ["after commit ContributionHeld"]

    def point(name: str) -> None:
        if name in failing:
            failing.remove(name)
            raise StorageError("the disk failed after the commit")

    async with opened(tmp_path, durable_point=point) as swarm:
        node, _ = await swarm.join(*ONE_PIPELINE)
        await submit(swarm.service, "me", job_spec(schedule=ONE))
        part = await node.assigned()
        with pytest.raises(StorageError):
            await node.train(part)
        assert (await node.train(part)).verdict == pb.VERDICT_HELD
        assert [held.peer for held in swarm.driver.state.pipelines[0].held] == [node.peer]
        await swarm.one("b")


async def test_a_slow_pipeline_contributes_what_it_has(tmp_path: Path) -> None:
    async with opened(tmp_path, silent_s=1000.0) as swarm:
        await swarm.join(*TWO_PIPELINES)
        await submit(swarm.service, "me", job_spec(schedule=ONE | {"min_pipelines": 2, "quorum": 0.5}))
        slow = swarm.nodes["c"]
        part = await slow.assigned()
        slow.slow_lead = "c"
        mate = next(n for n in swarm.nodes.values() if n.peer == part.hops[1].peer_id)
        mate.slow_lead = "c"
        others = [name for name, node in swarm.nodes.items() if node not in (slow, mate)]
        assert not (await slow.poll()).wrap_up
        await slow.catch_up(part)
        lease = swarm.driver.lease_id(1, part.pipeline_id)
        assert lease is not None
        frame = slow.frame(part)
        digest = await upload(swarm.service, slow.peer, frame)
        early = await slow.contribute(part, digest, len(frame), lease)
        assert (early.verdict, early.reason) == (pb.VERDICT_REJECTED, "2 inner steps instead of 3")
        async with asyncio.TaskGroup() as group:
            for name in (*others, slow.name, mate.name):
                group.create_task(swarm.one(name))
        assert {node.receipts[1].verdict for node in swarm.nodes.values()} == {pb.VERDICT_ACCEPTED}
        storage = swarm.coordinator._shared.storage
        counts = {x.pipeline_id: sum(r.end - r.start for r in x.ranges) for x in storage.leases(part.job_id)[:2]}
        assert counts == {part.pipeline_id: 4, 1 - part.pipeline_id: 6}


async def test_a_lost_stage_is_replaced_within_the_round(tmp_path: Path) -> None:
    async with opened(tmp_path) as swarm:
        await swarm.join(*TWO_PIPELINES)
        await submit(swarm.service, "me", job_spec(schedule=ONE | {"min_pipelines": 2}))
        lead = swarm.nodes["a"]
        part = await lead.assigned()
        mate = next(n for n in swarm.nodes.values() if n.peer == part.hops[1].peer_id)
        (spare,) = await swarm.join(("e", Span(1, 4)))
        seen = await spare.poll()
        assert seen.reason == "job poems takes nodes on when its next round starts"
        error = common_pb2.Error(code="SW303", cause="the stage went away", blame=mate.peer)
        request = pb.AbandonRequest(
            job_id=part.job_id, round=1, generation=1, pipeline_id=part.pipeline_id, reason=error
        )
        await swarm.service.abandon(lead.peer, request)
        again = await lead.assigned()
        assert ([hop.peer_id for hop in again.hops], again.generation) == ([lead.peer, spare.peer], 2)
        assert not (await mate.poll()).HasField("assignment")
        await swarm.round(*(name for name, node in swarm.nodes.items() if node is not mate))
        assert {n.receipts[1].verdict for n in swarm.nodes.values() if n is not mate} == {pb.VERDICT_ACCEPTED}
        # The samples that the lost pipeline had are those of its repair.
        assert lead.leased[1, 2] == [(0, 6)] or lead.leased[1, 2] == [(6, 12)]


async def test_a_joiner_goes_on_where_the_job_is(swarm: Swarm) -> None:
    """Outer state, position in the data and inner step are the job's, not the joiner's."""
    await swarm.join(*ONE_PIPELINE)
    await submit(swarm.service, "me", job_spec(schedule=ONE | {"rounds": 4}))
    for number in (1, 2):
        await swarm.until(lambda number=number: swarm.driver.state.round == number)
        await swarm.round("a", "b")
    await swarm.until(lambda: swarm.driver.state.generation == 1 and swarm.driver.state.round == 3)
    joiner, _ = await swarm.join(("c", Span(0, 2)), ("d", Span(2, 4)))
    assert not (await joiner.poll()).HasField("assignment"), "it counts from the next round"
    await swarm.round("a", "b")
    await swarm.until(lambda: swarm.driver.state.generation == 1 and swarm.driver.state.round == 4)
    part = await joiner.assigned()
    await swarm.round("a", "b", "c", "d")
    # Its parameters were the snapshot after round 3, the same as everybody's.
    assert joiner.hashes == {3: swarm.nodes["a"].hashes[3]}
    assert all((joiner.params[key] == value).all() for key, value in swarm.nodes["a"].params.items())
    # Three rounds of six samples were accepted before: it leases behind them.
    leases = sorted(swarm.nodes["a"].leased[4, 1] + joiner.leased[4, 1])
    assert leases == [(18, 24), (24, 30)]
    # And its learning rate is that of the job's tenth inner step.
    spec = job_from_json(part.spec_json)
    warm = InnerSettings(lr=1.0, warmup_steps=19, decay="linear")
    first = global_step(part.round, spec.schedule.inner_steps, 0)
    assert (first, learning_rate(warm, first, 40)) == (9, 0.5)
    assert {node.receipts[4].verdict for node in swarm.nodes.values()} == {pb.VERDICT_ACCEPTED}
