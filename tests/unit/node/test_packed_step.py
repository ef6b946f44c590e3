"""A step over packed rows is the step over the same samples in rows of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.families import randomize
from benchmarks.families_configs import variants
from node.loss import label_loss
from node.memory import Ledger
from node.serving import NodeModel
from node.stage import AdapterStage
from swarm.data.batch import Batch, collate
from swarm.data.chat import IGNORED, EncodedSample
from swarm.data.microbatch import split_batch
from swarm.data.packing import collate_packed
from swarm.errors import ProtocolError, UnsupportedModel
from swarm.ids import Span
from swarm.model.checkpoint import Checkpoint
from swarm.model.families import n_blocks
from swarm.model.packed import keeps_apart
from swarm.model.shard import Head
from tests.unit.node.pipelines import CPU, Part, pipeline_of, spec_of, start_values

LENGTHS = [12, 5, 9, 16, 7, 7, 3, 4]
SPEC = spec_of(activations="float32", data={"train": "none.jsonl", "packing": True})


def samples_of(lengths: list[int]) -> list[EncodedSample]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for length in lengths:
        ids = tuple(torch.randint(1, 60, (length,), generator=generator).tolist())
        found.append(EncodedSample(ids, (IGNORED, *ids[1:]), 0))
    return found


PLAIN = collate(samples_of(LENGTHS), 0)
PACKED = collate_packed(samples_of(LENGTHS), 0, 2, 32)


def gradients(part: Part, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    head = Head(part.checkpoint, torch.float32, CPU)
    embedded = head.embed(batch.input_ids_BT, batch.positions_BT).detach()
    output = part.stage.forward(0, embedded, batch.positions_BT, input_grad=False)
    loss, gradient = label_loss(head, output, batch.labels_BT)
    part.stage.backward(0, gradient)
    found = part.gradients()
    part.stage.skip()
    return loss, found


def assert_close(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for key in mine:
        scale = float(theirs[key].abs().max())
        assert float((mine[key] - theirs[key]).abs().max()) <= 2e-5 * scale + 1e-9, key


def saved(kind: str, folder: Path) -> Checkpoint:
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(variants(kind)[0], dtype=torch.float32)
    randomize(model)
    model.save_pretrained(folder)
    return Checkpoint.open(str(folder))


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gpt2"])
def test_loss_and_gradients_are_those_of_the_samples_alone(kind: str, tmp_path: Path) -> None:
    """mistral and gemma2 have windows shorter than a row, gpt2 learned positions."""
    checkpoint = saved(kind, tmp_path)
    window = getattr(checkpoint.config, "sliding_window", None)
    assert (window is not None and window < max(LENGTHS)) == (kind in ("mistral", "gemma2"))
    span = Span(0, n_blocks(checkpoint.config))
    part = Part(tmp_path, span, SPEC)
    part.stage.reset(start_values(part, SPEC, span))
    assert PACKED.positions_BT is not None
    loss, found = gradients(part, PACKED)
    expected_loss, expected = gradients(part, PLAIN)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_close(found, expected)
    part.compute.stop()


async def test_packed_rows_through_a_pipeline_of_two_nodes(tiny: Path, tmp_path: Path) -> None:
    async with pipeline_of(tiny, SPEC, tmp_path) as pipeline:
        loss, norm = await pipeline.driver.gradient(split_batch(PACKED, 2))
        found = pipeline.gradients()
        for part in (pipeline.lead, pipeline.second):
            part.stage.skip()
        plain_loss, plain_norm = await pipeline.driver.gradient(split_batch(PLAIN, 2))
        assert (loss, norm) == (pytest.approx(plain_loss, rel=1e-6), pytest.approx(plain_norm, rel=1e-5))
        assert_close(found, pipeline.gradients())


async def test_position_ids_that_do_not_fit_are_refused(tiny: Path, tmp_path: Path) -> None:
    async with pipeline_of(tiny, SPEC, tmp_path) as pipeline:
        with pytest.raises(ProtocolError, match="position ids"):
            await pipeline.chain.train_forward(pipeline.chain.pack(torch.randn(1, 3, 32)), [0, 1])


@pytest.mark.parametrize("kind", ["qwen3_next", "minimax"])
def test_a_family_that_carries_a_state_along_the_row_is_refused(kind: str, tmp_path: Path) -> None:
    checkpoint = saved(kind, tmp_path)
    span, ledger = Span(0, n_blocks(checkpoint.config)), Ledger(1 << 40)
    model = NodeModel(checkpoint, span, torch.float32, CPU, ledger)
    assert not keeps_apart(model.shard.view(span), model.width)
    with pytest.raises(UnsupportedModel, match=f"'{kind}' do not keep samples apart"):
        AdapterStage(model, span, SPEC, ledger, "packed")
