"""The lead's inner loop: samples in, loss at the head, gradients back through the pipeline.

One call trains one round: H inner steps over the lease's samples, then the stages are told to contribute.
The lead holds embedding, final norm and LM head, runs its own blocks locally and the others' over
its chain; `node.step` drives a step through them. A step whose loss or gradient is not finite changes
nothing, and is counted; a round without any other step is not contributed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import structlog

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

    async def train_round(self, assignment: pb.Assignment, lease: pb.LeaseReply, chain: Chain | None) -> Work:
        """H inner steps of the lease's samples, fewer if asked to wrap up.

        Raises PeerLost, whatever a stage reports, and ContributionError if every step was skipped.
        """
        schedule, inner = self._spec.schedule, self._spec.inner
        ranges = [(r.start, r.end) for r in lease.ranges]
        driver = StepDriver(self._head, self._stage, self._compute, chain)
        tokens, label_tokens, losses, skipped = 0, 0, list[float](), 0
        for step in range(schedule.inner_steps):
            if step and self._progress.wrap_up:
                log.info("wrapping_up", job=assignment.job_name, round=assignment.round, steps=step)
                break
            began = time.monotonic()
            batch = self._batch(ranges, step, len(assignment.hops))
            at = global_step(assignment.round, schedule.inner_steps, step)
            lr = learning_rate(inner, at, schedule.rounds * schedule.inner_steps)
            result = await driver.step(self._parts(batch, len(assignment.hops)), lr, inner.clip)
            elapsed_s = time.monotonic() - began
            if result.taken:
                tokens += batch.tokens
                label_tokens += batch.label_tokens
                losses.append(result.loss)
                self._progress.loss = result.loss
            else:
                skipped += 1
            self._progress.round, self._progress.inner_step = assignment.round, step + 1
            self._progress.skipped_steps, self._progress.tokens_per_s = skipped, batch.tokens / elapsed_s
            log.log(
                logging.INFO if result.taken else logging.WARNING,
                "inner_step" if result.taken else "inner_step_skipped",
                job=assignment.job_name,
                round=assignment.round,
                step=f"{step + 1}/{schedule.inner_steps}",
                loss=round(result.loss, 4),
                norm=round(result.norm, 4),
                skipped_steps=skipped,
                tokens=batch.tokens,
                took_s=round(elapsed_s, 3),
                tokens_per_s=round(batch.tokens / elapsed_s),
            )
        if self._cut_tokens:
            log.warning("prompts_cut", job=assignment.job_name, tokens=self._cut_tokens, max_length=schedule.max_length)
            self._cut_tokens = 0
        if not losses:
            raise ContributionError(
                f"all {skipped} inner steps of round {assignment.round} were skipped: their loss or gradient "
                "was not finite",
                "lower inner.lr, set inner.clip, or look at the data",
            )
        work = Work(
            round=assignment.round,
            generation=assignment.generation,
            pipeline_id=assignment.pipeline_id,
            inner_steps=len(losses) + skipped,
            tokens=tokens,
            lease_id=lease.lease_id,
            loss=sum(losses) / len(losses),
            skipped_steps=skipped,
            label_tokens=label_tokens,
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

    def _batch(self, ranges: list[tuple[int, int]], step: int, nodes: int) -> Batch:
        schedule = self._spec.schedule
        samples = []
        for position in batch_positions(ranges, step, schedule.samples_per_step):
            sample = self._dataset.encode(sample_index(position, len(self._dataset), schedule.seed))
            self._cut_tokens += sample.cut_tokens
            samples.append(sample)
        pad_id = self._tokenizer.pad_token_id or 0
        if self._spec.data.packing:
            return collate_packed(samples, pad_id, self._count_parts(nodes), schedule.max_length)
        return collate(samples, pad_id)

    def _parts(self, batch: Batch, nodes: int) -> tuple[Microbatch, ...]:
        return split_batch(batch, self._count_parts(nodes))

    def _count_parts(self, nodes: int) -> int:
        return microbatches(self._spec.schedule, nodes) * self._spec.schedule.accumulate

    def heldout_batches(self, dataset: Samples) -> Iterator[Batch]:
        """The job's evaluation samples, the same ones every time. Raises DatasetError, UnsupportedModel."""
        schedule, settings = self._spec.schedule, self._spec.eval
        count = min(settings.samples, len(dataset)) if settings is not None else 0
        indices = [sample_index(position, len(dataset), schedule.seed) for position in range(count)]
        for first in range(0, count, schedule.batch_size):
            chosen = indices[first : first + schedule.batch_size]
            samples = [dataset.encode(index) for index in chosen]
            yield collate(samples, self._tokenizer.pad_token_id or 0)


def microbatches(schedule: Schedule, nodes: int) -> int:
    """Into how many parts a pipeline of so many nodes takes one batch."""
    if schedule.microbatches == "auto":
        return auto_microbatches(nodes, schedule.batch_size)
    return schedule.microbatches
