"""The sides of `benchmarks.train_step`: plain PEFT, one node that trains alone, and a pipeline of two.

    python -m benchmarks.train_sides local THREADS
    python -m benchmarks.train_sides alone THREADS
    python -m benchmarks.train_sides lead THREADS FOLDER STAGE
    python -m benchmarks.train_sides stage THREADS FOLDER

Asked for `{"first", "steps", "activations"}`, a side takes so many optimizer steps, starting with batch
`first` of the same film reviews, and answers with their losses and `seconds`; `activations` is how they
cross the pipeline's link. All start from the same adapter values and run the node's own code but for
the coordinator's part: no round, no lease, no contribution. STAGE is the JSON line that `stage`, the
second half of the pipeline, says when ready.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import uvloop
from safetensors.torch import load as load_safetensors

from benchmarks.processes import Json, answer
from node.chains import ChainServer
from node.hop_train import TrainStage
from node.lead import LeadLoop, Progress
from node.memory import Ledger
from node.serving import NodeModel
from node.stage import AdapterStage
from swarm.adapters.registry import WEIGHTS_FILE, ModelAdapters
from swarm.compute import Compute
from swarm.config import DataSettings, JobSpec, Schedule
from swarm.data.batch import Batch, collate
from swarm.data.chat import encode_sample
from swarm.data.dataset import ChatDataset
from swarm.data.sources import ChatSamples
from swarm.errors import AdapterNotFound
from swarm.identity import Identity
from swarm.ids import Span
from swarm.logs import configure
from swarm.model.checkpoint import Checkpoint
from swarm.model.shard import Head
from swarm.net.chain import Chain, TrainingBinding
from swarm.net.p2p import Peer, PeerSettings
from swarm.net.view import FileInfo, Hop
from swarm.samples import movie_sentences, review_chat, smollm2_folder
from swarm.wire.v1 import chain_pb2 as pb

SPEC = JobSpec(name="benchmark", data=DataSettings(train=Path("reviews.jsonl")), schedule=Schedule(batch_size=8))
"""LoRA r 8 on every linear layer, AdamW: a job's defaults."""
LEAD, STAGE = Span(0, 15), Span(15, 30)
WHOLE = Span(0, 30)
_CPU = torch.device("cpu")
_BUDGET_BYTES = 1 << 40


def batch(tokenizer: Any, number: int) -> Batch:
    size = SPEC.schedule.batch_size
    sentences = islice(movie_sentences("train", (number + 1) * size), number * size, None)
    samples = [encode_sample(tokenizer, review_chat(s.text, s.label), SPEC.schedule.max_length) for s in sentences]
    return collate(samples, tokenizer.pad_token_id or 0)


async def take_steps(request: Json, tokenizer: Any, step: Callable[[Batch], Awaitable[float]]) -> Json:
    """The batches are made before the clock starts: a user's data loader makes them meanwhile."""
    first = int(request["first"])
    batches = [batch(tokenizer, number) for number in range(first, first + int(request["steps"]))]
    began = time.perf_counter()
    losses = [await step(b) for b in batches]
    return {"losses": losses, "seconds": time.perf_counter() - began, "tokens": sum(b.tokens for b in batches)}


# ---- what a user of PEFT writes ----------------------------------------------------------------


async def local() -> None:
    import peft
    from transformers import AutoModelForCausalLM

    checkpoint = Checkpoint.open(str(smollm2_folder()))
    tokenizer, adapters = checkpoint.tokenizer(), ModelAdapters(checkpoint)
    base = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=SPEC.method.r, lora_alpha=SPEC.method.alpha, target_modules="all-linear"
    )
    model = peft.get_peft_model(base, config)
    start = adapters.export(SPEC.method, adapters.initial(SPEC.method, SPEC.schedule.seed), checkpoint.name)
    peft.set_peft_model_state_dict(model, load_safetensors(start[WEIGHTS_FILE]))
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inner = SPEC.inner
    optimizer = torch.optim.AdamW(
        trained, lr=inner.lr, betas=inner.betas, eps=inner.eps, weight_decay=inner.weight_decay
    )

    async def step(b: Batch) -> float:
        lengths_B1 = torch.tensor(b.lengths).unsqueeze(1)
        mask_BT = (torch.arange(b.input_ids_BT.shape[1]) < lengths_B1).long()
        output = model(input_ids=b.input_ids_BT, attention_mask=mask_BT, labels=b.labels_BT)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(output.loss)

    await answer(lambda request: take_steps(request, tokenizer, step))


# ---- what a node runs --------------------------------------------------------------------------


class Node:
    """A span with its job's adapters at their start values, as the worker sets it up."""

    def __init__(self, span: Span) -> None:
        ledger = Ledger(_BUDGET_BYTES)
        self.checkpoint = Checkpoint.open(str(smollm2_folder()))
        self.tokenizer = self.checkpoint.tokenizer()
        self.model = NodeModel(self.checkpoint, span, torch.float32, _CPU, ledger)
        self.stage = AdapterStage(self.model, span, SPEC, ledger, "benchmark")
        self.stage.reset(self.model.adapters.initial_span(SPEC.method, SPEC.schedule.seed, span))
        self.ledger = ledger
        self.compute = Compute()

    async def lead(self, chain_at: Callable[[str], Awaitable[Chain | None]]) -> None:
        """Answer with the lead's inner steps over `chain_at(activations)`."""
        head = Head(self.checkpoint, torch.float32, _CPU)
        # Batches are handed to the loop one by one.
        no_data = ChatSamples(ChatDataset((), b"", "the benchmark"), self.tokenizer, SPEC.schedule.max_length)
        loop = LeadLoop(SPEC, no_data, self.tokenizer, head, self.stage, self.compute, Progress())

        async def run(request: Json) -> Json:
            chain = await chain_at(str(request["activations"]))
            return await take_steps(request, self.tokenizer, lambda b: loop.inner_step(b, chain, SPEC.inner.lr))

        await answer(run)
        self.compute.stop()


async def alone() -> None:
    async def no_chain(_: str) -> None:
        pass

    await Node(WHOLE).lead(no_chain)


@asynccontextmanager
async def peer_of(folder: Path, name: str) -> AsyncIterator[Peer]:
    peer = await Peer.start(Identity.load_or_create(folder / f"{name}.key"), (), PeerSettings())
    try:
        yield peer
    finally:
        await peer.stop()


async def lead(folder: Path, stage: Json) -> None:
    async with peer_of(folder, "lead") as peer:
        node = Node(LEAD)
        chains: dict[str, Chain] = {}

        async def chain_at(activations: str) -> Chain:
            if activations not in chains:
                chains[activations] = await Chain.open(
                    peer,
                    [Hop(peer.peer_id, LEAD, peer.addrs), Hop(stage["peer"], STAGE, tuple(stage["addrs"]))],
                    pb.MODE_TRAIN,
                    node.checkpoint.model_hash,
                    first=1,
                    training=TrainingBinding("benchmark", 0, 0),
                    encoding=activations,
                )
            return chains[activations]

        await node.lead(chain_at)
        for chain in chains.values():
            await chain.close()


class Gate:
    """Admits the benchmark's chain, where a worker would ask the coordinator's assignment."""

    def __init__(self, stage: AdapterStage) -> None:
        self._stage = stage

    async def accept(self, caller: str, request: pb.Open) -> TrainStage:
        return Stage(self._stage)


class Stage:
    """The part of a worker's stage session that computes."""

    def __init__(self, stage: AdapterStage) -> None:
        self._stage = stage
        self.admit = stage.admit
        self.step = stage.step

    def train_forward(self, seq: int, hidden_BTD: torch.Tensor) -> torch.Tensor:
        return self._stage.forward(seq, hidden_BTD, input_grad=True)

    def train_backward(self, seq: int, grad_BTD: torch.Tensor) -> torch.Tensor:
        grad = self._stage.backward(seq, grad_BTD)
        assert grad is not None
        return grad

    async def begin_round(self, round: int) -> None:
        pass

    def end_round(self, message: pb.EndRound) -> None:
        pass

    def close(self) -> None:
        pass


class NoAdapters:
    async def files(self, name: str, wanted: tuple[FileInfo, ...]) -> dict[str, bytes]:
        raise AdapterNotFound(f"the benchmark serves no adapter '{name}'")


async def stage(folder: Path) -> None:
    async with peer_of(folder, "stage") as peer:
        node = Node(STAGE)
        gate = Gate(node.stage)
        server = ChainServer(peer, node.compute, node.model, node.ledger, NoAdapters(), gate, lambda _: None)
        await server.start()

        async def nothing(_: Json) -> Json:
            return {}

        await answer(nothing, peer=peer.peer_id, addrs=peer.addrs)
        node.compute.stop()


def main() -> None:
    side, threads, *rest = sys.argv[1:]
    configure("info", role=side)  # stdout belongs to the answers
    torch.set_num_threads(int(threads))
    if side == "local":
        asyncio.run(local())
    elif side == "alone":
        uvloop.run(alone())
    elif side == "lead":
        uvloop.run(lead(Path(rest[0]), json.loads(rest[1])))
    else:
        uvloop.run(stage(Path(rest[0])))


if __name__ == "__main__":
    main()
