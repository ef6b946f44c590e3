"""Under autocast a batch that waits for its gradient keeps no copy of frozen weights; gradients are the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import node.stage
from benchmarks.families_configs import variants
from swarm.ids import Span
from swarm.model.cast_again import kept_cast_bytes
from swarm.model.checkpoint import Checkpoint
from swarm.model.families import n_blocks
from tests.unit.node.pipelines import Part, spec_of, start_values

SPEC = spec_of(precision="bfloat16")
SPAN = Span(3, 6)


class Pass:
    """One forward and backward pass, and what it kept in between."""

    def __init__(self, part: Part, span: Span, hidden_BTD: torch.Tensor) -> None:
        part.stage.reset(start_values(part, SPEC, span))
        storages = {t.untyped_storage().data_ptr() for t in part.model.shard.frozen.values()}
        sizes = {tuple(t.shape) for t in part.model.shard.frozen.values() if t.dim() > 1}
        sizes |= {shape[::-1] for shape in sizes}
        self.copies: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            at = tensor.untyped_storage().data_ptr()
            if at not in storages and tuple(tensor.shape) in sizes:
                self.copies[at] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.output = part.stage.forward(1, hidden_BTD, input_grad=True)
        self.of_input = part.stage.backward(1, torch.randn(self.output.shape, generator=torch.manual_seed(2)))
        self.gradients = part.gradients()
        self.scored = part.stage.score(hidden_BTD)
        part.compute.stop()


def test_no_copy_is_kept_and_no_bit_changes(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = torch.randn(2, 37, 576, generator=torch.manual_seed(1))
    found = Pass(part := Part(smollm2, SPAN, SPEC), SPAN, hidden)
    monkeypatch.setattr(node.stage, "cast_again", lambda _: None)
    plain = Pass(Part(smollm2, SPAN, SPEC), SPAN, hidden)
    matrices = sum(tensor.numel() for tensor in part.model.shard.frozen.values() if tensor.dim() > 1)
    assert sum(plain.copies.values()) >= 2 * matrices, "what torch keeps by itself"
    assert not found.copies
    assert torch.equal(found.output, plain.output)
    assert torch.equal(found.scored, plain.output)
    assert found.of_input is not None
    assert plain.of_input is not None
    assert torch.equal(found.of_input, plain.of_input)
    assert found.gradients.keys() == plain.gradients.keys()
    assert all(torch.equal(found.gradients[key], plain.gradients[key]) for key in found.gradients)


def test_layers_of_other_classes_are_charged(tmp_path: Path) -> None:
    """GPT-2 multiplies by transposed matrices of a class of its own."""
    AutoModelForCausalLM.from_config(variants("gpt2")[0], dtype=torch.float32).save_pretrained(tmp_path)
    span = Span(0, n_blocks(Checkpoint.open(str(tmp_path)).config))
    charged = []
    for precision in ("auto", "bfloat16"):
        part = Part(tmp_path, span, spec_of(precision=precision))
        before = part.ledger.used_by("activations")
        part.stage.admit(1, (2, 5, part.model.width))
        charged.append(part.ledger.used_by("activations") - before)
        part.compute.stop()
    matrices = sum(tensor.numel() for tensor in part.model.shard.frozen.values() if tensor.dim() > 1)
    assert charged[1] - charged[0] == kept_cast_bytes(part.stage._view.blocks, torch.bfloat16) == 2 * matrices
