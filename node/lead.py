"""The lead's inner loop: samples in, loss at the head, gradients back through the pipeline.

One call trains one round: H inner steps over the lease's samples, then the stages are told to contribute.
With rounds that overlap, another call does the next round's first steps while this one is closed.
The lead holds embedding, final norm and LM head, runs its own blocks locally and the others' over
its chain; `node.step` drives a step through them. A step whose loss or gradient is not finite changes
nothing, and is counted; a round without any other step is not contributed.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog
import torch

from node.batches import OneAhead
from node.member import Work
from node.stage import AdapterStage
from node.step import StepDriver
from node.turns import auto_microbatches
from swarm.compute import Compute
from swarm.config import JobSpec, Schedule
from swarm.data.batch import Batch, batch_positions, collate
from swarm.data.microbatch import Microbatch, split_batch
from swarm.data.order import sample_index
from swarm.data.packing import collate_packed
from swarm.data.sources import Samples
from swarm.errors import ContributionError
from swarm.model.shard import Head
from swarm.net.chain import Chain
from swarm.optim.schedule import global_step, learning_rate
from swarm.wire.v1 import chain_pb2
from swarm.wire.v1 import coordinator_pb2 as pb

log = structlog.get_logger()


@dataclass
class Progress:
    """Where the lead is; read by the poll loop."""

    round: int = 0
    inner_step: int = 0
    loss: float = 0.0
    tokens_per_s: float = 0.0
    skipped_steps: int = 0
    """Of this round: their loss or gradient was not finite."""
    wrap_up: bool = False
    """The coordinator asks for what there is; written by the poll loop."""


@dataclass
class Tally:
    """What a round's inner steps came to so far."""

    tokens: int = 0
    label_tokens: int = 0
    losses: list[float] = field(default_factory=list)
    """Of the steps that were taken."""
    skipped: int = 0

    @property
    def steps(self) -> int:
        return len(self.losses) + self.skipped


@dataclass(frozen=True)
class _Made:
    """What an inner step is taken with."""

    batch: Batch
    parts: tuple[Microbatch, ...]
    cut_tokens: int
    """Left out of prompts that are too long."""


class LeadLoop:
    """Trains rounds of one job on one pipeline."""

    def __init__(
        self,
        spec: JobSpec,
        dataset: Samples,
        tokenizer: Any,
        head: Head,
        stage: AdapterStage,
        compute: Compute,
        progress: Progress,
    ) -> None:
        self._spec = spec
        self._dataset = dataset
        self._tokenizer = tokenizer
        self._head = head
        self._stage = stage
        self._compute = compute
        self._progress = progress
        self._cut_tokens = 0

    async def train_round(
        self, assignment: pb.Assignment, lease: pb.LeaseReply, chain: Chain | None, done: Tally | None = None
    ) -> Work:
        """H inner steps of the lease's samples, fewer if asked to wrap up. `done`: those that were done ahead.

        Raises PeerLost, whatever a stage reports, and ContributionError if every step was skipped.
        """
        schedule, tally = self._spec.schedule, done or Tally()
        driver = StepDriver(self._head, self._stage, self._compute, chain)
        async with self._batches(assignment, lease, schedule.inner_steps) as batches:
            while tally.steps < schedule.inner_steps:
                if tally.steps and self._progress.wrap_up:
                    log.info("wrapping_up", job=assignment.job_name, round=assignment.round, steps=tally.steps)
                    break
                await self._step(driver, assignment, assignment.round, batches, tally)
        if self._cut_tokens:
            log.warning("prompts_cut", job=assignment.job_name, tokens=self._cut_tokens, max_length=schedule.max_length)
            self._cut_tokens = 0
        if not tally.losses:
            raise ContributionError(
                f"all {tally.skipped} inner steps of round {assignment.round} were skipped: their loss or gradient "
                "was not finite",
                "lower inner.lr, set inner.clip, or look at the data",
            )
        work = Work(
            round=assignment.round,
            generation=assignment.generation,
            pipeline_id=assignment.pipeline_id,
            inner_steps=tally.steps,
            tokens=tally.tokens,
            lease_id=lease.lease_id,
            loss=sum(tally.losses) / len(tally.losses),
            skipped_steps=tally.skipped,
            label_tokens=tally.label_tokens,
        )
        if chain is not None:
            await chain.end_round(
                chain_pb2.EndRound(
                    round=work.round,
                    inner_steps=work.inner_steps,
                    tokens=work.tokens,
                    lease_id=work.lease_id,
                    skipped_steps=work.skipped_steps,
                )
            )
        return work

    async def train_ahead(self, assignment: pb.Assignment, ahead: pb.LeaseReply, chain: Chain | None) -> Tally:
        """The first inner steps of the round after `assignment`'s, as many as overlap.

        Raises PeerLost, and whatever a stage reports.
        """
        driver, tally = StepDriver(self._head, self._stage, self._compute, chain), Tally()
        steps = self._spec.schedule.overlap_steps
        async with self._batches(assignment, ahead, steps) as batches:
            while tally.steps < steps:
                await self._step(driver, assignment, assignment.round + 1, batches, tally)
        return tally

    async def _step(
        self, driver: StepDriver, assignment: pb.Assignment, number: int, batches: OneAhead[_Made], tally: Tally
    ) -> None:
        """The next inner step of round `number`."""
        schedule, inner, step = self._spec.schedule, self._spec.inner, tally.steps
        began = time.monotonic()
        made = await batches.take(step)
        batch = made.batch
        self._cut_tokens += made.cut_tokens
        at = global_step(number, schedule.inner_steps, step)
        lr = learning_rate(inner, at, schedule.rounds * schedule.inner_steps)
        result = await driver.step(made.parts, lr, inner.clip)
        elapsed_s = time.monotonic() - began
        if result.taken:
            tally.tokens += batch.tokens
            tally.label_tokens += batch.label_tokens
            tally.losses.append(result.loss)
            self._progress.loss = result.loss
        else:
            tally.skipped += 1
        self._progress.round, self._progress.inner_step = number, tally.steps
        self._progress.skipped_steps, self._progress.tokens_per_s = tally.skipped, batch.tokens / elapsed_s
        log.log(
            logging.INFO if result.taken else logging.WARNING,
            "inner_step" if result.taken else "inner_step_skipped",
            job=assignment.job_name,
            round=number,
            step=f"{tally.steps}/{schedule.inner_steps}",
            loss=round(result.loss, 4),
            norm=round(result.norm, 4),
            skipped_steps=tally.skipped,
            tokens_per_s=round(batch.tokens / elapsed_s),
            tokens=batch.tokens,
            took_s=round(elapsed_s, 4),
        )

    def _batches(self, assignment: pb.Assignment, lease: pb.LeaseReply, steps: int) -> OneAhead[_Made]:
        """Of the lease's inner steps, each tokenized while the one before is computed."""
        ranges = [(r.start, r.end) for r in lease.ranges]
        return OneAhead(lambda step: self._make(ranges, step, len(assignment.hops)), steps)

    def _make(self, ranges: list[tuple[int, int]], step: int, nodes: int) -> _Made:
        """On a thread. Raises DatasetError, UnsupportedModel."""
        schedule = self._spec.schedule
        positions = batch_positions(ranges, step, schedule.samples_per_step)
        indices = [sample_index(position, len(self._dataset), schedule.seed) for position in positions]
        samples = [self._dataset.encode(index) for index in indices]
        lengths = [len(sample.input_ids) for sample in samples]
        parts = microbatches(schedule, nodes, lengths, self._head.device)
        pad_id = self._tokenizer.pad_token_id or 0
        if self._spec.data.packing:
            batch = collate_packed(samples, pad_id, parts, schedule.max_length)
        else:
            batch = collate(samples, pad_id)
        return _Made(batch, split_batch(batch, parts), sum(sample.cut_tokens for sample in samples))

    def heldout_batches(self, dataset: Samples, nodes: int) -> Iterator[Batch]:
        """The job's evaluation samples, the same ones every time, in parts as small as a step's microbatches.

        Raises DatasetError, UnsupportedModel."""
        schedule, settings = self._spec.schedule, self._spec.eval
        count = min(settings.samples, len(dataset)) if settings is not None else 0
        indices = [sample_index(position, len(dataset), schedule.seed) for position in range(count)]
        for first in range(0, count, schedule.batch_size):
            chosen = indices[first : first + schedule.batch_size]
            samples = [dataset.encode(index) for index in chosen]
            batch = collate(samples, self._tokenizer.pad_token_id or 0)
            parts = microbatches(schedule, nodes, batch.lengths, self._head.device)
            yield from (part.batch for part in split_batch(batch, parts))


def microbatches(schedule: Schedule, nodes: int, lengths: Sequence[int], device: torch.device) -> int:
    """Into how many parts a pipeline of so many nodes takes one optimizer step's samples of these lengths."""
    batches = math.ceil(len(lengths) / schedule.batch_size)
    if schedule.microbatches != "auto":
        return schedule.microbatches * batches
    return auto_microbatches(nodes, len(lengths) // batches, sum(lengths) // batches, device.type) * batches
