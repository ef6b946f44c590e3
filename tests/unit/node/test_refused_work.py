"""Work that does not count ends at once: refused contributions, stages that were never finished, steps done ahead."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import node.stage
from node.jobstate import JobFolder
from node.loss import label_loss
from node.member import JobMember, Work
from node.members import Members
from node.stage import AdapterStage
from swarm.compute import Priority
from swarm.errors import UnsupportedModel
from swarm.ids import Span
from swarm.model.shard import Head
from swarm.wire.v1 import common_pb2
from swarm.wire.v1 import coordinator_pb2 as pb
from tests.unit.node.jobs import Node, job, node_with_coordinator
from tests.unit.node.pipelines import BLOCKS, CPU, Part, batch_of, spec_of

WHOLE = Span(0, BLOCKS)


async def _reformed(at: Node, old: pb.Assignment) -> pb.Assignment:
    while True:
        new = (await at.poll()).assignment
        if new.job_id == old.job_id and new.generation > old.generation:
            return new


def _work(assignment: pb.Assignment, lease: pb.LeaseReply, tokens: int) -> Work:
    return Work(
        assignment.round, assignment.generation, assignment.pipeline_id,
        inner_steps=2, tokens=tokens, lease_id=lease.lease_id, loss=1.0, label_tokens=20,
    )  # fmt: skip


async def test_a_rejected_contribution_gives_its_pipeline_up(tiny: Path, tmp_path: Path) -> None:
    async with node_with_coordinator(tiny, tmp_path) as at:
        job_id = await at.submit(job())
        first = await at.assigned(job_id, 1)
        member, lease = await at.members.get(first), await at.lease(first)
        await member.prepare(1, first.base_hash, first.lineage)
        at.members.settle_later(member, _work(first, lease, tokens=10**9), await member.end_steps())
        second = await _reformed(at, first)
        await at.members.end_settling(job_id, second.round)
        status = await at.link.call(lambda client: client.job_log(job_id))
        assert any("was rejected" in line.text for line in status.lines if line.kind == "pipeline_lost")
        await at.train(second)


async def test_a_late_contribution_does_not_hold_up_the_next_forming(tiny: Path, tmp_path: Path) -> None:
    async with node_with_coordinator(tiny, tmp_path) as at:
        job_id = await at.submit(job())
        first = await at.assigned(job_id, 1)
        member, lease = await at.members.get(first), await at.lease(first)
        await member.prepare(1, first.base_hash, first.lineage)
        ended = await member.end_steps()
        why = common_pb2.Error(code="SW303", cause="the lead was lost")
        request = pb.AbandonRequest(
            job_id=job_id, round=1, generation=first.generation, pipeline_id=first.pipeline_id, reason=why
        )
        await at.link.call(lambda client: client.abandon(request))
        second = await _reformed(at, first)
        await at.members.end_settling(job_id, second.round)
        at.members.settle_later(member, _work(first, lease, tokens=36), ended)
        await at.train(second)
        assert (await at.assigned(job_id, 2)).round == 2


async def test_a_stage_that_cannot_be_made_is_not_charged(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = Part(tiny, WHOLE, spec_of())
    before = part.ledger.used_by("optimizer")
    monkeypatch.setattr(node.stage, "keeps_apart", lambda *_: False)
    with pytest.raises(UnsupportedModel):
        AdapterStage(part.model, WHOLE, spec_of(data={"train": "x", "packing": True}), part.ledger, "job other")
    assert part.ledger.used_by("optimizer") == before
    part.compute.stop()


async def test_a_stage_that_nobody_waits_for_is_not_charged(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that makes it cannot be stopped."""
    part = Part(tiny, WHOLE, spec_of())
    before = part.ledger.used_by("optimizer")
    members = Members(part.compute, part.model, part.ledger, None, tmp_path, "me")  # type: ignore[arg-type]
    begun, go_on = threading.Event(), threading.Event()
    real = part.model.adapters.attach

    def slow(*given: Any) -> Any:
        begun.set()
        assert go_on.wait(10)
        return real(*given)

    monkeypatch.setattr(part.model.adapters, "attach", slow)
    hop = common_pb2.Hop(peer_id="me", span=common_pb2.Span(start=0, end=BLOCKS))
    assignment = pb.Assignment(job_id="j", job_name="j", spec_json=job().model_dump_json(), hops=[hop], round=1)
    getting = asyncio.create_task(members.get(assignment))
    await asyncio.to_thread(begun.wait)
    getting.cancel()
    await asyncio.gather(getting, return_exceptions=True)
    assert part.ledger.used_by("optimizer") > before, "who gave up does not wait"
    go_on.set()
    assert (await members.get(assignment)).stage.shapes
    assert part.ledger.used_by("optimizer") > before, "of the new one"
    members.make_room("another job")
    assert part.ledger.used_by("optimizer") == before
    part.compute.stop()


async def test_a_step_done_ahead_is_set_aside_with_the_rest(tiny: Path, tmp_path: Path) -> None:
    """It is not answered, so it may still wait for the thread, behind a prompt, when the round's score is asked for."""
    spec = spec_of(schedule={"inner_steps": 2, "overlap_steps": 1})
    part = Part(tiny, WHOLE, spec)
    run = part.compute.run
    folder = JobFolder(tmp_path, "j")
    member = JobMember("j", spec, WHOLE, part.stage, part.model.adapters, part.compute, None, folder)  # type: ignore[arg-type]
    head = Head(part.checkpoint, torch.float32, CPU)
    await member.prepare(1)

    def gradients(seq: int) -> None:
        batch = batch_of([9, 9], seed=seq)
        output = part.stage.forward(seq, head.embed(batch.input_ids_BT).detach(), input_grad=False)
        part.stage.backward(seq, label_loss(head, output, batch.labels_BT)[1])

    await run(Priority.TRAIN, gradients, 1)
    await run(Priority.TRAIN, part.stage.step, 1e-2)
    ended = await member.end_steps()
    await run(Priority.TRAIN, gradients, 2)
    begun, go_on = threading.Event(), threading.Event()

    def prompt() -> None:
        begun.set()
        assert go_on.wait(10)

    serving = asyncio.create_task(run(Priority.PREFILL, prompt))
    await asyncio.to_thread(begun.wait)
    scoring = asyncio.create_task(member.prepare(1, to_score=True))
    stepping = asyncio.create_task(run(Priority.TRAIN, part.stage.step, 1e-2, 1.0, rank=1.0))
    await asyncio.sleep(0)
    assert part.compute.waiting == 2
    go_on.set()
    await asyncio.gather(serving, scoring, stepping)
    assert {float(value[0]) for key, value in part.stage.moments().items() if key[0] == "t"} == {2.0}
    assert member._aside is not None
    assert any(not np.array_equal(member._aside[key], value) for key, value in ended.values.items())
    part.compute.stop()
