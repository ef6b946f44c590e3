"""An optimizer step over a pipeline is the step of the whole model, however it is cut."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import node.step
import swarm.net.chain
from node.loss import label_loss
from node.main import pick_dtype
from node.memory import Ledger
from node.serving import NodeModel
from node.stage import AdapterStage
from node.step import StepDriver, clip_scale
from node.turns import window
from swarm.config import JobSpec
from swarm.data.batch import Batch
from swarm.data.microbatch import Microbatch, split_batch
from swarm.errors import InputError, JobConflict, OutOfMemory, ProtocolError
from swarm.ids import Span
from swarm.model.checkpoint import Checkpoint
from swarm.model.shard import Head
from tests.unit.node.pipelines import BLOCKS, CPU, Part, Pipeline, batch_of, pipeline_of, spec_of

EXACT = spec_of(activations="float32")
BATCH = batch_of([12, 5, 9, 16, 7, 7])
LR = 1e-2


def whole_gradients(folder: Path, batch: Batch, spec: JobSpec = EXACT) -> tuple[float, dict[str, torch.Tensor]]:
    """The unsplit batch through all blocks at once: one forward, one backward."""
    part = Part(folder, Span(0, BLOCKS), spec)
    head = Head(part.checkpoint, torch.float32, CPU)
    part.stage.admit(0, (*batch.input_ids_BT.shape, head.width))
    output = part.stage.forward(0, head.embed(batch.input_ids_BT).detach(), input_grad=False)
    loss, gradient = label_loss(head, output, batch.labels_BT)
    part.stage.backward(0, gradient)
    part.compute.stop()
    return loss, part.gradients()


def assert_close(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for key in mine:
        scale = float(theirs[key].abs().max())
        assert float((mine[key] - theirs[key]).abs().max()) <= 1e-5 * scale, key


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
async def test_split_gradients_are_those_of_the_unsplit_batch(tiny: Path, tmp_path: Path, parts: int) -> None:
    expected_loss, expected = whole_gradients(tiny, BATCH)
    microbatches = split_batch(BATCH, parts)
    async with pipeline_of(tiny, EXACT, tmp_path) as pipeline:
        # What the step is taken with is looked at before it is: the driver's first half.
        loss, norm = await pipeline.driver.gradient(microbatches)
        found = pipeline.gradients()
        passes = pipeline.hosted.passes
        assert pipeline.hosted.most_held <= window(2, 1).most
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert norm == pytest.approx(math.sqrt(sum(float(g.double().square().sum()) for g in expected.values())), rel=1e-5)
    for kind in "FB":
        assert [p for p in passes if p[0] == kind] == [f"{kind}{n + 1}" for n in range(len(microbatches))]
    if parts == 1:
        assert loss == expected_loss
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    else:
        assert_close(found, expected)


@pytest.mark.parametrize("roomy", [True, False])
async def test_a_stage_runs_ahead_of_gradients_as_far_as_memory_has_room(
    tiny: Path, tmp_path: Path, roomy: bool
) -> None:
    microbatches = split_batch(batch_of([6] * 12), 12)
    held = Part(tiny, Span(2, BLOCKS), EXACT)
    empty = held.ledger.used_bytes
    head = Head(held.checkpoint, torch.float32, CPU)
    held.stage.admit(0, (*microbatches[0].batch.input_ids_BT.shape, head.width))
    each = held.ledger.used_bytes - empty
    held.compute.stop()
    of_stage = window(2, 1)
    budget = empty + each * (2 * of_stage.most if roomy else of_stage.least)
    async with pipeline_of(tiny, EXACT, tmp_path, second_budget_bytes=budget) as pipeline:
        idle = pipeline.lead.ledger.used_by("activations")
        # No gradient is sent: what comes back is what the stage does without.
        hidden = pipeline.chain.pack(head.embed(microbatches[0].batch.input_ids_BT).detach())
        alone = of_stage.most if roomy else of_stage.least
        ahead = [await pipeline.chain.train_forward(hidden) for _ in range(alone)]
        assert pipeline.hosted.most_held == alone
        for seq, output in ahead:
            await pipeline.chain.train_backward(seq, output)
        loss, _ = await pipeline.driver.gradient(microbatches)
        assert math.isfinite(loss)
        assert pipeline.hosted.most_held <= (of_stage.most if roomy else of_stage.least)
        assert pipeline.second.stage.reason == "", "nothing was computed twice"
        await pipeline.driver.step(microbatches, LR)
        assert pipeline.lead.ledger.used_by("activations") == idle


async def test_the_event_loop_touches_no_tensor(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing, unpacking and looking for what is not finite take milliseconds of whole microbatches."""
    called: list[tuple[str, str]] = []

    def watch(module: ModuleType, name: str) -> None:
        real = getattr(module, name)

        def watched(*args: Any, **settings: Any) -> Any:
            called.append((name, threading.current_thread().name))
            return real(*args, **settings)

        monkeypatch.setattr(module, name, watched)

    async with pipeline_of(tiny, spec_of(), tmp_path) as pipeline:
        for module, name in ((node.step, "is_finite"), (swarm.net.chain, "pack"), (swarm.net.chain, "unpack")):
            watch(module, name)
        await pipeline.driver.step(split_batch(BATCH, 3), LR)
    assert {name for name, _ in called} == {"is_finite", "pack", "unpack"}
    assert {thread for _, thread in called} == {"compute-train"}


async def test_the_same_steps_give_the_same_bits(tiny: Path, tmp_path: Path) -> None:
    results = []
    for run in range(2):
        (tmp_path / str(run)).mkdir()
        async with pipeline_of(tiny, EXACT, tmp_path / str(run)) as pipeline:
            losses = [
                (await pipeline.driver.step(split_batch(batch_of([6, 9, 4, 8], n), 4), LR)).loss for n in range(4)
            ]
            await settled(pipeline)
            results.append((losses, pipeline.values()))
    assert results[0][0] == results[1][0]
    for key, value in results[0][1].items():
        assert np.array_equal(value, results[1][1][key]), key


async def settled(pipeline: Pipeline) -> None:
    """The second node took its step: this comes behind it on the same stream, and is answered."""
    await pipeline.chain.begin_round(1)


async def test_clipping_is_torchs_on_the_whole_model(tiny: Path, tmp_path: Path) -> None:
    _, gradients = whole_gradients(tiny, BATCH)
    parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients.values()]
    for parameter, gradient in zip(parameters, gradients.values(), strict=True):
        parameter.grad = gradient.clone()
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, 0.01))
    async with pipeline_of(tiny, EXACT, tmp_path) as pipeline:
        before = pipeline.values()
        result = await pipeline.driver.step(split_batch(BATCH, 3), LR, clip=0.01)
        await settled(pipeline)
        after = pipeline.values()
        moments = pipeline.lead.stage.moments() | pipeline.second.stage.moments()
    assert norm > 0.01
    assert result.norm == pytest.approx(norm, rel=1e-5)
    assert result.taken
    # AdamW's first moment after one step is a tenth of the gradient it was given.
    for key, parameter in zip(gradients, parameters, strict=True):
        assert parameter.grad is not None
        given = moments[f"m/{key}"] / 0.1
        assert np.abs(given - parameter.grad.numpy()).max() <= 1e-4 * float(parameter.grad.abs().max()), key
    assert all(not np.array_equal(before[key], after[key]) for key in before)


def test_clip_scale() -> None:
    assert clip_scale(5.0, None) == 1.0
    assert clip_scale(0.5, 1.0) == 1.0
    assert clip_scale(4.0, 1.0) == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("where", ["lead", "second", "gradient"])
async def test_a_step_that_is_not_finite_changes_nothing_anywhere(tiny: Path, tmp_path: Path, where: str) -> None:
    async with pipeline_of(tiny, EXACT, tmp_path) as pipeline:
        part = pipeline.lead if where == "lead" else pipeline.second
        key = next(key for key in part.stage.parameters if key.endswith("lora_A"))
        kept = part.stage.values()[key]
        with torch.no_grad():
            # Infinite activations; or finite ones whose gradient overflows.
            part.stage.parameters[key].fill_(math.inf if where != "gradient" else 1.0)
            if where == "gradient":
                for name, parameter in part.stage.parameters.items():
                    if name.endswith("lora_B"):
                        parameter.fill_(3e38 if name == key.replace("lora_A", "lora_B") else 0.0)
                part.stage.parameters[key].fill_(1e-38)
        before = pipeline.values()
        result = await pipeline.driver.step(split_batch(BATCH, 3), LR)
        assert not result.taken
        await settled(pipeline)
        after = pipeline.values()
        assert all(np.array_equal(before[k], after[k], equal_nan=True) for k in before)
        assert pipeline.lead.stage.moments() == pipeline.second.stage.moments() == {}
        # The next step is taken, as if that one had not been.
        with torch.no_grad():
            part.stage.parameters[key].copy_(torch.from_numpy(kept))
            if where == "gradient":
                part.stage.parameters[key.replace("lora_A", "lora_B")].fill_(0.01)
        assert (await pipeline.driver.step(split_batch(BATCH, 3), LR)).taken


@pytest.mark.parametrize("share", [1.0, 1e-5, 1e-9])
async def test_small_gradients_cross_a_link_in_float16(tiny: Path, tmp_path: Path, share: float) -> None:
    """`share`: of a step's labelled tokens. The mean over many of them has gradients below float16's least value."""
    found = []
    for encoding in ("float32", "float16"):
        (tmp_path / encoding).mkdir()
        async with pipeline_of(tiny, spec_of(activations=encoding), tmp_path / encoding) as pipeline:
            await pipeline.driver.gradient([Microbatch(BATCH, share)])
            found.append(pipeline.gradients())
    for key, exact in found[0].items():
        assert float((found[1][key] - exact).norm()) <= 5e-3 * float(exact.norm()), key
        assert float(exact.norm()) > 0


def test_a_node_in_float16_does_not_train(tiny: Path) -> None:
    checkpoint, ledger = Checkpoint.open(str(tiny)), Ledger(1 << 40)
    model = NodeModel(checkpoint, Span(0, 2), torch.float16, CPU, ledger)
    with pytest.raises(JobConflict, match="float16") as caught:
        AdapterStage(model, Span(0, 2), EXACT.model_copy(update={"precision": "auto"}), ledger, "tiny")
    assert "--dtype bfloat16" in caught.value.fix
    with pytest.raises(InputError, match="float16"):
        pick_dtype("float16", CPU, trains=True)
    assert pick_dtype("float16", CPU) is torch.float16


async def test_accumulated_batches_are_one_large_batch(tiny: Path, tmp_path: Path) -> None:
    large = batch_of([10, 4, 6, 12, 8, 3, 9, 11], seed=9)
    _, expected = whole_gradients(tiny, large)
    async with pipeline_of(tiny, EXACT, tmp_path) as pipeline:
        await pipeline.driver.gradient(split_batch(large, 2 * 4))
        assert_close(pipeline.gradients(), expected)


async def test_what_does_not_fit_is_computed_twice_with_equal_gradients(tiny: Path, tmp_path: Path) -> None:
    _, expected = whole_gradients(tiny, BATCH)
    held = Part(tiny, Span(2, BLOCKS), EXACT)
    held.compute.stop()
    # Room for less than one batch's activations, more than for the inputs of its blocks and one block.
    batch_bytes = BATCH.input_ids_BT.numel() * (10 * 32 + 4 * 48) * 4 * 2
    budget = held.ledger.used_bytes + int(batch_bytes * 0.7)
    async with pipeline_of(tiny, EXACT, tmp_path, second_budget_bytes=budget) as pipeline:
        await pipeline.driver.gradient(split_batch(BATCH, 1))
        found = pipeline.gradients()
        assert "computed twice" in pipeline.second.stage.reason
        assert pipeline.lead.stage.reason == ""
    assert all(torch.equal(found[key], expected[key]) for key in expected)


async def test_what_fits_in_no_way_is_out_of_memory(tiny: Path, tmp_path: Path) -> None:
    held = Part(tiny, Span(2, BLOCKS), EXACT)
    held.compute.stop()
    budget = held.ledger.used_bytes + 1000
    async with pipeline_of(tiny, EXACT, tmp_path, second_budget_bytes=budget) as pipeline:
        with pytest.raises(OutOfMemory, match="activations of tiny"):
            await pipeline.driver.step(split_batch(BATCH, 2), LR)


async def test_gradients_out_of_order_are_refused(tiny: Path) -> None:
    part = Part(tiny, Span(0, 2), EXACT)
    hidden = torch.randn(1, 3, 32)
    for seq in (1, 2):
        part.stage.forward(seq, hidden, input_grad=True)
    with pytest.raises(ProtocolError, match="before those"):
        part.stage.backward(2, hidden)
    part.compute.stop()


@pytest.mark.parametrize(("lr", "scale"), [(math.nan, 1.0), (-1.0, 1.0), (LR, 2.0), (LR, math.nan)])
async def test_a_step_that_cannot_be_meant_is_refused(tiny: Path, tmp_path: Path, lr: float, scale: float) -> None:
    async with pipeline_of(tiny, EXACT, tmp_path) as pipeline:
        await pipeline.driver.gradient(split_batch(BATCH, 2))
        before = pipeline.second.stage.values()
        await pipeline.chain.step(lr, scale, skip=False)
        with pytest.raises(ProtocolError, match="an optimizer step at rate"):
            await pipeline.chain.begin_round(2)
        after = pipeline.second.stage.values()
        assert all(np.array_equal(before[key], after[key]) for key in before)


async def test_a_step_or_gradient_out_of_turn_is_refused(tiny: Path, tmp_path: Path) -> None:
    async with pipeline_of(tiny, EXACT, tmp_path) as pipeline:
        await pipeline.chain.train_forward(pipeline.chain.pack(torch.randn(1, 3, 32)))
        await pipeline.chain.step(LR, 1.0, skip=False)
        with pytest.raises(ProtocolError, match="while 1 batches wait"):
            await pipeline.chain.begin_round(2)
    async with pipeline_of(tiny, EXACT, tmp_path) as pipeline:
        with pytest.raises(ProtocolError, match="which never came"):
            await pipeline.chain.train_backward(7, pipeline.chain.pack(torch.randn(1, 3, 32)))


async def test_one_node_alone_takes_the_same_step(tiny: Path, tmp_path: Path) -> None:
    expected_loss, expected = whole_gradients(tiny, BATCH)
    part = Part(tiny, Span(0, BLOCKS), EXACT)
    driver = StepDriver(Head(part.checkpoint, torch.float32, CPU), part.stage, part.compute, None)
    loss, _ = await driver.gradient(split_batch(BATCH, 1))
    assert loss == expected_loss
    assert all(torch.equal(part.gradients()[key], expected[key]) for key in expected)
    part.stage.skip()
    await driver.gradient(split_batch(BATCH, 3))
    assert_close(part.gradients(), expected)
    part.compute.stop()


async def test_bfloat16_computes_nearly_the_same_with_float32_adapters(tiny: Path) -> None:
    _, expected = whole_gradients(tiny, BATCH)
    _, found = whole_gradients(tiny, BATCH, spec_of(precision="bfloat16"))
    for key, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert functional.cosine_similarity(gradient.flatten(), expected[key].flatten(), dim=0) > 0.98, key
    assert not all(torch.equal(found[key], expected[key]) for key in expected)
