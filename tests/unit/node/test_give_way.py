"""Tokens are decoded between the layers of a training step, and change nothing about it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import torch

from node.loss import label_loss
from node.stage import AdapterStage
from swarm.compute import Compute, Priority
from swarm.ids import Span
from swarm.model.shard import Head
from tests.unit.node.pipelines import BLOCKS, CPU, Part, batch_of, spec_of, start_values

BATCH = batch_of([12, 5, 9])


def gradients(part: Part, stage: AdapterStage, head: Head) -> tuple[float, dict[str, torch.Tensor]]:
    output = stage.forward(0, head.embed(BATCH.input_ids_BT).detach(), input_grad=False)
    loss, gradient = label_loss(head, output, BATCH.labels_BT, give_way=stage.give_way)
    stage.backward(0, gradient)
    return loss, {key: p.grad.clone() for key, p in stage.parameters.items() if p.grad is not None}


async def test_decoding_between_layers_leaves_training_bit_for_bit(tiny: Path) -> None:
    spec = spec_of()
    part = Part(tiny, Span(0, BLOCKS), spec)
    head = Head(part.checkpoint, torch.float32, CPU)
    expected = gradients(part, part.stage, head)
    compute = Compute(training_share=0.0)
    loop = asyncio.get_running_loop()
    view = part.model.view(Span(0, BLOCKS)).view
    column = torch.randn(1, 1, head.width)
    asked: list[asyncio.Future[torch.Tensor]] = []

    def decode() -> torch.Tensor:
        with torch.inference_mode():
            return view.forward(column, 0, view.new_cache())

    def give_way() -> None:
        # A token arrives at every place where training may stop.
        asked.append(asyncio.run_coroutine_threadsafe(compute.run(Priority.DECODE, decode), loop))  # type: ignore[arg-type]
        while not compute.waiting:
            pass
        compute.give_way()

    stage = AdapterStage(part.model, Span(0, BLOCKS), spec, part.ledger, "busy", give_way)
    stage.reset(start_values(part, spec, Span(0, BLOCKS)))
    alone = decode()
    loss, found = await compute.run(Priority.TRAIN, gradients, part, stage, head)
    # Seven linear layers and the block itself, forward and backward, once more within each adapted layer's backward
    # pass, and thrice at the loss; the first block's input has no gradient, so its query, key and value layers still
    # have one each.
    assert len(asked) == (2 * 8 + 7) * BLOCKS + 3
    for each in asked:
        assert torch.equal(await asyncio.wrap_future(each), alone)  # type: ignore[arg-type]
    assert loss == expected[0]
    assert found.keys() == expected[1].keys()
    assert all(torch.equal(found[key], expected[1][key]) for key in found)
    compute.stop()
    part.compute.stop()


async def test_what_is_served_does_not_wait_for_the_end_of_a_training_piece() -> None:
    compute = Compute()
    order: list[str] = []

    async def serve() -> None:
        await compute.run(Priority.DECODE, order.append, "token")

    loop = asyncio.get_running_loop()

    def train() -> None:
        asyncio.run_coroutine_threadsafe(serve(), loop)
        while "token" not in order:
            compute.give_way()
        order.append("step")

    await compute.run(Priority.TRAIN, train)
    assert order == ["token", "step"]
    compute.stop()


async def test_a_token_goes_before_a_prompt_that_waits_longer() -> None:
    compute = Compute()
    order: list[str] = []
    busy = asyncio.Event()
    loop = asyncio.get_running_loop()

    def train() -> None:
        loop.call_soon_threadsafe(busy.set)
        while compute.waiting < 3:
            pass

    training = asyncio.create_task(compute.run(Priority.TRAIN, train))
    await busy.wait()
    await asyncio.gather(
        compute.run(Priority.PREFILL, order.append, "prompt"),
        compute.run(Priority.DECODE, order.append, "token"),
        compute.run(Priority.DECODE, order.append, "another"),
    )
    await training
    assert order == ["token", "another", "prompt"]
    compute.stop()
