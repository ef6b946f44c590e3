"""Serving and a training step on a CUDA device: close to the CPU in float32, finite and sane in bfloat16."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch

from node.loss import label_loss
from node.main import pick_device, pick_dtype
from node.measure import training_cost
from node.memory import Ledger, default_budget
from node.serving import NodeModel
from node.stage import AdapterStage
from swarm.compute import Compute, Priority
from swarm.config import JobSpec
from swarm.errors import OutOfMemory, ProtocolError
from swarm.ids import Span
from swarm.model.checkpoint import Checkpoint
from swarm.model.quantize import Scheme
from swarm.model.shard import Head
from swarm.wire.tensors import pack, unpack

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
SPEC = JobSpec.model_validate({"name": "gpu", "data": {"train": "-"}})


def node_model(
    folder: Path, device: torch.device, dtype: torch.dtype, budget: int = 2**40, scheme: Scheme = "none"
) -> NodeModel:
    return NodeModel(Checkpoint.open(str(folder)), Span(0, 4), dtype, device, Ledger(budget), scheme)


def test_defaults_are_the_card_and_bfloat16() -> None:
    device = pick_device("auto")
    assert device.type == "cuda"
    assert pick_dtype("auto", device) is torch.bfloat16
    assert default_budget(device) > 0


def test_cached_forward_is_close_to_the_cpu(smollm2: Path) -> None:
    hidden = torch.randn(1, 12, 576, generator=torch.Generator().manual_seed(1)) * 0.1
    outputs = []
    for device in (CPU, CUDA):
        view = node_model(smollm2, device, torch.float32).view(Span(0, 4)).view
        cache = view.new_cache()
        with torch.inference_mode():
            first = view.forward(hidden[:, :8].to(device), 0, cache)
            rest = view.forward(hidden[:, 8:].to(device), 8, cache)
        outputs.append(torch.cat([first, rest], dim=1).cpu())
    assert float((outputs[0] - outputs[1]).norm() / outputs[0].norm()) < 1e-4


@pytest.mark.parametrize(
    ("scheme", "dtype", "tolerance"),
    [
        ("none", torch.float32, 1e-3),
        ("none", torch.bfloat16, 0.15),
        # A weight between two codes may have another one on the card; 4 bits round activations on a CPU.
        ("int8", torch.float32, 0.01),
        ("int8", torch.bfloat16, 0.15),
        ("int4", torch.float32, 0.05),
        ("int4", torch.bfloat16, 0.15),
    ],
)
def test_a_training_step_is_close_to_the_cpu(
    smollm2: Path, scheme: Scheme, dtype: torch.dtype, tolerance: float
) -> None:
    labels = torch.full((2, 10), -100)
    labels[:, 6:] = torch.randint(0, 1000, (2, 4), generator=torch.Generator().manual_seed(2))
    moved = []
    for device, kind in ((CPU, torch.float32), (CUDA, dtype)):
        model = node_model(smollm2, device, kind, scheme=scheme)
        stage = AdapterStage(model, Span(0, 4), SPEC, Ledger(2**40), "job")
        head = Head(model.checkpoint, kind, device)
        start = model.adapters.initial_span(SPEC.method, 0, Span(0, 4))
        stage.reset(start)
        ids = torch.randint(0, 40_000, (2, 10), generator=torch.Generator().manual_seed(3))
        output = stage.forward(0, head.embed(ids).detach(), input_grad=True)
        loss, grad = label_loss(head, output, labels)
        assert np.isfinite(loss)
        assert stage.backward(0, grad) is not None
        gradient = {key: p.grad.float().cpu() for key, p in stage.parameters.items() if p.grad is not None}
        moved.append(torch.cat([gradient[key].flatten() for key in sorted(gradient) if key.endswith("lora_B")]))
        stage.step(1e-3)
        moments = stage.moments()
        assert all(float(moments[f"t/{key}"][0]) == 1 for key in stage.parameters)
        stage.set_moments(moments)
        stage.step(1e-3)
    assert float((moved[0] - moved[1]).norm() / moved[0].norm()) < tolerance


async def test_tokens_are_decoded_between_the_layers_of_a_training_step(smollm2: Path) -> None:
    compute = Compute(training_share=0.0, settle=torch.cuda.synchronize)
    model = node_model(smollm2, CUDA, torch.float32)
    view, column = model.view(Span(0, 4)).view, torch.randn(1, 1, 576, device=CUDA)
    loop, asked = asyncio.get_running_loop(), list[Future[torch.Tensor]]()

    def decode() -> torch.Tensor:
        with torch.inference_mode():
            return view.forward(column, 0, view.new_cache()).cpu()

    def give_way() -> None:  # on autograd's own thread in backward
        asked.append(asyncio.run_coroutine_threadsafe(compute.run(Priority.DECODE, decode), loop))
        while not compute.waiting:
            pass
        compute.give_way()

    def step(stage: AdapterStage) -> torch.Tensor:
        stage.reset(model.adapters.initial_span(SPEC.method, 0, Span(0, 4)))
        output = stage.forward(0, torch.ones(2, 10, 576, device=CUDA), input_grad=True)
        gradient = stage.backward(0, output)
        assert gradient is not None
        return gradient.cpu()

    alone = step(AdapterStage(model, Span(0, 4), SPEC, Ledger(2**40), "alone"))
    stage = AdapterStage(model, Span(0, 4), SPEC, Ledger(2**40), "busy", give_way)
    assert torch.equal(await compute.run(Priority.TRAIN, step, stage), alone)
    assert len(asked) > 4 * 7
    expected = decode()
    for each in asked:
        assert torch.equal(await asyncio.wrap_future(each), expected)
    compute.stop()


@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("encoding", ["float32", "bfloat16", "float16", "int8", "int4"])
def test_tensors_go_to_the_wire_and_back_as_on_the_cpu(encoding: str, tokens: int) -> None:
    tensor = torch.randn(2, tokens, 576, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    on_cpu, on_card = pack(tensor, encoding), pack(tensor.to(CUDA), encoding)
    assert on_card[0] == on_cpu[0]
    assert len(on_card[1]) == len(on_cpu[1])
    for dtype in (torch.float32, torch.bfloat16):
        back = unpack(*on_card, dtype, CUDA)
        assert back.device.type == "cuda"
        # What the card sent means the same to both. A card divides by a product with the reciprocal, so that a value
        # between two codes may go to the other one: the same bits are not asked for, the same error is.
        expected = unpack(*on_card, dtype, CPU)
        torch.testing.assert_close(back.cpu(), expected, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=0)
        errors = [(values.float() - tensor.float()).norm() for values in (expected, unpack(*on_cpu, dtype, CPU))]
        assert errors[0] <= 1.01 * errors[1]


@pytest.mark.parametrize("encoding", ["bfloat16", "int8", "int4"])
def test_what_is_not_finite_is_refused(encoding: str) -> None:
    tensor = torch.ones(1, 2, 64, device=CUDA)
    tensor[0, 1, 2] = torch.nan
    with pytest.raises(ProtocolError, match="NaN or infinity"):
        unpack(*pack(tensor, encoding), torch.float32, CUDA)


def test_what_training_costs_is_measured_to_the_end(smollm2: Path) -> None:
    """A GPU answers before it has computed: without waiting, the blocks' work would count as the head's."""
    model = node_model(smollm2, CUDA, torch.float32)
    stage = AdapterStage(model, Span(0, 4), SPEC, Ledger(2**40), "cost")
    stage.reset(model.adapters.initial_span(SPEC.method, 0, Span(0, 4)))
    head = Head(model.checkpoint, torch.float32, CUDA)
    ids = torch.randint(0, 40_000, (16, 1024), generator=torch.Generator().manual_seed(6))
    block_s, head_s = training_cost(stage, head, ids)
    # By their multiplications the head is 8 times as much as a block, and attention is on top of the block's.
    assert 1 < head_s / block_s < 10


def test_too_little_memory_is_a_typed_error(smollm2: Path) -> None:
    with pytest.raises(OutOfMemory, match=r"--blocks|weights"):
        node_model(smollm2, CUDA, torch.float32, budget=2**20)
