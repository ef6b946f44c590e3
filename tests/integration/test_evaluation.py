"""Held-out evaluation over a real pipeline: the loss is the model's own, and the job shows it."""

from __future__ import annotations

from pathlib import Path

from swarm.samples import write_sentiment_jsonl
from tests.integration.processes import swarm_of
from tests.integration.test_crashes import wait_finished

JOB = """
name: scored
data: {train: train.jsonl}
eval: {data: heldout.jsonl, samples: 6}
early_stopping: {patience: 5}
schedule: {rounds: 2, inner_steps: 1, batch_size: 4}
activations: float32
inner: {lr: 1.0e-12}
"""


def test_two_nodes_score_what_one_process_does(smollm2: Path, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    write_sentiment_jsonl(folder / "train.jsonl", "train", 20)
    write_sentiment_jsonl(folder / "heldout.jsonl", "held_out", 6)
    (folder / "job.yaml").write_text(JOB)
    nodes = {"first": "0:15", "second": "15:30"}
    with swarm_of(tmp_path / "swarm", smollm2, nodes, coordinator=True) as swarm:
        swarm.run_json("job", "submit", str(folder / "job.yaml"))
        status = wait_finished(swarm, "scored")
    # The adapters hardly move: what was scored is the base model, which one process can score too.
    expected = whole_model_loss(smollm2, folder / "heldout.jsonl")
    losses = [entry["eval_loss"] for entry in status["history"]]
    assert len(losses) == 2
    assert all(abs(loss - expected) < 1e-3 for loss in losses), (losses, expected)
    assert status["best_round"] in (1, 2)


def whole_model_loss(model_folder: Path, data: Path) -> float:
    """Mean cross-entropy over the labelled tokens of a chat file, by `transformers` alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from swarm.data.batch import collate
    from swarm.data.chat import encode_sample
    from swarm.data.dataset import load_chat_file

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    batch = collate([encode_sample(tokenizer, sample, 512) for sample in load_chat_file(data).samples], 0)
    with torch.inference_mode():
        return float(model(input_ids=batch.input_ids_BT, labels=batch.labels_BT).loss)


TEXT_JOB = """
name: prose
data: {train: train.txt}
schedule: {rounds: 1, inner_steps: 2, batch_size: 2, max_length: 32}
"""


def test_plain_text_trains_with_every_position_labelled(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("The swarm trains on plain text, piece by piece. " * 40, encoding="utf-8")
    (tmp_path / "job.yaml").write_text(TEXT_JOB)
    with swarm_of(tmp_path / "swarm", smollm2, {"whole": "0:30"}, coordinator=True) as swarm:
        swarm.run_json("job", "submit", str(tmp_path / "job.yaml"))
        status = wait_finished(swarm, "prose")
    (entry,) = status["history"]
    # Four pieces of 32 tokens.
    assert entry["tokens"] == 4 * 32
    assert 0 < entry["loss"] < 10
