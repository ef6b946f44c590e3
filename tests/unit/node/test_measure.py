from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from node.measure import measure_speed
from swarm.ids import Span
from swarm.model.checkpoint import Checkpoint
from swarm.model.shard import Shard, View


class Timed:
    """A real view on a clock of its own: a call takes 10 ms and 1 ms for each token of each row."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.span = view.span
        self.new_cache = view.new_cache
        self.now_s = 0.0

    def forward(self, hidden_BTD: torch.Tensor, position: int, cache: Any) -> torch.Tensor:
        self.now_s += 0.01 + 0.001 * hidden_BTD.shape[0] * hidden_BTD.shape[1]
        return self.view.forward(hidden_BTD, position, cache)


@pytest.mark.parametrize(("budget_s", "tokens"), [(0.2, 16), (30.0, 128)])
def test_a_node_times_its_own_blocks(tmp_path: Path, budget_s: float, tokens: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    cpu = torch.device("cpu")
    view = Timed(Shard(Checkpoint.open(str(tmp_path)), Span(1, 4), torch.float32, cpu).view())
    speed = measure_speed(view, 32, torch.float32, cpu, budget_s, clock=lambda: view.now_s)  # type: ignore[arg-type]
    assert speed.decode_s_per_block == pytest.approx(0.011 / 3)
    assert speed.decode8_s_per_block == pytest.approx(0.018 / 3)
    # A short budget makes for a short chunk.
    assert speed.prefill_tokens_per_s == pytest.approx(tokens / (0.01 + 0.001 * tokens))
    assert speed.rows8
