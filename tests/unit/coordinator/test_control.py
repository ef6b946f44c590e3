"""What an owner does with a running job, called as the network would call it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest
from coordinator_sim import DATASET, MODEL_HASH, SimNode, download, identity, job_spec, submit, upload
from coordinator_swarm import ONE, ONE_PIPELINE, Swarm, opened

from coordinator.round_model import Best, JobState
from coordinator.storage import Storage
from swarm.errors import ConfigError, ContributionError, JobConflict, NotJobOwner, StorageError
from swarm.ids import sha256
from swarm.wire.v1 import coordinator_pb2 as pb
from swarm.wire.version import hello

POEMS = pb.GetJobRequest(job="poems")


@pytest.fixture
async def swarm(tmp_path: Path) -> AsyncIterator[Swarm]:
    async with opened(tmp_path) as swarm:
        yield swarm


async def _run(swarm: Swarm, rounds: int, first: int = 1) -> None:
    for number in range(first, first + rounds):
        await swarm.until(lambda number=number: swarm.driver.state.round == number)
        await swarm.round("a", "b")


async def _log(swarm: Swarm, after: int = 0) -> list[pb.LogLine]:
    return list((await swarm.service.job_log("anybody", pb.JobLogRequest(job="poems", after=after))).lines)


def _resume(round: int | None = None) -> pb.ResumeJobRequest:
    return pb.ResumeJobRequest(job="poems", round=round)


async def test_only_the_owner_and_the_coordinator_control_a_job(swarm: Swarm) -> None:
    await submit(swarm.service, "me", job_spec(schedule=ONE))
    change = pb.ChangeJobRequest(job="poems", settings={"rounds": "5"})
    for call, request in (
        (swarm.service.pause_job, POEMS),
        (swarm.service.stop_job, POEMS),
        (swarm.service.resume_job, _resume()),
        (swarm.service.change_job, change),
    ):
        with pytest.raises(NotJobOwner, match="was submitted by me, not by stranger"):
            await call("stranger", request)  # type: ignore[operator]
    assert (await swarm.service.get_job("stranger", POEMS)).submitter == "me"
    assert (await swarm.service.pause_job(identity().peer_id, POEMS)).state == "paused"
    assert (await swarm.service.resume_job("me", _resume())).state == "waiting"


async def test_a_pause_frees_the_nodes_and_their_samples(swarm: Swarm) -> None:
    lead, stage = await swarm.join(*ONE_PIPELINE)
    await submit(swarm.service, "me", job_spec(schedule=ONE))
    part = await stage.assigned()
    assert (await stage.train(part)).verdict == pb.VERDICT_HELD
    second = await submit(swarm.service, "me", job_spec(name="prose", schedule=ONE))
    assert (await swarm.service.pause_job("me", POEMS)).reason == "paused by its owner"
    with pytest.raises(JobConflict, match="is paused already: paused by its owner"):
        await swarm.service.pause_job("me", POEMS)
    await stage.settle(part)
    assert stage.receipts[1].verdict == pb.VERDICT_LATE
    other = swarm.coordinator.jobs.find(second.job_id)
    async with asyncio.timeout(20):
        while other.state.job is not JobState.RUNNING:
            await other.changed.ticket().wait()
    await swarm.service.stop_job("me", pb.GetJobRequest(job="prose"))
    await swarm.service.resume_job("me", _resume())
    await swarm.until(lambda: swarm.driver.state.generation == 2)
    await swarm.round("a", "b")
    assert lead.leased[1, 2] == [(0, 6)]
    assert (await swarm.service.get_job("me", pb.GetJobRequest(job="prose"))).state == "finished"


async def test_a_rewound_job_ends_as_if_the_discarded_rounds_had_not_been(tmp_path: Path) -> None:
    finals = []
    for rewinds in (False, True):
        async with opened(tmp_path / str(rewinds)) as swarm:
            await swarm.join(*ONE_PIPELINE)
            await submit(swarm.service, "me", job_spec(schedule=ONE))
            await _run(swarm, 2)
            if rewinds:
                await swarm.until(lambda: swarm.driver.state.generation == 1 and swarm.driver.state.round == 3)
                assert (await swarm.service.pause_job("me", POEMS)).kept_rounds == [1, 2]
                with pytest.raises(JobConflict, match="round 7 of job poems is not kept"):
                    await swarm.service.resume_job("me", _resume(7))
                status = await swarm.service.resume_job("me", _resume(1))
                assert (status.round, status.kept_rounds) == (2, [1])
                await _run(swarm, 1, first=2)
            await _run(swarm, 1, first=3)
            nodes = swarm.nodes.values()
            assert {node.receipts[3].verdict for node in nodes} == {pb.VERDICT_ACCEPTED}
            status = await swarm.service.get_job("me", POEMS)
            finals.append([(entry.params_hash, entry.tokens) for entry in status.history])
            if rewinds:
                (line,) = [line for line in await _log(swarm) if line.kind == "job_rewound"]
                assert line.text == "back to the end of round 1; 1 rounds are discarded"
    assert finals[0] == finals[1]


async def test_a_rewind_survives_a_restart_and_old_contributions_do_not_count(tmp_path: Path) -> None:
    async with opened(tmp_path) as swarm:
        stale, _ = await swarm.join(*ONE_PIPELINE)
        await submit(swarm.service, "me", job_spec(schedule=ONE))
        await _run(swarm, 1)
        await swarm.until(lambda: swarm.driver.state.generation == 1 and swarm.driver.state.round == 2)
        part = await stale.assigned()
        await stale.catch_up(part)
        frame = stale.frame(part)
        await swarm.service.pause_job("me", POEMS)
        await swarm.service.resume_job("me", _resume(0))
    async with opened(tmp_path) as swarm:
        assert (swarm.driver.state.round, swarm.driver.state.lineage, swarm.driver.kept_rounds) == (1, 1, [0])
        stale.service = swarm.service
        digest = sha256(frame)
        receipt = await stale.contribute(part, digest, len(frame), 1)
        assert receipt.verdict == pb.VERDICT_REJECTED
        for name, span in ONE_PIPELINE:
            await SimNode(swarm.service, name, span).register()
            swarm.nodes[name] = SimNode(swarm.service, name, span)
        await _run(swarm, 3)
        assert swarm.driver.state.job is JobState.FINISHED


async def test_a_stopped_job_keeps_its_adapter(swarm: Swarm) -> None:
    node, _ = await swarm.join(*ONE_PIPELINE)
    await submit(swarm.service, "me", job_spec(schedule=ONE))
    await _run(swarm, 1)
    await swarm.until(lambda: swarm.driver.state.generation == 1 and swarm.driver.state.round == 2)
    status = await swarm.service.stop_job("me", POEMS)
    assert (status.state, status.reason) == ("finished", "stopped by its owner in round 2 of 3")
    assert (status.adapter_round, len(status.adapter)) == (1, 2)
    (adapter,) = (await node.poll()).adapters
    assert adapter.round == 1
    with pytest.raises(JobConflict, match="is finished already"):
        await swarm.service.stop_job("me", POEMS)
    with pytest.raises(JobConflict):
        await swarm.service.resume_job("me", _resume())


async def test_an_older_round_can_be_named(tmp_path: Path) -> None:
    async with opened(tmp_path, kept_rounds=2, blob_grace_s=1.0) as swarm:
        await swarm.join(*ONE_PIPELINE)
        await submit(swarm.service, "me", job_spec(schedule=ONE))
        for number in (1, 2, 3):
            await _run(swarm, 1, first=number)
            swarm.clock.advance(2)
        await swarm.until(lambda: swarm.driver.state.job is JobState.FINISHED)
        status = await swarm.service.get_job("me", POEMS)
        assert (status.kept_rounds, status.adapter_round) == ([2, 3], 3)
        older = await swarm.service.get_job("me", pb.GetJobRequest(job="poems", adapter_round=2))
        assert older.adapter_round == 2
        files = {f.name: f for f in older.adapter}
        newest = {f.name: f for f in status.adapter}
        name = "adapter_model.safetensors"
        assert files[name].sha256 != newest[name].sha256
        await download(swarm.service, "me", files[name].sha256, files[name].size)
        first = await swarm.service.get_job("me", pb.GetJobRequest(job="poems", adapter_round=1))
        assert (first.adapter_round, len(first.adapter)) == (1, 2), "it is made when it is read"


async def test_settings_change_at_the_next_round_and_survive_a_restart(tmp_path: Path) -> None:
    async with opened(tmp_path) as swarm:
        await swarm.join(*ONE_PIPELINE)
        await submit(swarm.service, "me", job_spec(schedule=ONE))
        await swarm.until(lambda: swarm.driver.state.generation == 1)
        settings = {"rounds": "2", "inner.lr": "5e-4"}
        await swarm.service.change_job("me", pb.ChangeJobRequest(job="poems", settings=settings))
        status = await swarm.service.change_job(
            "me", pb.ChangeJobRequest(job="poems", settings={"round_deadline_s": "50"})
        )
        assert status.rounds == 3
        assert status.next_spec_json
        assert "5e-4" not in (await swarm.nodes["a"].assigned()).spec_json.replace("0.0005", "5e-4")
        texts = [line.text for line in await _log(swarm) if line.kind == "settings_changed"]
        assert texts == [
            "inner.lr 0.001 → 5e-4; schedule.rounds 3 → 2",
            "schedule.round_deadline_s 100.0 → 50",
        ]
    async with opened(tmp_path) as swarm:
        await swarm.join(*ONE_PIPELINE)
        assert swarm.driver.state.next is not None
        await _run(swarm, 1)
        await swarm.until(lambda: swarm.driver.state.round == 2)
        assert (swarm.driver.spec.inner.lr, swarm.driver.spec.schedule.round_deadline_s) == (5e-4, 50.0)
        assert '"lr":0.0005' in (await swarm.nodes["a"].assigned()).spec_json
        await _run(swarm, 1, first=2)
        await swarm.until(lambda: swarm.driver.state.job is JobState.FINISHED)


async def test_settings_that_must_not_change_say_why(swarm: Swarm) -> None:
    await submit(swarm.service, "me", job_spec(schedule=ONE))
    for settings, why in (
        ({"inner_steps": "4"}, "inner_steps cannot change while a job runs: there is no such setting"),
        ({"schedule.inner_steps": "4"}, "which samples a lease holds"),
        ({"method.r": "8"}, "the adapters that were trained so far would not fit"),
        ({"uplink.bits": "4"}, "contributions under way are compressed with it"),
        ({"inner.betas": "[0, 0]"}, "nodes build their optimizers with it"),
        ({"nonsense": "1"}, "there is no such setting"),
        ({"rounds": "many"}, "schedule.rounds"),
        ({"rounds": "0"}, "schedule.rounds"),
        ({}, "no setting is named"),
    ):
        with pytest.raises(ConfigError, match=why):
            await swarm.service.change_job("me", pb.ChangeJobRequest(job="poems", settings=settings))
    assert swarm.driver.state.rules.rounds == 3


async def test_a_waiting_job_takes_a_change_at_once(swarm: Swarm) -> None:
    await swarm.join(*ONE_PIPELINE)
    await submit(swarm.service, "me", job_spec(schedule=ONE | {"min_pipelines": 2}))
    await swarm.until(lambda: "1 of at least 2" in swarm.driver.reason)
    await swarm.service.change_job("me", pb.ChangeJobRequest(job="poems", settings={"min_pipelines": "1"}))
    await swarm.until(lambda: swarm.driver.state.generation == 1)


async def test_the_log_tells_what_happened_and_follows(swarm: Swarm) -> None:
    await submit(swarm.service, "me", job_spec(schedule=ONE | {"rounds": 1}))
    await swarm.until(lambda: "block" in swarm.driver.reason)
    first, *_, last = await _log(swarm)
    assert (first.kind, first.peer_id, first.seq) == ("job_submitted", "me", 1)
    assert (last.kind, last.text) == ("job_waiting", "no idle node holds blocks 0-3")
    following = asyncio.create_task(
        swarm.service.job_log("anybody", pb.JobLogRequest(job="poems", after=last.seq, wait_s=30))
    )
    _, stage = await swarm.join(*ONE_PIPELINE)
    reply = await following
    assert reply.lines[0].kind in ("job_waiting", "pipeline_formed")
    part = await stage.assigned()
    await stage.train(part)
    frame = stage.frame(part)
    other = await upload(swarm.service, stage.peer, frame + b"\x00")
    for _ in range(3):
        await stage.contribute(part, other, len(frame) + 1, 0)
    await swarm.one("a")
    await swarm.until(lambda: swarm.driver.state.job is JobState.FINISHED)
    lines = await _log(swarm)
    assert [line.seq for line in lines] == list(range(1, len(lines) + 1))
    kinds = [line.kind for line in lines if line.kind != "job_waiting"]
    assert kinds.count("contribution_conflict") == 1, "a refusal is told once"
    assert [kind for kind in kinds if kind != "contribution_conflict"] == [
        *("job_submitted", "round_opened", "pipeline_formed", "contribution_held", "contribution_held"),
        *("round_frozen", "round_committed", "job_finished"),
    ]
    committed = next(line for line in lines if line.kind == "round_committed")
    assert (committed.tokens, committed.loss) == (7, 2.0)
    assert committed.bytes > 0
    reply = await swarm.service.job_log("anybody", pb.JobLogRequest(job="poems", after=len(lines), wait_s=30))
    assert reply.finished


async def test_the_log_is_bounded(tmp_path: Path) -> None:
    async with opened(tmp_path, kept_events=5) as swarm:
        await swarm.join(*ONE_PIPELINE)
        await submit(swarm.service, "me", job_spec(schedule=ONE))
        await _run(swarm, 3)
        await swarm.until(lambda: swarm.driver.state.job is JobState.FINISHED)
        lines = await _log(swarm)
        assert len(lines) == 5
        assert lines[-1].kind == "job_finished"
        assert [line.seq for line in lines] == list(range(lines[0].seq, lines[0].seq + 5))


SCORED = {"schedule": ONE | {"rounds": 9}, "eval": {"data": "heldout.jsonl"}, "early_stopping": {"patience": 2}}


async def test_a_job_that_gets_no_better_ends_with_its_best_round(tmp_path: Path) -> None:
    async with opened(tmp_path, kept_rounds=1, blob_grace_s=1.0) as swarm:
        lead, stage = await swarm.join(*ONE_PIPELINE)
        await submit(swarm.service, "me", job_spec(**SCORED))
        for number in (1, 2, 3, 4):
            await swarm.until(lambda number=number: swarm.driver.state.round == number)
            await swarm.round("a", "b")
            await swarm.until(lambda: swarm.driver.state.scorer is not None)
            part = await lead.assigned()
            assert part.score
            assert not (await stage.assigned()).score
            with pytest.raises(ContributionError, match="does not lead"):
                await stage.score(part)
            swarm.clock.advance(2)
            await lead.score(part)
            await lead.score(part)  # a repeated report changes nothing
        await swarm.until(lambda: swarm.driver.state.job is JobState.FINISHED)
        status = await swarm.service.get_job("me", POEMS)
        assert status.reason == (
            "stopped early: 2 evaluations in a row were no better than that of round 2 (held-out loss 1.0000)"
        )
        assert [entry.eval_loss for entry in status.history] == [2.0, 1.0, 3.0, 4.0]
        assert (status.best_round, status.best_loss, status.adapter_round) == (2, 1.0, 2)
        assert status.kept_rounds == [2, 4], "the best round is kept however long ago it was"
        for file in status.adapter:
            await download(swarm.service, "me", file.sha256, file.size)
        (adapter,) = (await lead.poll()).adapters
        assert adapter.round == 2
        texts = [line.text for line in await _log(swarm) if line.kind == "round_scored"]
        assert texts[1:3] == [
            "held-out loss 1.0000, the best so far",
            "held-out loss 3.0000, the best is round 2's 1.0000",
        ]
    async with opened(tmp_path, kept_rounds=1) as swarm:
        assert (swarm.driver.kept_rounds, swarm.driver.adapter_round) == ([2, 4], 2)


async def _scored(swarm: Swarm, losses: Mapping[int, float]) -> None:
    """Train and score the rounds that are given."""
    for number, loss in losses.items():
        await swarm.until(lambda number=number: swarm.driver.state.round == number)
        await swarm.round("a", "b")
        await swarm.until(lambda: swarm.driver.state.scorer is not None)
        part = await swarm.nodes["a"].assigned()
        swarm.clock.advance(2)
        request = pb.ReportScoreRequest(
            job_id=part.job_id,
            round=part.round,
            generation=part.generation,
            pipeline_id=part.pipeline_id,
            loss=loss,
            tokens=11,
        )
        await swarm.service.report_score(swarm.nodes["a"].peer, request)


async def test_a_rewound_job_has_its_best_round_among_those_that_are_kept(tmp_path: Path) -> None:
    spec = SCORED | {"early_stopping": {"patience": 3}}
    async with opened(tmp_path, kept_rounds=3, blob_grace_s=1.0) as swarm:
        await swarm.join(*ONE_PIPELINE)
        await submit(swarm.service, "me", job_spec(**spec))
        await _scored(swarm, {1: 2.0, 2: 1.0, 3: 3.0, 4: 2.5, 5: 0.5, 6: 3.0})
        await swarm.until(lambda: swarm.driver.state.round == 7)
        paused = await swarm.service.pause_job("me", POEMS)
        assert (paused.best_round, paused.kept_rounds) == (5, [4, 5, 6])
        rewound = await swarm.service.resume_job("me", _resume(4))
        assert (rewound.best_round, rewound.best_loss, rewound.adapter_round) == (4, 2.5, 4)
        await _scored(swarm, {5: 3.0, 6: 3.0, 7: 3.0})
        await swarm.until(lambda: swarm.driver.state.job is JobState.FINISHED)
        status = await swarm.service.get_job("me", POEMS)
        assert (status.adapter_round, status.reason) == (
            4,
            "stopped early: 3 evaluations in a row were no better than that of round 4 (held-out loss 2.5000)",
        )
        for file in status.adapter:
            await download(swarm.service, "me", file.sha256, file.size)
        assert len(status.adapter) == 2


async def test_what_was_the_best_round_is_not_kept_for_it(tmp_path: Path) -> None:
    """Nothing refers to it any more from the moment a later one is better."""
    async with opened(tmp_path, kept_rounds=1) as swarm:
        await swarm.join(*ONE_PIPELINE)
        await submit(swarm.service, "me", job_spec(**SCORED))
        await _scored(swarm, {1: 1.0, 2: 3.0})
        await swarm.until(lambda: swarm.driver.state.round == 3)
        assert swarm.driver.kept_rounds == [1, 2]
        await _scored(swarm, {3: 0.5})
        assert swarm.driver.kept_rounds == [3]


async def test_a_job_whose_best_round_is_gone_has_the_newest_adapter(tmp_path: Path) -> None:
    """As a rewind by an earlier release could leave it."""
    async with opened(tmp_path, kept_rounds=1, blob_grace_s=1.0) as swarm:
        await swarm.join(*ONE_PIPELINE)
        job_id = (await submit(swarm.service, "me", job_spec(**SCORED))).job_id
        await _scored(swarm, {1: 3.0, 2: 2.0, 3: 1.0, 4: 3.0, 5: 3.0})
        await swarm.until(lambda: swarm.driver.state.job is JobState.FINISHED)
    storage = Storage(tmp_path, lambda name: None)
    with storage.transaction("an earlier release's rewind"):
        storage.set_best(job_id, Best(2, 2.0, 2))
    storage.close()
    async with opened(tmp_path, kept_rounds=1) as swarm:
        (lead, _) = await swarm.join(*ONE_PIPELINE)
        status = await swarm.service.get_job("me", POEMS)
        assert (status.adapter_round, len(status.adapter)) == (5, 2)
        assert "the files of round 2, the best, are gone: its adapter is that of round 5" in status.reason
        assert [adapter.round for adapter in (await lead.poll()).adapters] == [5]


async def test_a_held_out_file_comes_with_eval(swarm: Swarm) -> None:
    digest = await upload(swarm.service, "me", DATASET)
    request = pb.SubmitJobRequest(
        hello=hello(MODEL_HASH), spec_json=job_spec(**SCORED), dataset=digest, dataset_size=len(DATASET), samples=64
    )
    with pytest.raises(ConfigError, match="a held-out file comes with `eval`"):
        await swarm.service.submit_job("me", request)
    request.heldout, request.heldout_size, request.heldout_samples = sha256(b"absent"), 10, 2
    with pytest.raises(StorageError, match=r"eval\.data is not uploaded"):
        await swarm.service.submit_job("me", request)
    with pytest.raises(ConfigError, match="early_stopping needs eval"):
        await submit(swarm.service, "me", job_spec(early_stopping={"patience": 2}))
