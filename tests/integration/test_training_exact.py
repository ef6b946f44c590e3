"""With H = 1, plain averaging and nothing compressed, a job is a local PEFT + AdamW run.

One pipeline of one node and one of two nodes, both as real jobs: coordinator, leases, rounds,
sockets. Afterwards the coordinator is stopped and the adapter is prompted from the nodes alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from swarm.adapters.registry import ModelAdapters
from swarm.client.swarm import SwarmClient
from swarm.config import LoraMethod
from swarm.data.batch import batch_positions, collate
from swarm.data.chat import encode_sample
from swarm.data.dataset import load_chat_file
from swarm.data.order import sample_index
from swarm.ids import Span, block_of
from swarm.model.checkpoint import Checkpoint
from swarm.net.join import parse_join
from swarm.optim.params import hash_all
from swarm.samples import write_sentiment_jsonl
from tests.integration.processes import Swarm, swarm_of

STEPS = 10
BATCH = 4
JOB = f"""
name: exact
method: {{kind: lora, r: 8, alpha: 16}}
data: {{train: train.jsonl}}
schedule: {{rounds: {STEPS}, inner_steps: 1, batch_size: {BATCH}, seed: 3}}
inner: {{lr: 1.0e-3, weight_decay: 0.01}}
outer: {{lr: 1.0, momentum: 0.0, nesterov: false}}
uplink: {{kind: dense}}
downlink: {{kind: dense}}
activations: float32
"""


@pytest.fixture(scope="module")
def job_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    write_sentiment_jsonl(folder / "train.jsonl", "train", 100)
    (folder / "job.yaml").write_text(JOB)
    return folder / "job.yaml"


@pytest.fixture(scope="module")
def start_adapter(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job's initial parameters as a PEFT folder: what the local run starts from."""
    adapters = ModelAdapters(Checkpoint.open(str(smollm2)))
    folder = tmp_path_factory.mktemp("start")
    for name, content in adapters.export(LoraMethod(), adapters.initial(LoraMethod(), 3), str(smollm2)).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def local_run(smollm2: Path, job_file: Path, start_adapter: Path) -> tuple[list[float], Any]:
    """Losses and model of plain PEFT + AdamW on the same batches, one thread as the nodes have."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    dataset = load_chat_file(job_file.parent / "train.jsonl")
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, start_adapter, is_trainable=True)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3, weight_decay=0.01)
    losses = []
    for step in range(STEPS):
        positions = batch_positions([(0, STEPS * BATCH)], step, BATCH)
        samples = [encode_sample(tokenizer, dataset[sample_index(p, len(dataset), 3)], 512) for p in positions]
        batch = collate(samples, tokenizer.pad_token_id)
        mask = torch.zeros_like(batch.input_ids_BT)
        for row, length in enumerate(batch.lengths):
            mask[row, :length] = 1
        loss = model(input_ids=batch.input_ids_BT, attention_mask=mask, labels=batch.labels_BT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses, model


@pytest.fixture(scope="module", params=["one-node", "two-nodes"])
def finished(
    request: pytest.FixtureRequest, smollm2: Path, job_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Swarm, dict[str, Any], Path]]:
    """A swarm that ran the job to its end, the job's status, and the exported adapter."""
    nodes = {"whole": "0:30"} if request.param == "one-node" else {"half-a": "0:15", "half-b": "15:30"}
    root = tmp_path_factory.mktemp(request.param)
    with swarm_of(root, smollm2, nodes, coordinator=True) as swarm:
        swarm.run_json("job", "submit", str(job_file))
        status = wait_for_job(swarm, "exact")
        exported = root / "adapter"
        assert swarm.run_json("job", "export", "exact", "--out", str(exported))["round"] == STEPS
        yield swarm, status, exported


def wait_for_job(swarm: Swarm, name: str, timeout_s: float = 400.0) -> dict[str, Any]:
    """Follow a job to its end through the command a person would use."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        status = swarm.run_json("job", "status", name)
        if status["state"] == "finished":
            return dict(status)
        assert status["state"] in ("waiting", "running"), status
    raise AssertionError(f"the job did not finish: {json.dumps(status)}")


def test_a_node_that_starts_from_its_own_parameters_loses_nothing(
    smollm2: Path, job_file: Path, local_run: tuple[list[float], Any], tmp_path: Path
) -> None:
    """One pipeline sends a twentieth of its delta and keeps the rest: it trains as if nothing were compressed."""
    job = JOB.replace("name: exact", "name: own").replace(f"rounds: {STEPS}", "rounds: 4")
    job = job.replace("weight_decay: 0.01", "weight_decay: 0.01, start: own").replace(
        "uplink: {kind: dense}", "uplink: {density: 0.05, bits: 2}"
    )
    own = job_file.with_name("own.yaml")
    own.write_text(job)
    with swarm_of(tmp_path, smollm2, {"whole": "0:30"}, coordinator=True) as swarm:
        swarm.run_json("job", "submit", str(own))
        status = wait_for_job(swarm, "own")
    losses = [r["loss"] for r in status["history"] if r["round"] > 0]
    assert losses == pytest.approx(local_run[0][:4], rel=1e-4)


def test_losses_and_adapter_equal_local_peft(
    finished: tuple[Swarm, dict[str, Any], Path], local_run: tuple[list[float], Any]
) -> None:
    _, status, exported = finished
    losses, model = local_run
    assert [r["loss"] for r in status["history"] if r["round"] > 0] == pytest.approx(losses, rel=1e-4)
    ours = load_file(exported / "adapter_model.safetensors")
    local = {
        name.replace(".default", ""): p.detach().numpy() for name, p in model.named_parameters() if p.requires_grad
    }
    assert ours.keys() == local.keys()
    error = np.sqrt(sum(float(np.square(ours[k] - local[k]).sum()) for k in ours))
    norm = np.sqrt(sum(float(np.square(local[k]).sum()) for k in ours))
    assert error / norm <= 1e-4
    # The start values dominate that norm, so the training itself is compared too.
    matrices = [k for k in ours if "lora_B" in k]
    moved = np.sqrt(sum(float(np.square(local[k]).sum()) for k in matrices))
    apart = np.sqrt(sum(float(np.square(ours[k] - local[k]).sum()) for k in matrices))
    assert apart / moved <= 1e-2


def test_every_node_and_the_coordinator_hold_the_same_parameters(
    finished: tuple[Swarm, dict[str, Any], Path], smollm2: Path
) -> None:
    swarm, status, exported = finished
    adapters = ModelAdapters(Checkpoint.open(str(smollm2)))
    files = {path.name: path.read_bytes() for path in exported.iterdir()}
    _, params = adapters.load(files, Span(0, 30))
    assert hash_all(params).hex() == status["history"][-1]["params_hash"]
    spans = {"whole": range(30), "half-a": range(15), "half-b": range(15, 30)}
    for process in swarm.processes:
        if process.name in spans:
            own = {k: v for k, v in params.items() if int(block_of(k)) in spans[process.name]}
            process.wait_log("settled", round=STEPS, own_hash=hash_all(own).hex(), timeout_s=30)
            rounds = [e["round"] for e in process.log_events() if e.get("event") == "settled"]
            assert rounds == list(range(1, STEPS + 1))
            assert not [e for e in process.log_events() if e.get("event") == "update_mismatch"]


async def test_the_adapter_is_served_without_the_coordinator(
    finished: tuple[Swarm, dict[str, Any], Path], smollm2: Path
) -> None:
    swarm, _, exported = finished
    for process in swarm.processes:
        if process.name not in ("bootstrap", "coordinator"):
            process.wait_log("adapter_held", name="exact")
    coordinator = next(p for p in swarm.processes if p.name == "coordinator")
    assert coordinator.stop() == 143
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, exported)
    ids_BT = torch.randint(0, 40_000, (2, 48), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        expected = model(ids_BT).logits
    async with SwarmClient(
        parse_join(swarm.join), Checkpoint.open(str(smollm2)), swarm.root / "c" / "identity.key", encoding="float32"
    ) as client:
        scorer = await client.scorer("exact")
        logits = client.head.logits(await scorer.hidden(ids_BT))
        await scorer.close()
        bare = await client.scorer()
        without = client.head.logits(await bare.hidden(ids_BT))
        await bare.close()
    assert float((logits - expected).abs().max()) <= 1e-3
    assert float((without - expected).abs().max()) > 0.1
    answer = swarm.run_json("generate", "A dull and lifeless film.", "--adapter", "exact", "--max-new-tokens", "4")
    assert answer["tokens"]
