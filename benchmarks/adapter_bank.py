"""What do different adapters in one batch cost, within the blocks?

All blocks of SmolLM2-135M in float32 in this process, with LoRA (r 8 on every linear layer) in the
bank, take decode steps of some rows after a prefill: without adapters, all rows on one adapter, every
row on its own, and every row on its own with the rows in another order each step, as when
sessions come and go. The four take turns within the same second; the ratios are medians over the
rounds. Head, network and scheduling are left out: `benchmarks.adapters` measures those.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Annotated

import numpy as np
import torch
import typer

from benchmarks.provenance import provenance, publish, spread
from swarm.adapters.bank import BASE, AdapterBank
from swarm.adapters.registry import ModelAdapters
from swarm.config import LoraMethod
from swarm.ids import Span
from swarm.model.checkpoint import Checkpoint
from swarm.model.shard import Shard, View, n_blocks
from swarm.samples import smollm2_folder


def main(
    rows: Annotated[int, typer.Option(min=2)] = 8,
    steps: Annotated[int, typer.Option(min=2, help="Decode steps a round and way.")] = 4,
    rounds: Annotated[int, typer.Option(min=2)] = 8,
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 1,
    json_to: Annotated[str, typer.Option("--json", help="Write the result to this file; -: to stdout.")] = "",
    save: Annotated[bool, typer.Option("--save", help="Keep the result in benchmarks/results.")] = False,
) -> None:
    """Time decode steps with and without adapters of their own for each row."""
    origin = provenance(threads)
    torch.set_num_threads(threads)
    checkpoint = Checkpoint.open(str(smollm2_folder()))
    span = Span(0, n_blocks(checkpoint.config))
    view = Shard(checkpoint, span, torch.float32, torch.device("cpu")).view()
    bank, ids = AdapterBank(view), [bytes([row + 1]) * 32 for row in range(rows)]
    adapters, method = ModelAdapters(checkpoint), LoraMethod(r=8)
    for seed, adapter_id in enumerate(ids):
        draw = np.random.default_rng(seed)
        values = {key: draw.normal(0, 0.01, shape).astype("f4") for key, shape in adapters.shapes(method).items()}
        bank.add(adapter_id, method, values)
    turned = [ids[step % rows :] + ids[: step % rows] for step in range(steps)]
    ways = {"base": [[BASE] * rows], "one": [ids[:1] * rows], "mixed": [ids], "changing": turned}
    taken: dict[str, list[float]] = {way: [] for way in ways}
    width = int(checkpoint.config.hidden_size)
    for _ in range(rounds + 1):
        for way, orders in ways.items():
            taken[way].append(_round(view, bank, orders, torch.randn(rows, 1, width), steps))
    times = {way: values[1:] for way, values in taken.items()}  # the first round warms up
    result: dict[str, object] = {
        f"{way}_ratio": round(median(one / other for one, other in zip(times["one"], times[way], strict=True)), 3)
        for way in ("base", "mixed", "changing")
    }
    result |= {f"{way}_step_ms": spread([value * 1000 for value in values], 2) for way, values in times.items()}
    publish("adapter_bank", {**result, "rows": rows, "adapter_bytes": bank.nbytes // rows}, origin, json_to, save)


def _round(view: View, bank: AdapterBank, orders: list[list[bytes]], hidden_B1D: torch.Tensor, steps: int) -> float:
    """Seconds a step takes, over a cache of 8 tokens."""
    cache = view.new_cache()
    with torch.inference_mode():
        view.forward(hidden_B1D.repeat(1, 8, 1), 0, cache)
        start = time.perf_counter()
        for step in range(steps):
            with bank.rows(orders[step % len(orders)]):
                view.forward(hidden_B1D, 8 + step, cache)
        return (time.perf_counter() - start) / steps


if __name__ == "__main__":
    typer.run(main)
