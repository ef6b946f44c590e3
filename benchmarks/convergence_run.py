"""One cell of `benchmarks.convergence`: a whole training run of K pipelines in one process.

Each pipeline is the node's own stages, loss and optimizer; contributions go through the codec with error feedback, the
coordinator's own averaging and outer step make the update, and every pipeline starts the next round from its decoded
sum, as nodes do. What is left out is the network: bytes are those of the frames and what `socket_bytes` adds to each.

Data are the beginnings of IMDb reviews (Maas et al., 2011), every position labelled. A cell is a function of its
settings alone: samples follow from (seed, step, pipeline).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.reviews import every_review
from coordinator.aggregate import OuterState, average, outer_round, pipeline_weights
from node.loss import label_loss
from node.memory import Ledger
from node.scoring import summed_loss
from node.serving import NodeModel
from node.stage import AdapterStage
from swarm.adapters.registry import Parameters
from swarm.compress import FrameContext, compress_with_feedback
from swarm.config import CodecSettings, InnerSettings, JobSpec, OuterSettings
from swarm.ids import Span, block_of
from swarm.model.checkpoint import Checkpoint
from swarm.model.shard import Head, n_blocks
from swarm.optim.params import hash_all
from swarm.optim.schedule import learning_rate
from swarm.samples import smollm2_folder
from swarm.wire.tensors import pack, unpack

PIPELINES = 4
ROWS, TOKENS = 4, 64
"""Of an inner step's batch, of one pipeline."""
EVAL_ROWS = 192
EVAL_EVERY = 5
"""Rounds. The last one is always scored."""
WARMUP_STEPS = 5
"""The last of them is at the full rate."""
_CPU = torch.device("cpu")
_SOCKET_SHARE, _SOCKET_BYTES = 1.0025, 1536
_LATE_WEIGHT = 0.5
_OUTER = OuterSettings(lr=1.0, momentum=0.5)
_UPLINK, _DOWNLINK = CodecSettings(), CodecSettings(density=0.125, decay=1.0)
Split = Literal["iid", "by-label"]


@dataclass(frozen=True)
class Cell:
    """Everything that a run's result depends on, besides hardware."""

    name: str
    seed: int = 0
    inner_steps: int = 10
    rounds: int = 10
    lr: float = 1e-3
    decay: Literal["none", "linear", "cosine"] = "none"
    """To zero over the whole run, as `inner.decay`."""
    ddp: bool = False
    """Synchronous data parallelism: gradients of all pipelines averaged at every step."""
    outer: OuterSettings = _OUTER
    uplink: CodecSettings = _UPLINK
    downlink: CodecSettings = _DOWNLINK
    start: Literal["reference", "own"] = "reference"
    """As `inner.start`: own parameters hold what the pipeline could not send yet."""
    activations: str = ""
    """How they cross the middle of a pipeline; empty: it is one node."""
    drop: float = 0.0
    """Share of pipelines that fail, or are late, in every round."""
    dropped: Literal["void", "kept", "merged", "repaired"] = "void"
    """What becomes of their work: nothing; it joins their residual (with `start` own); the next round averages it in at
    half weight; or other nodes take over at half time, from the round's start, and do half of the inner steps."""
    join_round: int = 0
    """The round in which the last pipeline joins; 0: it is there from the beginning."""
    split: Split = "iid"
    overlap: int = 0
    """Inner steps of the next round that are done before this one's update is there."""


@dataclass
class Result:
    losses: list[float] = field(default_factory=list)
    """Held out: before training and after some rounds (of so many steps, for DDP)."""
    uplink_bytes: int = 0
    downlink_bytes: int = 0
    contributions: int = 0
    parameters: int = 0


def socket_bytes(frame_bytes: int) -> int:
    """What one direction of a socket carries when a frame of this size is sent or fetched: at most this.

    Signature, request and receipt, TLS and HTTP/2 are in it: `tests/integration/test_traffic.py` counts them.
    """
    return round(frame_bytes * _SOCKET_SHARE) + _SOCKET_BYTES


class World:
    """The frozen model and the data; shared by all cells of a process."""

    def __init__(self, threads: int, dtype: torch.dtype, device: torch.device = _CPU) -> None:
        torch.set_num_threads(threads)
        self.checkpoint = Checkpoint.open(str(smollm2_folder()))
        self.whole = Span(0, n_blocks(self.checkpoint.config))
        self.model = NodeModel(self.checkpoint, self.whole, dtype, device, Ledger(2**62))
        self.head = Head(self.checkpoint, dtype, device)
        self.train, self.held_out = _reviews()


class Run:
    """One cell, round by round."""

    def __init__(self, world: World, cell: Cell) -> None:
        self._world, self._cell = world, cell
        spec = JobSpec.model_validate({"name": "convergence", "data": {"train": "-"}})
        self._spec = spec.model_copy(update={"outer": cell.outer, "uplink": cell.uplink, "downlink": cell.downlink})
        count = 1 if cell.ddp else PIPELINES
        middle = world.whole.end // 2
        spans = [Span(0, middle), Span(middle, world.whole.end)] if cell.activations else [world.whole]
        self._pipelines = [
            [AdapterStage(world.model, span, self._spec, Ledger(2**62), f"{k}/{span}") for span in spans]
            for k in range(count)
        ]
        start = world.model.adapters.initial(self._spec.method, cell.seed)
        self._state = OuterState(start, {}, {})
        self._residuals: list[Parameters | None] = [None] * count
        self._ahead: dict[int, Parameters] = {}
        """By pipeline: what it has made, since its round ended, of the parameters that it ended with."""
        self._late: dict[str, Parameters] = {}
        """Contributions that the next round will average in."""
        self.result = Result(parameters=sum(value.size for value in start.values()))

    def run(self, tell: Callable[[str], None]) -> Result:
        """All rounds; `tell` hears of each."""
        self._restart(self._pipelines[0])
        self.result.losses.append(self._evaluate())
        for number in range(1, self._cell.rounds + 1):
            if self._cell.ddp:
                self._steps_together(number)
            else:
                self._round(number)
                self._restart(self._pipelines[0])
            if number % EVAL_EVERY == 0 or number == self._cell.rounds:
                self.result.losses.append(self._evaluate())
                tell(f"{self._cell.name}, round {number}: {self.result.losses[-1]:.4f}")
        return self.result

    def _steps_together(self, number: int) -> None:
        (stage,) = self._pipelines[0]
        for step in range(self._cell.inner_steps):
            at = (number - 1) * self._cell.inner_steps + step
            # In one pass: every position is labelled, so the mean over all is the mean of the pipelines' means.
            self._accumulate(self._pipelines[0], torch.cat([self._batch(at, k) for k in range(PIPELINES)]))
            stage.step(self._lr(at), 1.0)

    def _round(self, number: int) -> None:
        cell = self._cell
        chance = np.random.default_rng((cell.seed, number))
        lost = set(chance.permutation(PIPELINES)[: round(cell.drop * PIPELINES)].tolist())
        base_hash, sent = hash_all(self._state.params), self._late
        self._late, steps = {}, {}
        for k in range(PIPELINES):
            if k == PIPELINES - 1 and number < cell.join_round:
                continue
            residual, dropped = self._residuals[k], cell.dropped if k in lost else ""
            done = cell.inner_steps // 2 if dropped == "repaired" else cell.inner_steps
            delta = self.delta(k, number, done)
            if dropped in ("void", "kept"):
                self._ahead.pop(k, None)
                self._residuals[k] = delta if dropped == "kept" else residual
                continue
            context = FrameContext("convergence", number, base_hash)
            # What was kept in the parameters is in the delta already.
            compressed = compress_with_feedback(delta, None if cell.start == "own" else residual, cell.uplink, context)
            self._residuals[k] = compressed.residual
            self.result.uplink_bytes += socket_bytes(len(compressed.frame))
            self.result.contributions += 1
            if dropped == "merged":
                self._late[f"late {k}"] = compressed.decoded
            else:
                sent[f"pipeline {k}"], steps[k] = compressed.decoded, done
        weights = {f"pipeline {k}": weight for k, weight in pipeline_weights(steps).items()}
        weights |= {name: _LATE_WEIGHT for name in sent if name not in weights}
        mean = average(sorted(sent.items()), len(sent), cell.uplink, weights)
        outcome = outer_round(self._state, mean, self._spec, "convergence", number)
        self._state = outcome.state
        # Every pipeline fetches it.
        size = sum(len(block.frame) for block in outcome.blocks)
        self.result.downlink_bytes += PIPELINES * socket_bytes(size)

    def delta(self, k: int, number: int, steps: int) -> Parameters:
        """What `steps` inner steps of round `number` change in pipeline k, before the codec: reference minus now.

        With rounds that overlap, the next one's first steps are done too, and kept for its call.
        """
        cell, stages, ahead = self._cell, self._pipelines[k], self._ahead.pop(k, None)
        self._restart(stages, self._residuals[k] if cell.start == "own" else None, ahead)
        self._train(k, number, 0 if ahead is None else cell.overlap, steps)
        now = _values(stages)
        if cell.overlap and number < cell.rounds:
            self._train(k, number + 1, 0, cell.overlap)
            self._ahead[k] = {key: value - now[key] for key, value in _values(stages).items()}
        return {key: self._state.params[key] - now[key] for key in now}

    def _train(self, k: int, number: int, first: int, end: int) -> None:
        """Inner steps [first, end) of round `number` on pipeline `k`."""
        for step in range(first, end):
            at = (number - 1) * self._cell.inner_steps + step
            self._accumulate(self._pipelines[k], self._batch(at, k))
            for stage in self._pipelines[k]:
                stage.step(self._lr(at), 1.0)

    def _restart(
        self, stages: Sequence[AdapterStage], residual: Parameters | None = None, ahead: Parameters | None = None
    ) -> None:
        """Start from the reference, less what is kept of it, plus what was trained ahead."""
        start = self._state.params
        if residual is not None:
            start = {key: value - residual[key] for key, value in start.items()}
        if ahead is not None:
            start = {key: value + ahead[key] for key, value in start.items()}
        for stage in stages:
            stage.reset({key: v for key, v in start.items() if int(block_of(key)) in stage.span})

    def _accumulate(self, stages: Sequence[AdapterStage], ids_BT: torch.Tensor) -> None:
        """Forward and backward of one batch; gradients add up in the stages."""
        hidden = self._world.head.embed(ids_BT).detach()
        for number, stage in enumerate(stages):
            hidden = self._cross(stage.forward(0, hidden, input_grad=number > 0), number < len(stages) - 1)
        _, gradient = label_loss(self._world.head, hidden, ids_BT)
        for number, stage in reversed(list(enumerate(stages))):
            back = stage.backward(0, gradient)
            if number:
                assert back is not None
                gradient = self._cross(back, True)

    def _cross(self, tensor: torch.Tensor, between: bool) -> torch.Tensor:
        if not (between and self._cell.activations):
            return tensor
        meta, payload = pack(tensor, self._cell.activations)
        return unpack(meta, payload, tensor.dtype, tensor.device)

    def _batch(self, at: int, k: int) -> torch.Tensor:
        pool = np.arange(len(self._world.train.ids))
        if self._cell.split == "by-label":
            pool = pool[self._world.train.labels == k % 2]
        chosen = np.random.default_rng((self._cell.seed, at, k)).choice(pool, ROWS, replace=False)
        return torch.from_numpy(self._world.train.ids[chosen])

    def _lr(self, at: int) -> float:
        inner = InnerSettings(lr=self._cell.lr, warmup_steps=WARMUP_STEPS - 1, decay=self._cell.decay)
        return learning_rate(inner, at, self._cell.rounds * self._cell.inner_steps)

    def _evaluate(self) -> float:
        stages, total = self._pipelines[0], 0.0
        rows = torch.from_numpy(self._world.held_out.ids[:EVAL_ROWS])
        for part in torch.split(rows, ROWS):
            hidden = self._world.head.embed(part).detach()
            for stage in stages:
                hidden = stage.forward(0, hidden, input_grad=False)
                stage.drop(0)
            total += summed_loss(self._world.head, hidden, part)
        return total / (len(rows) * (TOKENS - 1))


def _values(stages: Sequence[AdapterStage]) -> Parameters:
    return {key: value for stage in stages for key, value in stage.values().items()}


@dataclass(frozen=True)
class _Rows:
    ids: NDArray[np.int64]
    """[N, T]."""
    labels: NDArray[np.int64]


@lru_cache(maxsize=1)
def _reviews() -> tuple[_Rows, _Rows]:
    """Reviews to train on and held-out ones."""
    tokenizer = Checkpoint.open(str(smollm2_folder())).tokenizer()
    ids, labels = [], []
    for text, label in every_review()[:12_000]:
        tokens = tokenizer(text)["input_ids"]
        if len(tokens) >= TOKENS:
            ids.append(tokens[:TOKENS])
            labels.append(label)
    every, sides = np.array(ids, np.int64), np.array(labels, np.int64)
    return _Rows(every[EVAL_ROWS:], sides[EVAL_ROWS:]), _Rows(every[:EVAL_ROWS], sides[:EVAL_ROWS])
