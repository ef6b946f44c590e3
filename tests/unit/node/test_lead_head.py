"""What a lead's head takes is charged before it is taken, on a real model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from node.lead_head import LeadHead
from node.loss import LOGITS_BYTES, label_loss, logits_bytes, rows_at_once
from node.memory import Ledger
from node.serving import NodeModel
from swarm.compute import Compute
from swarm.errors import OutOfMemory
from swarm.ids import Span
from swarm.model.checkpoint import Checkpoint
from tests.unit.node.pipelines import CPU

CUDA = torch.device("cuda")
VOCABULARY, WIDTH = 49_152, 576
HEAD_BYTES = 4 * (VOCABULARY * WIDTH + WIDTH)  # embedding and LM head are one tensor; the final norm


@pytest.fixture(scope="module")
def compute() -> Iterator[Compute]:
    compute = Compute()
    yield compute
    compute.stop()


@pytest.fixture(scope="module")
def checkpoint(smollm2: Path) -> Checkpoint:
    return Checkpoint.open(str(smollm2))


def model_of(checkpoint: Checkpoint, ledger: Ledger) -> NodeModel:
    return NodeModel(checkpoint, Span(0, 1), torch.float32, CPU, ledger)


async def test_weights_and_logits_are_charged_until_they_are_given_up(checkpoint: Checkpoint, compute: Compute) -> None:
    ledger = Ledger(1 << 40)
    lead = LeadHead(model_of(checkpoint, ledger), ledger, compute)
    weights, activations = ledger.used_by("weights"), ledger.used_by("activations")
    head, _ = await lead.get()
    held = {tensor.data_ptr(): tensor.nbytes for tensor in head.model.parameters()}
    assert ledger.used_by("weights") - weights == sum(held.values()) == HEAD_BYTES
    assert ledger.used_by("activations") - activations == logits_bytes(head.vocabulary, CPU)
    assert (await lead.get())[0] is head
    await lead.get("bfloat16")
    copied = 2 * VOCABULARY * WIDTH
    assert ledger.used_by("activations") - activations == logits_bytes(head.vocabulary, CPU) + copied
    lead.rest()
    assert ledger.used_by("weights") - weights == HEAD_BYTES
    assert ledger.used_by("activations") == activations
    lead.give_up()
    assert ledger.used_by("weights") == weights
    assert (await lead.get())[0] is not head


@pytest.mark.parametrize("room", [HEAD_BYTES - 1, HEAD_BYTES + 2**20])
async def test_a_node_without_room_for_the_head_says_what_to_change(
    checkpoint: Checkpoint, compute: Compute, room: int
) -> None:
    ledger = Ledger(1 << 40)
    model = model_of(checkpoint, ledger)
    used = ledger.used_bytes
    ledger.budget_bytes = used + room
    with pytest.raises(OutOfMemory, match=r"cannot lead .* blocks 0:1, .*LM head \(108 MiB\)") as caught:
        await LeadHead(model, ledger, compute).get()
    assert "--blocks" in caught.value.fix
    assert ledger.used_bytes == used, "nothing is held by a head that was not loaded"


def test_rows_at_once_fit_the_workspace() -> None:
    # A CPU keeps its 64 rows, so its sums are added up in the order they always were.
    assert [rows_at_once(v, CPU) for v in (64, VOCABULARY, 262_144)] == [64, 64, 64]
    assert rows_at_once(64, CUDA) == 4096
    for vocabulary in (VOCABULARY, 151_936, 262_144):
        assert 64 <= rows_at_once(vocabulary, CUDA) < 4096
        assert logits_bytes(vocabulary, CUDA) <= LOGITS_BYTES


async def test_the_loss_takes_no_more_than_its_workspace_at_once(checkpoint: Checkpoint, compute: Compute) -> None:
    head, _ = await LeadHead(model_of(checkpoint, ledger := Ledger(1 << 40)), ledger, compute).get()
    widest = 0
    logits = head.logits

    def noted(hidden: torch.Tensor, between: Callable[[], None]) -> torch.Tensor:
        nonlocal widest
        found = logits(hidden, between)
        widest = max(widest, found.numel() * 4)
        return found

    head.logits = noted  # type: ignore[method-assign]
    hidden = torch.randn(1, 200, head.width)
    label_loss(head, hidden, torch.randint(0, VOCABULARY, (1, 200)))
    assert 0 < 3 * widest <= logits_bytes(VOCABULARY, CPU)
