"""A pipeline of two nodes in one process: real libp2p between them, a tiny real model on each."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from node.chains import ChainServer
from node.memory import Ledger
from node.serving import NodeModel
from node.stage import AdapterStage
from node.step import StepDriver
from swarm.adapters.registry import Parameters
from swarm.compute import Compute
from swarm.config import JobSpec
from swarm.data.batch import Batch, collate
from swarm.data.chat import EncodedSample
from swarm.errors import AdapterNotFound
from swarm.identity import Identity
from swarm.ids import Span
from swarm.model.checkpoint import Checkpoint
from swarm.model.shard import Head
from swarm.net.chain import Chain, TrainingBinding
from swarm.net.p2p import Peer, PeerSettings
from swarm.net.view import FileInfo, Hop
from swarm.wire.v1 import chain_pb2 as pb

BLOCKS = 4
CPU = torch.device("cpu")


def spec_of(**settings: object) -> JobSpec:
    return JobSpec.model_validate({"name": "tiny", "data": {"train": "none.jsonl"}, **settings})


def batch_of(lengths: list[int], seed: int = 0, vocabulary: int = 64) -> Batch:
    """Rows of random tokens; of each row the second half carries loss."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(1, vocabulary, (length,), generator=generator).tolist()
        rows.append(EncodedSample(tuple(ids), (*[-100] * (length // 2), *ids[length // 2 :]), 0))
    return collate(rows, 0)


class Part:
    """What one node holds: a span, its adapters at values where nothing is zero, a compute thread."""

    def __init__(self, folder: Path, span: Span, spec: JobSpec, budget_bytes: int = 1 << 40) -> None:
        self.ledger = Ledger(1 << 40)
        self.checkpoint = Checkpoint.open(str(folder))
        self.model = NodeModel(self.checkpoint, span, torch.float32, CPU, self.ledger)
        self.stage = AdapterStage(self.model, span, spec, self.ledger, "tiny")
        self.ledger.budget_bytes = min(budget_bytes, self.ledger.budget_bytes)
        self.compute = Compute()
        self.stage.reset(start_values(self, spec, span))

    def gradients(self) -> dict[str, torch.Tensor]:
        return {key: p.grad.clone() for key, p in self.stage.parameters.items() if p.grad is not None}


def start_values(part: Part, spec: JobSpec, span: Span) -> Parameters:
    """Where B is zero A has no gradient: small numbers instead, the same however the model is cut."""
    found = {}
    for key, value in part.model.adapters.initial_span(spec.method, 1, span).items():
        draw = np.random.default_rng(zlib.crc32(key.encode()))
        found[key] = value if value.any() else draw.normal(0, 0.02, value.shape).astype(np.float32)
    return found


class Hosted:
    """The second node's stage, as a worker offers it to a lead's chain; notes the order of what it runs."""

    def __init__(self, stage: AdapterStage) -> None:
        self._stage = stage
        self.passes: list[str] = []
        self.most_held = 0
        self._held = 0
        self.drop, self.squared_norm = stage.drop, stage.squared_norm
        self.fits, self.admit, self.give_back = stage.fits, stage.admit, stage.give_back
        self.step, self.skip = stage.step, stage.skip
        self.admit_score, self.score = stage.admit_score, stage.score

    async def accept(self, caller: str, request: pb.Open) -> Hosted:
        return self

    def train_forward(
        self, seq: int, hidden_BTD: torch.Tensor, positions_BT: torch.Tensor | None = None
    ) -> torch.Tensor:
        self.passes.append(f"F{seq}")
        self._held += 1
        self.most_held = max(self.most_held, self._held)
        return self._stage.forward(seq, hidden_BTD, positions_BT, input_grad=True)

    def train_backward(self, seq: int, grad_BTD: torch.Tensor) -> torch.Tensor:
        self.passes.append(f"B{seq}")
        self._held -= 1
        gradient = self._stage.backward(seq, grad_BTD)
        assert gradient is not None
        return gradient

    async def begin_round(self, message: pb.BeginRound) -> None:
        pass

    async def end_round(self, message: pb.EndRound) -> None:
        pass

    async def close(self) -> None:
        pass


class NoAdapters:
    async def files(self, name: str, wanted: tuple[FileInfo, ...]) -> dict[str, bytes]:
        raise AdapterNotFound(f"no adapter '{name}' here")


@dataclass
class Pipeline:
    lead: Part
    second: Part
    hosted: Hosted
    head: Head
    driver: StepDriver
    chain: Chain

    def gradients(self) -> dict[str, torch.Tensor]:
        return {**self.lead.gradients(), **self.second.gradients()}

    def values(self) -> Parameters:
        return {**self.lead.stage.values(), **self.second.stage.values()}


@asynccontextmanager
async def pipeline_of(
    folder: Path, spec: JobSpec, keys: Path, cut: int = 2, second_budget_bytes: int = 1 << 40
) -> AsyncIterator[Pipeline]:
    front, rest = Span(0, cut), Span(cut, BLOCKS)
    lead, second = Part(folder, front, spec), Part(folder, rest, spec, second_budget_bytes)
    here = await Peer.start(Identity.load_or_create(keys / "lead.key"), (), PeerSettings())
    there = await Peer.start(Identity.load_or_create(keys / "second.key"), (), PeerSettings())
    hosted = Hosted(second.stage)
    server = ChainServer(there, second.compute, second.model, second.ledger, NoAdapters(), hosted, lambda _: None)
    await server.start()
    hops = [Hop(here.peer_id, front, here.addrs), Hop(there.peer_id, rest, there.addrs)]
    chain = await Chain.open(
        here,
        hops,
        pb.MODE_TRAIN,
        lead.checkpoint.model_hash,
        first=1,
        training=TrainingBinding("tiny", 0, 0),
        encoding=spec.activations,
    )
    head = Head(lead.checkpoint, torch.float32, CPU)
    try:
        yield Pipeline(lead, second, hosted, head, StepDriver(head, lead.stage, lead.compute, chain), chain)
    finally:
        await chain.close()
        await here.stop()
        await there.stop()
        lead.compute.stop()
        second.compute.stop()
