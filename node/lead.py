"""The lead's inner loop: samples in, loss at the head, gradients back through the pipeline.

One call trains one round: lease the samples, take H inner steps, tell the stages to contribute. The
lead holds embedding, final norm and LM head, runs its own blocks locally and the others' over
its chain. Only the positions that carry a label go through the LM head.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import structlog
import torch
from torch.nn import functional

from node.member import Work
from node.stage import AdapterStage
from swarm.compute import Compute, Priority
from swarm.config import JobSpec
from swarm.data.batch import Batch, batch_positions, collate
from swarm.data.order import sample_index
from swarm.data.sources import Samples
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
        """H inner steps of the lease's samples, fewer if asked to wrap up. Raises PeerLost and what a stage reports."""
        schedule = self._spec.schedule
        ranges = [(r.start, r.end) for r in lease.ranges]
        tokens, label_tokens, steps, loss_sum = 0, 0, 0, 0.0
        for step in range(schedule.inner_steps):
            if step and self._progress.wrap_up:
                log.info("wrapping_up", job=assignment.job_name, round=assignment.round, steps=step)
                break
            began = time.monotonic()
            batch = self._batch(ranges, step)
            at = global_step(assignment.round, schedule.inner_steps, step)
            lr = learning_rate(self._spec.inner, at, schedule.rounds * schedule.inner_steps)
            loss = await self.inner_step(batch, chain, lr)
            steps += 1
            tokens += batch.tokens
            label_tokens += batch.label_tokens
            loss_sum += loss
            elapsed_s = time.monotonic() - began
            self._progress.round, self._progress.inner_step = assignment.round, step + 1
            self._progress.loss, self._progress.tokens_per_s = loss, batch.tokens / elapsed_s
            log.info(
                "inner_step",
                job=assignment.job_name,
                round=assignment.round,
                step=f"{step + 1}/{schedule.inner_steps}",
                loss=round(loss, 4),
                tokens_per_s=round(batch.tokens / elapsed_s),
            )
        if self._cut_tokens:
            log.warning("prompts_cut", job=assignment.job_name, tokens=self._cut_tokens, max_length=schedule.max_length)
            self._cut_tokens = 0
        work = Work(
            round=assignment.round,
            generation=assignment.generation,
            pipeline_id=assignment.pipeline_id,
            inner_steps=steps,
            tokens=tokens,
            lease_id=lease.lease_id,
            loss=loss_sum / steps,
            label_tokens=label_tokens,
        )
        if chain is not None:
            await chain.end_round(
                chain_pb2.EndRound(
                    round=work.round, inner_steps=work.inner_steps, tokens=work.tokens, lease_id=work.lease_id
                )
            )
        return work

    def _batch(self, ranges: list[tuple[int, int]], step: int) -> Batch:
        schedule = self._spec.schedule
        samples = []
        for position in batch_positions(ranges, step, schedule.batch_size):
            sample = self._dataset.encode(sample_index(position, len(self._dataset), schedule.seed))
            self._cut_tokens += sample.cut_tokens
            samples.append(sample)
        return collate(samples, self._tokenizer.pad_token_id or 0)

    def heldout_batches(self, dataset: Samples) -> Iterator[Batch]:
        """The job's evaluation samples, the same ones every time. Raises DatasetError, UnsupportedModel."""
        schedule, settings = self._spec.schedule, self._spec.eval
        count = min(settings.samples, len(dataset)) if settings is not None else 0
        indices = [sample_index(position, len(dataset), schedule.seed) for position in range(count)]
        for first in range(0, count, schedule.batch_size):
            chosen = indices[first : first + schedule.batch_size]
            samples = [dataset.encode(index) for index in chosen]
            yield collate(samples, self._tokenizer.pad_token_id or 0)

    async def inner_step(self, batch: Batch, chain: Chain | None, lr: float) -> float:
        """Forward, loss, backward and one optimizer step of every stage; returns the batch's loss."""
        run, stage, head = self._compute.run, self._stage, self._head
        hidden = await run(Priority.TRAIN, lambda: head.embed(batch.input_ids_BT).detach())
        stage.admit(tuple(hidden.shape), 0)
        output = await run(Priority.TRAIN, lambda: stage.forward(0, hidden, input_grad=False))
        seq = 0
        if chain is not None:
            seq, output = await chain.forward(output)
        loss, grad = await run(Priority.TRAIN, label_loss, head, output, batch.labels_BT)
        if chain is not None:
            grad = await chain.backward(seq, grad, step=True, lr=lr)

        def finish() -> None:
            stage.backward(0, grad)
            stage.step(lr)

        await run(Priority.TRAIN, finish)
        return loss


def label_loss(head: Head, hidden_BTD: torch.Tensor, labels_BT: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Mean cross-entropy over labelled positions and its gradient [B, T, D].

    The next-token shift and the mean over the batch's labelled tokens are those of `transformers`'
    causal-LM loss; unlabelled positions are left out before the LM head instead of after it.
    """
    with torch.enable_grad():
        hidden = hidden_BTD.detach().requires_grad_(True)
        targets_BT = labels_BT[:, 1:].to(hidden.device)
        counted = targets_BT != -100
        logits_NV = head.logits(hidden[:, :-1][counted])
        loss = functional.cross_entropy(logits_NV.float(), targets_BT[counted])
        torch.autograd.backward(loss)
    assert hidden.grad is not None
    return float(loss.detach()), hidden.grad
