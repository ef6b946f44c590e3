"""A node's members with a coordinator of their own: real gRPC and TLS, real SQLite, a tiny real model. No chain."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from coordinator.app import Coordinator
from coordinator.ports import CoordinatorSettings, ModelFacts
from node.link import Link
from node.loss import label_loss
from node.member import JobMember, Work
from node.members import Members
from node.memory import Ledger
from node.serving import NodeModel
from swarm.compute import Compute
from swarm.config import JobSpec
from swarm.data.batch import Batch
from swarm.identity import Identity
from swarm.ids import Span
from swarm.metrics import Traffic
from swarm.model.checkpoint import Checkpoint
from swarm.model.shard import Head
from swarm.net.join import JoinInfo
from swarm.wire.rpc import COORDINATOR_SERVICE, RpcServer
from swarm.wire.tls import ServerTls
from swarm.wire.v1 import common_pb2
from swarm.wire.v1 import coordinator_pb2 as pb
from swarm.wire.version import hello
from tests.unit.node.pipelines import BLOCKS, CPU, batch_of

LR = 1e-2
_DATA = b'{"messages": []}\n' * 64


@dataclass
class Node:
    """One node that holds the whole model."""

    folder: Path
    model: NodeModel
    ledger: Ledger
    compute: Compute
    link: Link
    members: Members
    seen: int = 0

    async def submit(self, spec: JobSpec) -> str:
        """The job's id."""
        digest = await self.link.call(lambda client: client.put_blob(_DATA))
        request = pb.SubmitJobRequest(
            hello=hello(self.model.checkpoint.model_hash),
            spec_json=spec.model_dump_json(),
            dataset=digest,
            dataset_size=len(_DATA),
            samples=64,
        )
        return (await self.link.call(lambda client: client.submit_job(request))).job_id

    async def poll(self) -> pb.PollReply:
        request = pb.PollRequest(seen=self.seen, wait_s=10)
        reply = await self.link.call(lambda client: client.poll(request))
        self.seen = reply.version
        return reply

    async def assigned(self, job_id: str, round: int) -> pb.Assignment:
        while True:
            found = (await self.poll()).assignment
            if (found.job_id, found.round) == (job_id, round):
                return found

    async def train(self, assignment: pb.Assignment, batches: int = 2) -> JobMember:
        """A round from its lease to its commit."""
        member = await self.members.get(assignment)
        lease = await self.lease(assignment)
        await member.prepare(assignment.round, assignment.base_hash, assignment.lineage)
        head = Head(self.model.checkpoint, torch.float32, CPU)
        for step in range(batches):
            self.step(member, head, batch_of([9, 9], seed=10 * assignment.round + step))
        work = Work(
            assignment.round, assignment.generation, assignment.pipeline_id,
            inner_steps=batches, tokens=36, lease_id=lease.lease_id, loss=1.0, label_tokens=20,
        )  # fmt: skip
        await member.contribute_and_settle(work, await member.end_steps())
        return member

    async def lease(self, assignment: pb.Assignment) -> pb.LeaseReply:
        request = pb.LeaseRequest(
            job_id=assignment.job_id,
            round=assignment.round,
            generation=assignment.generation,
            pipeline_id=assignment.pipeline_id,
        )
        return await self.link.call(lambda client: client.lease(request))

    def step(self, member: JobMember, head: Head, batch: Batch) -> None:
        stage = member.stage
        stage.admit(0, (*batch.input_ids_BT.shape, head.width))
        output = stage.forward(0, head.embed(batch.input_ids_BT).detach(), input_grad=False)
        _, gradient = label_loss(head, output, batch.labels_BT)
        stage.backward(0, gradient)
        stage.step(LR)


@asynccontextmanager
async def node_with_coordinator(
    tiny: Path, folder: Path, settings: CoordinatorSettings | None = None
) -> AsyncIterator[Node]:
    """The coordinator's files are in `folder / "coordinator"`."""
    checkpoint = Checkpoint.open(str(tiny))
    ledger, compute = Ledger(1 << 40), Compute()
    model = NodeModel(checkpoint, Span(0, BLOCKS), torch.float32, CPU, ledger)
    facts = ModelFacts("tiny", "local", checkpoint.model_hash, BLOCKS, model.adapters)
    coordinator = await Coordinator.open(folder / "coordinator", facts, Identity.generate(), settings)
    tls = ServerTls.load_or_create(folder)
    server = RpcServer(COORDINATOR_SERVICE, coordinator.service, tls)
    port = await server.start("127.0.0.1", 0)
    join = JoinInfo((), "tiny", "local", checkpoint.model_hash).with_coordinator(f"127.0.0.1:{port}", tls.fingerprint)
    me = Identity.generate()
    link = Link(join, me, Traffic())
    members = Members(compute, model, ledger, link, folder / "node", me.peer_id)
    try:
        span = common_pb2.Span(start=0, end=BLOCKS)
        request = pb.RegisterRequest(
            hello=hello(checkpoint.model_hash, ("train",)), span=span, addrs=[], device="cpu", dtype="float32"
        )
        await link.call(lambda client: client.register(request))
        yield Node(folder / "node", model, ledger, compute, link, members)
    finally:
        await members.stop()
        await link.close()
        await server.stop(0)
        await coordinator.close()
        compute.stop()


def job(**settings: object) -> JobSpec:
    """Of one pipeline."""
    schedule = {"rounds": 3, "inner_steps": 2, "batch_size": 2, "max_length": 16, "min_pipelines": 1}
    sections: dict[str, object] = {"name": "tiny", "data": {"train": "none.jsonl"}, "schedule": schedule}
    return JobSpec.model_validate(sections | settings)
