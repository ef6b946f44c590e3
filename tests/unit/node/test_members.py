"""What a node keeps of a job, and what it gives back, against a coordinator of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from node.jobstate import JobFolder
from swarm.model.shard import Head
from swarm.optim.params import hash_all
from swarm.wire.v1 import coordinator_pb2 as pb
from tests.unit.node.jobs import job, node_with_coordinator
from tests.unit.node.pipelines import BLOCKS, CPU, batch_of

OWN = {"lr": 1e-2, "start": "own"}


async def test_after_a_rewind_to_the_start_a_node_trains_from_the_start(tiny: Path, tmp_path: Path) -> None:
    async with node_with_coordinator(tiny, tmp_path) as node:
        job_id = await node.submit(job())
        for round in (1, 2):
            await node.train(await node.assigned(job_id, round))
        await node.link.call(lambda client: client.pause_job(job_id))
        await node.link.call(lambda client: client.resume_job(job_id, 0))
        again = await node.assigned(job_id, 1)
        member = await node.members.get(again)
        await member.prepare(1, again.base_hash, again.lineage)
        initial = node.model.adapters.initial(job().method, job().schedule.seed)
        assert again.base_hash == hash_all(initial)
        assert hash_all(member.stage.values()) == again.base_hash
        assert member.stage.moments() == {}


async def test_blocks_that_stay_keep_what_was_not_sent_when_a_pipeline_is_cut_elsewhere(
    tiny: Path, tmp_path: Path
) -> None:
    async with node_with_coordinator(tiny, tmp_path) as node:
        job_id = await node.submit(job(inner=OWN, uplink={"density": 0.05}))
        whole = await node.train(await node.assigned(job_id, 1))
        second = await node.assigned(job_id, 2)
        await whole.prepare(2, second.base_hash, second.lineage)
        values, moments = whole.stage.values(), whole.stage.moments()
        fewer = pb.Assignment()
        fewer.CopyFrom(second)
        fewer.hops[0].span.end = BLOCKS - 1
        part = await node.members.get(fewer)
        assert part is not whole
        await part.prepare(2, second.base_hash, second.lineage)
        assert len(part.stage.values()) < len(values)
        # They start from the reference less what they could not send: the same only if that was kept.
        assert all(np.array_equal(value, values[key]) for key, value in part.stage.values().items())
        assert all(np.array_equal(value, moments[key]) for key, value in part.stage.moments().items())
        assert {key[2:] for key in part.stage.moments()} == part.stage.values().keys()


async def test_a_stage_that_was_left_in_the_middle_of_a_step_holds_no_memory(tiny: Path, tmp_path: Path) -> None:
    async with node_with_coordinator(tiny, tmp_path) as node:
        assignment = await node.assigned(await node.submit(job()), 1)
        member = await node.members.get(assignment)
        before = node.ledger.used_by("activations")  # serving's workspace
        head, ids = Head(node.model.checkpoint, torch.float32, CPU), batch_of([9, 9]).input_ids_BT

        async def begin() -> int:
            await member.prepare(1, assignment.base_hash, assignment.lineage)
            member.stage.admit(0, (*ids.shape, head.width))
            member.stage.forward(0, head.embed(ids).detach(), input_grad=False)
            return member.uses

        first = await begin()
        assert node.ledger.used_by("activations") > before
        await member.leave(first)
        assert node.ledger.used_by("activations") == before
        # Who left for good does not take away what somebody else has begun since.
        second = await begin()
        await member.leave(first)
        assert node.ledger.used_by("activations") > before
        await member.leave(second)
        assert node.ledger.used_by("activations") == before


async def test_a_job_that_is_over_leaves_nothing_behind(tiny: Path, tmp_path: Path) -> None:
    async with node_with_coordinator(tiny, tmp_path) as node:
        schedule = {"rounds": 1, "inner_steps": 2, "batch_size": 2, "max_length": 16, "min_pipelines": 1}
        job_id = await node.submit(job(schedule=schedule))
        await node.train(await node.assigned(job_id, 1))
        folder = JobFolder(node.folder, job_id)
        assert node.ledger.used_by("optimizer") > 0
        assert folder.load() is not None
        reply = await node.poll()
        while not reply.adapters:
            reply = await node.poll()
        node.members.finished(reply.adapters[0].job_id)
        assert job_id not in node.members
        assert node.ledger.used_by("optimizer") == 0
        assert folder.load() is None


async def test_another_job_gets_the_memory_of_one_that_waits(tiny: Path, tmp_path: Path) -> None:
    async with node_with_coordinator(tiny, tmp_path) as node:
        first = await node.submit(job())
        await node.train(await node.assigned(first, 1))
        used = node.ledger.used_by("optimizer")
        await node.link.call(lambda client: client.pause_job(first))
        second = await node.submit(job(name="second"))
        node.members.make_room(second)
        assert node.ledger.used_by("optimizer") == 0
        await node.train(await node.assigned(second, 1))
        assert node.ledger.used_by("optimizer") == used
