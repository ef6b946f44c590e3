from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from node.measure import free_bytes, measure_speed
from swarm.ids import Span
from swarm.model.checkpoint import Checkpoint
from swarm.model.shard import Shard


def test_a_node_times_its_own_blocks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    cpu = torch.device("cpu")
    shard = Shard(Checkpoint.open(str(tmp_path)), Span(1, 4), torch.float32, cpu)
    speed = measure_speed(shard.view(), 32, torch.float32, cpu, budget_s=0.2)
    assert 0 < speed.decode_s_per_block < 1
    assert speed.decode_s_per_block < 8 * speed.decode8_s_per_block
    # A prefilled token costs far less than a decoded one.
    assert speed.prefill_tokens_per_s > 1 / (speed.decode_s_per_block * 3)
    assert speed.rows8


def test_free_memory_of_the_machine() -> None:
    assert 2**20 < free_bytes(torch.device("cpu")) < 2**50
