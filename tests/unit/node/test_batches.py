"""Batches come in order from a thread, one ahead; failures surface where they belong, and no thread is left."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest
import torch

from node.batches import OneAhead, on_thread
from node.lead import LeadLoop, Progress
from swarm.data.batch import batch_positions
from swarm.data.order import sample_index
from swarm.data.sources import open_samples
from swarm.errors import DatasetError
from swarm.ids import Span
from swarm.model.shard import Head
from swarm.samples import write_sentiment_jsonl
from swarm.wire.v1 import coordinator_pb2 as pb
from tests.unit.node.pipelines import CPU, Part, spec_of


async def test_the_next_one_is_made_while_this_one_is_used() -> None:
    made: list[int] = []
    second = threading.Event()

    def make(step: int) -> int:
        assert threading.current_thread() is not threading.main_thread()
        made.append(step)
        if step == 2:
            second.set()
        return 10 * step

    async with OneAhead(make, 4) as batches:
        assert await batches.take(1) == 10
        assert await asyncio.to_thread(second.wait, 10)
        assert [await batches.take(step) for step in (2, 3)] == [20, 30]
    assert made == [1, 2, 3], "nothing beyond the last step"


async def test_a_failure_surfaces_in_the_step_that_needs_it() -> None:
    def make(step: int) -> int:
        if step == 1:
            raise DatasetError("line 7 is not a chat")
        return step

    async with OneAhead(make, 3) as batches:
        assert await batches.take(0) == 0
        await asyncio.sleep(0.01)
        with pytest.raises(DatasetError, match="line 7"):
            await batches.take(1)
    async with OneAhead(make, 3) as batches:
        assert await batches.take(0) == 0  # nobody needs the next one: nothing is raised, or logged


async def test_who_is_cancelled_leaves_no_thread_behind() -> None:
    ends, running = threading.Event(), threading.Event()

    def make(step: int) -> int:
        running.set()
        time.sleep(0.05)
        ends.set()
        return step

    async def steps() -> None:
        async with OneAhead(make, 3) as batches:
            await batches.take(0)

    for work in (steps, lambda: on_thread(make, 0)):
        ends.clear()
        running.clear()
        task = asyncio.create_task(work())
        assert await asyncio.to_thread(running.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ends.is_set()


async def test_a_round_tokenizes_beside_the_loop_the_same_batches(smollm2: Path, tmp_path: Path) -> None:
    """In the order of the lease, each once. Held-out samples are split as a step's are."""
    write_sentiment_jsonl(tmp_path / "train.jsonl", "train", 12)
    spec = spec_of(
        schedule={"rounds": 1, "inner_steps": 2, "batch_size": 2, "microbatches": 2, "seed": 3},
        eval={"data": "none.jsonl", "samples": 5},
        activations="float32",
    )
    part = Part(smollm2, Span(0, 1), spec)
    tokenizer = part.checkpoint.tokenizer()
    samples = open_samples((tmp_path / "train.jsonl").read_bytes(), "train", tokenizer, 512)
    asked: list[int] = []

    class Watched:
        def __len__(self) -> int:
            return len(samples)

        def encode(self, index: int) -> object:
            assert threading.current_thread() is not threading.main_thread()
            asked.append(index)
            return samples.encode(index)

    head = Head(part.checkpoint, torch.float32, CPU)
    progress = Progress()
    loop = LeadLoop(spec, Watched(), tokenizer, head, part.stage, part.compute, progress)  # type: ignore[arg-type]
    assignment = pb.Assignment(job_id="j", job_name="j", round=1, hops=[{}])
    lease = pb.LeaseReply(lease_id=1, ranges=[pb.SampleRange(start=4, end=8)])
    work = await loop.train_round(assignment, lease, None)
    by_hand = LeadLoop(spec, samples, tokenizer, head, part.stage, part.compute, progress)
    batches = [by_hand._make([(4, 8)], step, 2) for step in range(2)]
    assert asked == [i for step in range(2) for i in indices(step, len(samples))]
    assert work.tokens == sum(made.batch.tokens for made in batches)
    assert [len(made.parts) for made in batches] == [2, 2]
    parts = list(by_hand.heldout_batches(samples, 1))
    assert sum(len(batch.lengths) for batch in parts) == 5
    assert max(len(batch.lengths) for batch in parts) == 1
    part.compute.stop()


def indices(step: int, count: int) -> list[int]:
    return [sample_index(position, count, 3) for position in batch_positions([(4, 8)], step, 2)]
