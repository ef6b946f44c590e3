"""The demo, shortened: every figure it promises, and the same ones from plain `transformers` + `peft`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from swarm.client.score import Question, score
from swarm.samples import movie_sentences, review_chat
from tests.integration.processes import run_swarm

CHOICES = ("positive", "negative")
PROMISED = {
    "eval_loss_before",
    "eval_loss_after",
    "accuracy_before",
    "accuracy_after",
    "rounds",
    "inner_steps",
    "contribution_bytes",
    "downlink_bytes",
    "activation_bytes",
    "ddp_bf16_bytes",
    "saving",
    "train_tokens_per_s",
    "generate_tokens_per_s",
    "sample",
}


async def test_the_summary_is_complete_and_peft_gives_the_same_numbers(smollm2: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    result = run_swarm(
        "demo", "--out", str(out), "--rounds", "2", "--inner-steps", "2", "--held-out", "16", timeout_s=400
    )
    assert result.returncode == 0, result.stderr + result.stdout
    summary = json.loads((out / "summary.json").read_text())
    assert summary.keys() >= PROMISED
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    assert summary["ddp_bf16_bytes"] == 2 * 4 * summary["trainable_parameters"] * 2
    assert summary["saving"] == pytest.approx(summary["ddp_bf16_bytes"] / summary["contribution_bytes"], abs=0.1)
    assert summary["activation_bytes"] > 0
    # Every node and every round at one bit a parameter or a little less (bits are entropy coded).
    parameters = summary["trainable_parameters"]
    assert 0.8 <= summary["contribution_bytes"] * 8 / (parameters * 2 * 2) <= 1.1

    questions = [
        Question(tuple(review_chat(sample.text)), CHOICES, CHOICES.index(sample.label))
        for sample in movie_sentences("held_out", 16)
    ]
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = PeftModel.from_pretrained(base, out / "adapter").get_base_model()

    async def hidden_states(ids_BT: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return model.model(ids_BT).last_hidden_state

    # The demo's activations cross the links as bfloat16, hence the tolerance.
    local = await score(questions, tokenizer, lambda hidden: model.lm_head(hidden), [hidden_states])
    assert summary["eval_loss_after"] == pytest.approx(local.loss, rel=0.01)
    assert summary["accuracy_after"] == pytest.approx(local.accuracy, abs=1 / 16)
