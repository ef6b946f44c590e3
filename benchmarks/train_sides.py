"""The sides of `benchmarks.train_step`: plain PEFT, one node that trains alone, and a pipeline of two.

    python -m benchmarks.train_sides local SETTINGS
    python -m benchmarks.train_sides alone SETTINGS
    python -m benchmarks.train_sides stage SETTINGS SPAN FOLDER
    python -m benchmarks.train_sides lead SETTINGS SPAN FOLDER STAGE

SETTINGS are `Settings` as JSON. Asked for `{"first", "steps", "activations"}`, a side takes so many optimizer
steps, starting with batch `first` of the same film reviews, and answers with their losses, `seconds` and its
peak memory; `activations` is how they cross the pipeline's link. All start from the same adapter values and run
the node's own code but for the coordinator's part: no round, no lease, no contribution. STAGE is the JSON line
that `stage`, the second half of the pipeline, says when ready. All import the same modules before they note
`bare_bytes`, what the interpreter itself takes.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import peft
import psutil
import torch
import uvloop
from safetensors.torch import load as load_safetensors
from transformers import AutoModelForCausalLM

from benchmarks.processes import Json, answer
from benchmarks.reviews import movie_reviews
from node.chains import ChainServer
from node.hop_train import TrainStage
from node.lead import microbatches
from node.measure import training_cost
from node.memory import Ledger, use_one_arena
from node.serving import NodeModel
from node.stage import AdapterStage
from node.step import StepDriver
from swarm.adapters.registry import WEIGHTS_FILE, ModelAdapters
from swarm.compute import Compute, Priority
from swarm.config import DataSettings, JobSpec, Schedule
from swarm.data.batch import Batch, collate
from swarm.data.chat import EncodedSample, encode_sample
from swarm.data.microbatch import split_batch
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

WHOLE = Span(0, 30)
_CPU = torch.device("cpu")
_BUDGET_BYTES = 1 << 40
_REVIEWS_FROM = 40
"""Earlier ones are for other benchmarks."""


@dataclass(frozen=True)
class Settings:
    threads: int
    labels: str
    """all: every token of a review; answers: the one-word answers of chats about sentences."""
    microbatches: int
    """Of the pipeline; 0: as a job's default."""

    def spec(self) -> JobSpec:
        """LoRA r 8 on every linear layer, AdamW, batches of 8: a job's defaults."""
        parts = self.microbatches or "auto"
        schedule = Schedule.model_validate({"batch_size": 8, "microbatches": parts})
        return JobSpec(name="benchmark", data=DataSettings(train=Path("reviews.jsonl")), schedule=schedule)


def batch(tokenizer: Any, settings: Settings, number: int) -> Batch:
    schedule = settings.spec().schedule
    first = number * schedule.batch_size
    if settings.labels == "all":
        texts = movie_reviews(range(_REVIEWS_FROM + first, _REVIEWS_FROM + first + schedule.batch_size))
        rows = [tuple(tokenizer(text)["input_ids"]) for text in texts]
        samples = [EncodedSample(row, row, 0) for row in rows]
    else:
        sentences = islice(movie_sentences("train", first + schedule.batch_size), first, None)
        samples = [encode_sample(tokenizer, review_chat(s.text, s.label), schedule.max_length) for s in sentences]
    return collate(samples, tokenizer.pad_token_id or 0)


async def take_steps(
    request: Json, tokenizer: Any, settings: Settings, step: Callable[[Batch], Awaitable[float]]
) -> Json:
    """The batches are made before the clock starts: a user's data loader makes them meanwhile."""
    first = int(request["first"])
    batches = [batch(tokenizer, settings, number) for number in range(first, first + int(request["steps"]))]
    began = time.perf_counter()
    losses = [await step(b) for b in batches]
    took_s = time.perf_counter() - began
    return {"losses": losses, "seconds": took_s, "tokens": sum(b.tokens for b in batches), "peak_bytes": peak_bytes()}


def peak_bytes() -> int:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---- what a user of PEFT writes ----------------------------------------------------------------


async def local(settings: Settings, bare_bytes: int) -> None:
    spec = settings.spec()
    checkpoint = Checkpoint.open(str(smollm2_folder()))
    tokenizer, adapters = checkpoint.tokenizer(), ModelAdapters(checkpoint)
    base = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=spec.method.r, lora_alpha=spec.method.alpha, target_modules="all-linear"
    )
    model = peft.get_peft_model(base, config)
    start = adapters.export(spec.method, adapters.initial(spec.method, spec.schedule.seed), checkpoint.name)
    peft.set_peft_model_state_dict(model, load_safetensors(start[WEIGHTS_FILE]))
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inner = spec.inner
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

    await answer(lambda request: take_steps(request, tokenizer, settings, step), bare_bytes=bare_bytes)


# ---- what a node runs --------------------------------------------------------------------------


class Node:
    """A span with its job's adapters at their start values, as the worker sets it up."""

    def __init__(self, span: Span, settings: Settings) -> None:
        use_one_arena()
        ledger = Ledger(_BUDGET_BYTES)
        self.settings, self.spec, self.span = settings, settings.spec(), span
        self.checkpoint = Checkpoint.open(str(smollm2_folder()))
        self.tokenizer = self.checkpoint.tokenizer()
        self.model = NodeModel(self.checkpoint, span, torch.float32, _CPU, ledger)
        self.stage = AdapterStage(self.model, span, self.spec, ledger, "benchmark")
        self.stage.reset(self.model.adapters.initial_span(self.spec.method, self.spec.schedule.seed, span))
        self.ledger = ledger
        self.compute = Compute()

    async def lead(self, chain_at: Callable[[str], Awaitable[Chain | None]], head: Head, **ready: object) -> None:
        """Answer with the lead's optimizer steps over `chain_at(activations)`."""

        async def run(request: Json) -> Json:
            chain = await chain_at(str(request["activations"]))
            driver = StepDriver(head, self.stage, self.compute, chain)
            schedule, nodes = self.spec.schedule, 1 if chain is None else 2
            most = 0

            async def step(b: Batch) -> float:
                nonlocal most
                parts = split_batch(b, microbatches(schedule, nodes, b.lengths, head.device))
                most = max(most, len(parts))
                return (await driver.step(parts, self.spec.inner.lr)).loss

            taken = await take_steps(request, self.tokenizer, self.settings, step)
            return {"microbatches": most, **taken}

        await answer(run, **ready)
        self.compute.stop()

    def head(self) -> Head:
        return Head(self.checkpoint, torch.float32, _CPU)


async def alone(settings: Settings, bare_bytes: int) -> None:
    """Says when ready what a block and the head take, for a quarter of a batch."""

    async def no_chain(_: str) -> None:
        pass

    node = Node(WHOLE, settings)
    head = node.head()
    ids_BT = batch(node.tokenizer, settings, 0).input_ids_BT[:2]
    block_s, head_s = await node.compute.run(Priority.TRAIN, training_cost, node.stage, head, ids_BT)
    await node.lead(no_chain, head, bare_bytes=bare_bytes, block_s=block_s, head_s=head_s)


@asynccontextmanager
async def peer_of(folder: Path, name: str) -> AsyncIterator[Peer]:
    peer = await Peer.start(Identity.load_or_create(folder / f"{name}.key"), (), PeerSettings())
    try:
        yield peer
    finally:
        await peer.stop()


async def lead(settings: Settings, bare_bytes: int, span: Span, folder: Path, stage: Json) -> None:
    async with peer_of(folder, "lead") as peer:
        node = Node(span, settings)
        behind = Hop(stage["peer"], Span(span.end, WHOLE.end), tuple(stage["addrs"]))
        chains: dict[str, Chain] = {}

        async def chain_at(activations: str) -> Chain:
            if activations not in chains:
                chains[activations] = await Chain.open(
                    peer,
                    [Hop(peer.peer_id, span, peer.addrs), behind],
                    pb.MODE_TRAIN,
                    node.checkpoint.model_hash,
                    first=1,
                    training=TrainingBinding("benchmark", 0, 0),
                    encoding=activations,
                    timeout_s=300.0,
                )
            return chains[activations]

        await node.lead(chain_at, node.head(), bare_bytes=bare_bytes)
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
        self.fits = stage.fits
        self.admit = stage.admit
        self.give_back = stage.give_back
        self.drop = stage.drop
        self.squared_norm = stage.squared_norm
        self.step = stage.step
        self.skip = stage.skip
        self.admit_score, self.score = stage.admit_score, stage.score

    def train_forward(
        self, seq: int, hidden_BTD: torch.Tensor, positions_BT: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._stage.forward(seq, hidden_BTD, positions_BT, input_grad=True)

    def train_backward(self, seq: int, grad_BTD: torch.Tensor) -> torch.Tensor:
        grad = self._stage.backward(seq, grad_BTD)
        assert grad is not None
        return grad

    async def begin_round(self, message: pb.BeginRound) -> None:
        pass

    async def end_round(self, message: pb.EndRound) -> None:
        pass

    async def close(self) -> None:
        pass


class NoAdapters:
    async def files(self, name: str, wanted: tuple[FileInfo, ...]) -> dict[str, bytes]:
        raise AdapterNotFound(f"the benchmark serves no adapter '{name}'")


async def stage(settings: Settings, bare_bytes: int, span: Span, folder: Path) -> None:
    async with peer_of(folder, "stage") as peer:
        node = Node(span, settings)
        gate = Gate(node.stage)
        server = ChainServer(peer, node.compute, node.model, node.ledger, NoAdapters(), gate, lambda _: None)
        await server.start()

        async def memory(_: Json) -> Json:
            return {"peak_bytes": peak_bytes()}

        await answer(memory, peer=peer.peer_id, addrs=peer.addrs, bare_bytes=bare_bytes)
        node.compute.stop()


def main() -> None:
    bare_bytes = int(psutil.Process().memory_info().rss)
    side, text, *rest = sys.argv[1:]
    configure("info", role=side)  # stdout belongs to the answers
    settings = Settings(**json.loads(text))
    torch.set_num_threads(settings.threads)
    if side == "local":
        asyncio.run(local(settings, bare_bytes))
    elif side == "alone":
        uvloop.run(alone(settings, bare_bytes))
    elif side == "lead":
        uvloop.run(lead(settings, bare_bytes, Span.parse(rest[0]), Path(rest[1]), json.loads(rest[2])))
    else:
        uvloop.run(stage(settings, bare_bytes, Span.parse(rest[0]), Path(rest[1])))


if __name__ == "__main__":
    main()
