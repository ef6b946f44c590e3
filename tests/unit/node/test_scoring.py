"""Held-out scoring keeps nothing of a batch, on any node, and gives the number that a training pass would."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from node.recompute import kept_bytes
from node.scoring import Scorer, summed_loss
from node.stage import AdapterStage
from swarm.data.batch import Batch
from swarm.errors import ProtocolError
from swarm.ids import Span
from swarm.model.shard import Head
from swarm.net.chain import Chain
from tests.unit.node.pipelines import BLOCKS, CPU, Part, Pipeline, batch_of, pipeline_of, spec_of

EXACT = spec_of(activations="float32")
BATCHES = [batch_of([12, 5, 9], seed) for seed in range(4)]


def with_graph(stage: AdapterStage, head: Head, batch: Batch) -> float:
    """As a training pass computes it."""
    stage.admit(0, (*batch.input_ids_BT.shape, head.width))
    output = stage.forward(0, head.embed(batch.input_ids_BT).detach(), input_grad=False)
    stage.drop(0)
    stage.give_back()
    return summed_loss(head, output, batch.labels_BT)


@pytest.fixture(scope="module")
def real(smollm2: Path) -> Iterator[Part]:
    part = Part(smollm2, Span(0, 30), EXACT)
    yield part
    part.compute.stop()


async def alone() -> Chain | None:
    return None


async def test_a_node_alone_keeps_nothing_and_gives_the_same_number(real: Part) -> None:
    head = Head(real.checkpoint, torch.float32, CPU)
    batches = [batch_of([24, 11], seed, vocabulary=40_000) for seed in range(3)]
    expected = sum(with_graph(real.stage, head, batch) for batch in batches)
    used = real.ledger.used_bytes
    # Room for one pass through one block: graphs need that of all thirty, for every batch.
    real.ledger.budget_bytes = used + kept_bytes(2 * 24, 576, 1536, 1, 4)
    try:
        score = await Scorer(head, real.stage, real.compute, alone).score(batches)
    finally:
        real.ledger.budget_bytes = 1 << 40
    assert score.loss * score.tokens == pytest.approx(expected, rel=1e-12)
    assert score.tokens == sum(batch.label_tokens for batch in batches)
    assert real.ledger.used_bytes == used
    assert real.stage.reason == "", "nothing was computed twice"
    # The stage trains on as before.
    before = real.gradients()
    with_graph(real.stage, head, batches[0])
    hidden = head.embed(batches[0].input_ids_BT).detach()
    real.stage.backward(1, torch.ones_like(real.stage.forward(1, hidden, input_grad=False)))
    assert real.gradients().keys() > before.keys()
    real.stage.skip()


async def test_a_pipeline_keeps_nothing_and_gives_the_same_number(tiny: Path, tmp_path: Path) -> None:
    whole = Part(tiny, Span(0, BLOCKS), EXACT)
    held = Part(tiny, Span(2, BLOCKS), EXACT)
    head = Head(whole.checkpoint, torch.float32, CPU)
    expected = sum(with_graph(whole.stage, head, batch) for batch in BATCHES)
    budget = held.ledger.used_bytes + kept_bytes(3 * 12, 32, 48, 1, 4)
    for part in (whole, held):
        part.compute.stop()
    async with pipeline_of(tiny, EXACT, tmp_path, second_budget_bytes=budget) as pipeline:
        used = [part.ledger.used_bytes for part in (pipeline.lead, pipeline.second)]
        score = await scorer_of(pipeline).score(BATCHES)
        assert [part.ledger.used_bytes for part in (pipeline.lead, pipeline.second)] == used
        assert pipeline.hosted.most_held == 0
        assert pipeline.second.stage.reason == ""
    assert score.loss * score.tokens == pytest.approx(expected, rel=1e-12)


async def test_a_score_that_is_not_a_number_is_an_error(tiny: Path, tmp_path: Path) -> None:
    async with pipeline_of(tiny, EXACT, tmp_path) as pipeline:
        key = next(key for key in pipeline.second.stage.parameters if key.endswith("o_proj.lora_A"))
        with torch.no_grad():
            pipeline.second.stage.parameters[key].fill_(math.inf)
        with pytest.raises(ProtocolError, match="not finite"):
            await scorer_of(pipeline).score(BATCHES)


def scorer_of(pipeline: Pipeline) -> Scorer:
    async def chain() -> Chain | None:
        return pipeline.chain

    return Scorer(pipeline.head, pipeline.lead.stage, pipeline.lead.compute, chain)
