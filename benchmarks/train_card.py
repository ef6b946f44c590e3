"""How fast does a GPU train a shard of a 7B model, in how much memory, against plain PEFT on the same card?

Blocks at the shapes of Mistral-7B with random weights, embedding and LM head (32,000 words) beside them; LoRA r 8 on
all linear layers, AdamW, a batch of random tokens, every position labelled. PEFT holds the weights in bfloat16 and
computes as anyone writes it; ours is what a node alone does: in bfloat16, and over weights held in 8 and 4 bits.
`whole` takes the batch in one piece, the others in as many microbatches as a job has by default. All take turns, in
another order every round, on the same batch; ratios are medians over the rounds of neighbours in time.

    *_ratio    tokens a second over PEFT's
    step_gib   the most memory that a step takes above what the models take
    of_floor   what the products would take at this card's best rate (`tflops`: one product of 8192 x 8192 in bfloat16),
               forward and for the inputs' gradients, over what the step took
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated

import peft
import torch
import typer
from transformers import AutoModelForCausalLM, MistralConfig

from benchmarks.provenance import card_name, provenance, publish, spread
from node.lead import microbatches
from node.main import pick_device
from node.memory import Ledger
from node.serving import NodeModel
from node.stage import AdapterStage
from node.step import StepDriver
from swarm.compute import Compute, settle
from swarm.config import JobSpec
from swarm.data.batch import Batch, collate
from swarm.data.chat import EncodedSample
from swarm.data.microbatch import split_batch
from swarm.ids import Span
from swarm.logs import configure
from swarm.model.checkpoint import Checkpoint
from swarm.model.quantize import Scheme
from swarm.model.shard import Head

_WORDS, _WIDTH, _INNER, _HEADS, _KV_HEADS = 32_000, 4096, 14_336, 32, 8
_KV_WIDTH = _WIDTH * _KV_HEADS // _HEADS
_BLOCK_WEIGHTS = 2 * _WIDTH * _WIDTH + 2 * _WIDTH * _KV_WIDTH + 3 * _WIDTH * _INNER
_LR = 1e-3
_RATE_SIZE = 8192
Step = Callable[[], float]
"""One optimizer step; returns its loss."""


def main(
    rounds: Annotated[int, typer.Option(min=2)] = 6,
    blocks: Annotated[int, typer.Option(min=1)] = 4,
    rows: Annotated[int, typer.Option(min=1)] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="Of a row.")] = 1024,
    device: Annotated[str, typer.Option()] = "cuda",
    json_to: Annotated[str, typer.Option("--json", help="Write the result to this file; -: to stdout.")] = "",
    save: Annotated[bool, typer.Option("--save", help="Keep the result in benchmarks/results.")] = False,
) -> None:
    """Train with plain PEFT and with a node's own code in turn, and compare."""
    configure("warning", role="benchmark")  # stdout belongs to the result
    where = pick_device(device)
    origin = provenance(torch.get_num_threads(), card_name(where))
    with tempfile.TemporaryDirectory(prefix="swarm-card-") as folder:
        _write_model(Path(folder), blocks, where)
        batch = _batch(rows, tokens)
        steps: dict[str, Step] = {"peft": _peft(Path(folder), batch, where)}
        steps["whole"] = _ours(Path(folder), batch, where, "none", parts=1)
        for name, scheme in _SCHEMES.items():
            steps[name] = _ours(Path(folder), batch, where, scheme)
        times, peaks, losses = _measure(steps, rounds, where)
    rate = _product_rate(where)
    floor_s = 4 * rows * tokens * (blocks * _BLOCK_WEIGHTS + _WORDS * _WIDTH) / rate
    ours = [name for name in steps if name != "peft"]
    ratios = {name: spread([a / b for a, b in zip(times["peft"], times[name], strict=True)]) for name in ours}
    result = {
        **{f"{name}_ratio": ratio.median for name, ratio in ratios.items()},
        "ratios": ratios,
        "step_gib": peaks,
        "step_s": {name: spread(of) for name, of in times.items()},
        "tokens_per_s": {name: round(rows * tokens / median(of)) for name, of in times.items()},
        "of_floor": {name: round(floor_s / median(of), 3) for name, of in times.items()},
        "floor_s": round(floor_s, 4),
        "tflops": round(rate / 1e12),
        "first_and_last_loss": losses,
        "blocks": blocks,
        "rows": rows,
        "tokens": tokens,
    }
    publish("train_card", result, origin, json_to, save)


_SCHEMES: dict[str, Scheme] = {"bfloat16": "none", "int8": "int8", "int4": "int4"}


def _measure(
    steps: dict[str, Step], rounds: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, float], dict[str, list[float]]]:
    """Seconds by way and round, the most memory of a step by way in GiB, and each way's first and last loss."""
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    losses: dict[str, list[float]] = {name: [] for name in names}
    peaks = dict.fromkeys(names, 0.0)
    for turn in range(-1, rounds):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            settle(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            resting, began = _allocated(device), time.perf_counter()
            loss = steps[name]()
            settle(device)
            took_s = time.perf_counter() - began
            losses[name].append(round(loss, 4))
            if turn < 0:  # warms up
                continue
            times[name].append(took_s)
            if device.type == "cuda":
                peak = (torch.cuda.max_memory_allocated(device) - resting) / 2**30
                peaks[name] = max(peaks[name], round(peak, 2))
    return times, peaks, {name: [of[0], of[-1]] for name, of in losses.items()}


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _write_model(folder: Path, blocks: int, device: torch.device) -> None:
    config = MistralConfig(
        num_hidden_layers=blocks,
        vocab_size=_WORDS,
        hidden_size=_WIDTH,
        intermediate_size=_INNER,
        num_attention_heads=_HEADS,
        num_key_value_heads=_KV_HEADS,
        sliding_window=None,
    )
    torch.manual_seed(0)
    with device:
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def _batch(rows: int, tokens: int) -> Batch:
    ids_BT = torch.randint(0, _WORDS, (rows, tokens), generator=torch.Generator().manual_seed(1)).tolist()
    return collate([EncodedSample(tuple(row), tuple(row), 0) for row in ids_BT], 0)


def _peft(folder: Path, batch: Batch, device: torch.device) -> Step:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    model = peft.get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=_LR)

    def step() -> float:
        ids_BT = batch.input_ids_BT.to(device)
        output = model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), labels=ids_BT)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(output.loss.detach())

    return step


def _ours(folder: Path, batch: Batch, device: torch.device, scheme: Scheme, parts: int = 0) -> Step:
    """`parts`: microbatches; 0: as many as a job has by default."""
    checkpoint, ledger, rows = Checkpoint.open(str(folder)), Ledger(2**62), len(batch.lengths)
    spec = JobSpec.model_validate({"name": "card", "data": {"train": "-"}, "schedule": {"batch_size": rows}})
    whole = Span(0, checkpoint.n_blocks)
    model = NodeModel(checkpoint, whole, torch.bfloat16, device, ledger, scheme)
    stage = AdapterStage(model, whole, spec, ledger, "card")
    stage.reset(model.adapters.initial_span(spec.method, 0, whole))
    head = Head(checkpoint, torch.bfloat16, device)
    driver = StepDriver(head, stage, Compute(), None)
    count = parts or microbatches(spec.schedule, 1, batch.lengths, device)

    def step() -> float:
        return asyncio.run(driver.step(split_batch(batch, count), _LR)).loss

    return step


def _product_rate(device: torch.device) -> float:
    """Operations a second of a large product in bfloat16: the best of a few."""
    one, other = (torch.randn(_RATE_SIZE, _RATE_SIZE, device=device, dtype=torch.bfloat16) for _ in range(2))
    best_s = float("inf")
    for _ in range(8):
        settle(device)
        began = time.perf_counter()
        one @ other
        settle(device)
        best_s = min(best_s, time.perf_counter() - began)
    return float(2 * _RATE_SIZE**3 / best_s)


if __name__ == "__main__":
    typer.run(main)
