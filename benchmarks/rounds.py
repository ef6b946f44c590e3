"""What do outer momentum and codec settings cost over a handful of rounds?

The demo's job without its processes: K pipelines in one process, one after the other, through the
node's own stage and loss, the codec, and the coordinator's own averaging and outer step. After every
round the held-out sentences are scored. Slow: about 3 s an inner step on one thread.

    python -m benchmarks.rounds --variant one-bit --rounds 3 --save
"""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import asdict, dataclass

import torch

from benchmarks.provenance import provenance, publish
from coordinator.aggregate import OuterState, average, outer_round
from node.loss import label_loss
from node.memory import Ledger
from node.serving import NodeModel
from node.stage import AdapterStage
from swarm.adapters.registry import Parameters
from swarm.client.score import Question, Score, score
from swarm.compress import FrameContext, compress_with_feedback
from swarm.config import CodecSettings, JobSpec, OuterSettings
from swarm.data.batch import Batch, collate
from swarm.data.chat import encode_sample
from swarm.data.dataset import Message
from swarm.data.order import sample_index
from swarm.ids import Span
from swarm.model.checkpoint import Checkpoint
from swarm.model.shard import Head, n_blocks
from swarm.optim.params import hash_all
from swarm.samples import movie_sentences, review_chat, smollm2_folder

CHOICES = ("positive", "negative")
PLAIN, NESTEROV = OuterSettings(momentum=0.0, nesterov=False), OuterSettings(momentum=0.5)
DENSE = CodecSettings(kind="dense")
VARIANTS = {
    "dense-momentum": (NESTEROV, DENSE, DENSE),
    "dense-plain": (PLAIN, DENSE, DENSE),
    "one-bit": (PLAIN, CodecSettings(density=1, bits=1, decay=1), CodecSettings(density=1, bits=4, decay=1)),
    "top-eighth": (PLAIN, CodecSettings(density=0.125, decay=0.95), CodecSettings(density=0.25, bits=3, decay=1)),
    "top-fifth-momentum": (
        NESTEROV,
        CodecSettings(density=0.2, decay=0.95),
        CodecSettings(density=0.3, bits=3, decay=1),
    ),
}
"""Outer optimizer, uplink and downlink."""


@dataclass(frozen=True)
class Scale:
    pipelines: int
    inner_steps: int
    rounds: int
    held_out: int


class Simulation:
    """One variant of the job; the model is shared between variants."""

    def __init__(self, model: NodeModel, head: Head, scale: Scale, variant: str) -> None:
        outer, uplink, downlink = VARIANTS[variant]
        raw = {"name": "rounds", "data": {"train": "-"}}
        self.spec = JobSpec.model_validate(raw).model_copy(
            update={"outer": outer, "uplink": uplink, "downlink": downlink}
        )
        self._model, self._head, self._scale = model, head, scale
        self._tokenizer = model.checkpoint.tokenizer()
        self._train = movie_sentences("train", 4000)
        self._questions = [
            Question(tuple(review_chat(s.text)), CHOICES, CHOICES.index(s.label))
            for s in movie_sentences("held_out", scale.held_out)
        ]
        self._stages = [
            AdapterStage(model, model.span, self.spec, Ledger(2**62), f"pipeline {k}") for k in range(scale.pipelines)
        ]
        self._residuals: list[Parameters | None] = [None] * scale.pipelines
        self._state = OuterState(model.adapters.initial(self.spec.method, 0), {}, {})
        self._position = 0
        self.contribution_bytes = 0

    def round(self, number: int) -> float:
        """Inner steps of every pipeline and one outer step; the mean training loss."""
        base_hash = hash_all(self._state.params)
        sent, losses = [], []
        for k, stage in enumerate(self._stages):
            stage.reset(self._state.params)
            losses += [self._inner_step(stage) for _ in range(self._scale.inner_steps)]
            now = stage.values()
            delta = {key: self._state.params[key] - now[key] for key in now}
            context = FrameContext("rounds", number, base_hash)
            compressed = compress_with_feedback(delta, self._residuals[k], self.spec.uplink, context)
            self._residuals[k] = compressed.residual
            self.contribution_bytes += len(compressed.frame)
            sent.append((f"pipeline {k}", compressed.decoded))
        mean = average(sent, len(sent), self.spec.uplink)
        self._state = outer_round(self._state, mean, self.spec, "rounds", number).state
        return sum(losses) / len(losses)

    def delta(self) -> Parameters:
        """What a round's inner steps of the first pipeline change, as it is before the codec."""
        stage = self._stages[0]
        stage.reset(self._state.params)
        for _ in range(self._scale.inner_steps):
            self._inner_step(stage)
        now = stage.values()
        return {key: self._state.params[key] - now[key] for key in now}

    def score(self) -> Score:
        stage = self._stages[0]
        stage.reset(self._state.params)

        async def hidden_states(ids_BT: torch.Tensor) -> torch.Tensor:
            hidden = stage.forward(0, self._head.embed(ids_BT), input_grad=False)
            stage.reset(self._state.params)  # drops the graph
            return hidden

        return asyncio.run(score(self._questions, self._tokenizer, self._head.logits, [hidden_states]))

    def _inner_step(self, stage: AdapterStage) -> float:
        batch = self._batch()
        output = stage.forward(0, self._head.embed(batch.input_ids_BT).detach(), input_grad=False)
        loss, grad = label_loss(self._head, output, batch.labels_BT)
        stage.backward(0, grad)
        stage.step(self.spec.inner.lr)
        return loss

    def _batch(self) -> Batch:
        size = self.spec.schedule.batch_size
        rows = [self._train[sample_index(self._position + i, len(self._train), 0)] for i in range(size)]
        self._position += size
        return collate(
            [
                encode_sample(self._tokenizer, (*review_chat(row.text), Message("assistant", row.label)), 512)
                for row in rows
            ],
            self._tokenizer.pad_token_id,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--variant", choices=VARIANTS, action="append", help="repeatable; default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--inner-steps", type=int, default=8)
    parser.add_argument("--pipelines", type=int, default=2)
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", default="", help="FILE, or - for one line on stdout")
    parser.add_argument("--save", action="store_true", help="also write benchmarks/results/rounds.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    origin = provenance(options.threads)
    scale = Scale(options.pipelines, options.inner_steps, options.rounds, options.held_out)
    checkpoint = Checkpoint.open(str(smollm2_folder()))
    cpu, whole = torch.device("cpu"), Span(0, n_blocks(checkpoint.config))
    model = NodeModel(checkpoint, whole, torch.float32, cpu, Ledger(2**62))
    head = Head(checkpoint, torch.float32, cpu)
    rows = []
    for variant in options.variant or VARIANTS:
        simulation = Simulation(model, head, scale, variant)
        train: list[float] = []
        scores: list[Score] = []
        for number in range(1, scale.rounds + 1):
            train.append(simulation.round(number))
            scores.append(simulation.score())
            print(f"{variant} round {number}: {train[-1]:.3f} {scores[-1]}", flush=True)
        row = {
            "variant": variant,
            "train_loss": [round(loss, 4) for loss in train],
            "held_out_loss": [round(s.loss, 4) for s in scores],
            "accuracy": [round(s.accuracy, 4) for s in scores],
        }
        parameters = sum(value.size for value in model.adapters.initial(simulation.spec.method, 0).values())
        ddp_bytes = scale.pipelines * scale.rounds * scale.inner_steps * parameters * 2
        rows.append({**row, "saving": round(ddp_bytes / simulation.contribution_bytes, 1)})
    publish("rounds", {"rows": rows, "scale": asdict(scale)}, origin, options.json, options.save)


if __name__ == "__main__":
    main()
