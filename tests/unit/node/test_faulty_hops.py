"""What a hop sends is checked and the hop named; who may open a training chain, and what an old one can still do."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from node.chains import ChainServer
from node.member import Ended, JobMember, Work
from node.stage_session import StageSession
from swarm.data.microbatch import split_batch
from swarm.errors import ProtocolError, SessionError
from swarm.identity import Identity
from swarm.ids import Span
from swarm.model.shard import Head
from swarm.net.chain import PROTOCOL, expect_opened, hop_to_proto
from swarm.net.p2p import Peer, PeerSettings
from swarm.net.view import Hop
from swarm.wire.v1 import chain_pb2, common_pb2
from swarm.wire.v1 import coordinator_pb2 as pb
from swarm.wire.version import hello
from tests.unit.node.jobs import job, node_with_coordinator
from tests.unit.node.pipelines import BLOCKS, CPU, Hosted, NoAdapters, Part, Pipeline, batch_of, pipeline_of, spec_of


def _cut(p: Pipeline, name: str, columns: Any) -> None:
    real = getattr(p.hosted, name)
    setattr(p.hosted, name, lambda *given: real(*given)[columns])


FAULTS: dict[str, Callable[[Pipeline], None]] = {
    "fewer columns": lambda p: _cut(p, "train_forward", (slice(None), slice(-1))),
    "another width": lambda p: _cut(p, "train_forward", (..., slice(-1))),
    "a smaller gradient": lambda p: _cut(p, "train_backward", (slice(None), slice(-1))),
    "a negative norm": lambda p: setattr(p.hosted, "squared_norm", lambda: -1e9),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_hop_that_sends_what_does_not_fit_is_blamed(tiny: Path, tmp_path: Path, fault: str) -> None:
    async with pipeline_of(tiny, spec_of(activations="float32"), tmp_path) as p:
        FAULTS[fault](p)
        with pytest.raises(ProtocolError) as refused:
            await p.driver.step(split_batch(batch_of([9, 9]), 1), 1e-3)
        assert refused.value.blame == p.chain.hops[-1].peer_id


async def test_only_the_hop_before_opens_a_training_chain(tiny: Path, tmp_path: Path) -> None:
    """A stranger who knows all of an assignment names its lead as hop 0."""
    second = Part(tiny, Span(2, BLOCKS), spec_of())
    peers = [await Peer.start(Identity.load_or_create(tmp_path / f"{n}.key"), (), PeerSettings()) for n in range(3)]
    lead, there, stranger = peers
    server = ChainServer(
        there, second.compute, second.model, second.ledger, NoAdapters(), Hosted(second.stage), lambda _: None
    )
    await server.start()
    hops = [Hop(lead.peer_id, Span(0, 2), lead.addrs), Hop(there.peer_id, Span(2, BLOCKS), there.addrs)]
    request = chain_pb2.Open(
        hello=hello(second.checkpoint.model_hash, ("push", "step-frames")),
        session_id=uuid.uuid4().hex,
        mode=chain_pb2.MODE_TRAIN,
        hops=[hop_to_proto(hop) for hop in hops],
        index=1,
        activation_encoding="int8",
        job_id="tiny",
    )
    for caller, index in ((stranger, 1), (stranger, 0), (lead, 1)):
        request.index = index
        stream = await caller.dial(there.peer_id, there.addrs, PROTOCOL, chain_pb2.Frame)
        await stream.send(chain_pb2.Frame(open=request))
        if caller is lead:
            await expect_opened(stream)
        else:
            with pytest.raises(SessionError):
                await expect_opened(stream)
        stream.close()
    for peer in peers:
        await peer.stop()
    second.compute.stop()


class Assigned:
    """A worker's part in a stage session: what the node is assigned now."""

    def __init__(self) -> None:
        self.now: pb.Assignment | None = None
        self.settled: list[Work] = []

    def stands(self, assignment: pb.Assignment) -> bool:
        return self.now == assignment

    async def next_assignment(self, old: pb.Assignment, begin: chain_pb2.BeginRound) -> pb.Assignment:
        raise AssertionError("nothing is carried here")

    def settle_later(self, member: JobMember, work: Work, ended: Ended) -> None:
        self.settled.append(work)


async def test_a_chain_of_an_earlier_forming_moves_nothing(tiny: Path, tmp_path: Path) -> None:
    """Its lead was stopped for a while, and its streams live."""
    async with node_with_coordinator(tiny, tmp_path) as node:
        job_id = await node.submit(job())
        first = await node.assigned(job_id, 1)
        worker = Assigned()
        worker.now = first
        member = await node.members.get(first)
        old = StageSession(worker, member, first)
        await old.begin_round(chain_pb2.BeginRound(round=1))
        batch, head = batch_of([9, 9], seed=1), Head(node.model.checkpoint, torch.float32, CPU)
        hidden = head.embed(batch.input_ids_BT).detach()
        old.train_forward(0, hidden)
        why = common_pb2.Error(code="SW303", cause="the lead was lost")
        request = pb.AbandonRequest(
            job_id=job_id, round=1, generation=first.generation, pipeline_id=first.pipeline_id, reason=why
        )
        await node.link.call(lambda client: client.abandon(request))
        second = (await node.poll()).assignment
        while second.generation <= first.generation:
            second = (await node.poll()).assignment
        worker.now = second
        new = StageSession(worker, await node.members.get(second), second)
        await new.begin_round(chain_pb2.BeginRound(round=1))
        before = member.stage.values()
        frames: list[Callable[[], object]] = [
            lambda: old.train_forward(1, hidden),
            lambda: old.train_backward(0, hidden),
            lambda: old.drop(0),
            lambda: old.step(1e-2, 1.0),
            old.skip,
        ]
        for frame in frames:
            with pytest.raises(SessionError, match="formed anew"):
                frame()
        with pytest.raises(SessionError, match="formed anew"):
            await old.begin_round(chain_pb2.BeginRound(round=1))
        with pytest.raises(SessionError, match="formed anew"):
            await old.end_round(chain_pb2.EndRound(round=1, inner_steps=2, tokens=36, lease_id=1))
        assert all((member.stage.values()[key] == value).all() for key, value in before.items())
        assert not worker.settled
        new.train_forward(0, hidden)
