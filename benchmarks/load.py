"""Many users, little memory: 64 clients in one process against two nodes whose KV fits 16 of them.

Every client opens a session, generates, closes it and starts over, for two minutes. `errors` counts
anything but a typed admission answer (Busy). `over_budget_bytes` is by how much a node's charges (weights,
caches, a chunk's activations, what it keeps to resend) ever exceeded its budget; that caches take what is
charged for them is measured by `benchmarks.families`. `grown_bytes` is by how much each process really grew
after a first text, `room_bytes` what the budget leaves it beside the weights; the rest is the interpreter's own.
`interrupted` counts chains that were changed under way although nothing failed: false alarms. Times to
the first token include waiting for admission; `tpot` is the time per further token.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import quantiles
from typing import Annotated, Any

import psutil
import torch
import typer
import uvloop

from benchmarks.processes import start_swarm
from benchmarks.provenance import provenance, publish
from benchmarks.texts import token_rows
from node.serving import span_bytes, workspace_bytes
from swarm.errors import Busy
from swarm.ids import Span
from swarm.logs import configure
from swarm.model.checkpoint import Checkpoint
from swarm.model.kvsize import cache_bytes
from swarm.samples import smollm2_folder

SPANS = ("0:15", "15:30")
_FIT = 16


def main(
    clients: Annotated[int, typer.Option(min=1)] = 64,
    seconds: Annotated[float, typer.Option(min=5)] = 120.0,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt, at most.")] = 48,
    tokens: Annotated[int, typer.Option(min=2, help="New tokens of a text, at most.")] = 32,
    json_to: Annotated[str, typer.Option("--json", help="Write the result to this file; -: to stdout.")] = "",
    save: Annotated[bool, typer.Option("--save", help="Keep the result in benchmarks/results.")] = False,
    name: Annotated[str, typer.Option(help="What to keep the result as.")] = "load",
) -> None:
    """Load two small nodes with many clients."""
    configure("error", role="client")
    torch.set_num_threads(1)
    origin = provenance(1)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="swarm-load-")))
        budget = _budget(prompt + tokens)
        join, nodes = start_swarm(stack, folder, smollm2_folder(), SPANS, 1, ("--vram", str(budget)))
        memory = _Memory([node.pid for node in nodes])
        result = uvloop.run(_load(join, folder, clients, seconds, prompt, tokens, memory))
        for node in nodes:
            node.stop()
        served = [node.logged("served") for node in nodes]
    result |= {
        "over_budget_bytes": max(0, *(int(one["most_used_bytes"]) - budget for one in served)),
        "mean_batch": [round(one["steps"] / max(1, one["batches"]), 2) for one in served],
        "room_bytes": budget - _weights(),
        "grown_bytes": memory.grown(),
    }
    publish(name, result, origin, json_to, save)
    if result["errors"] or result["over_budget_bytes"] or result["interrupted"]:
        raise typer.Exit(1)


class _Memory:
    """Resident memory of processes: from `start` on, how much it grew at most."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._processes = [psutil.Process(pid) for pid in pids]
        self._base: list[int] = []
        self._most: list[int] = []

    def start(self) -> None:
        self._base = self._most = self._now()

    def sample(self) -> None:
        self._most = [max(pair) for pair in zip(self._most, self._now(), strict=True)]

    def grown(self) -> list[int]:
        return [most - base for most, base in zip(self._most, self._base, strict=True)]

    def _now(self) -> list[int]:
        return [process.memory_info().rss for process in self._processes]


def _weights() -> int:
    checkpoint = Checkpoint.open(str(smollm2_folder()))
    return max(span_bytes(checkpoint, Span.parse(text, 30), torch.float32) for text in SPANS)


def _budget(columns: int) -> int:
    """What a node needs for its weights, a chunk's activations and the KV caches of `_FIT` sessions."""
    checkpoint = Checkpoint.open(str(smollm2_folder()))
    spans = [Span.parse(text, 30) for text in SPANS]
    kv = max(cache_bytes(checkpoint.config, span, torch.float32, columns) for span in spans)
    return _weights() + workspace_bytes(checkpoint.config, torch.float32) + _FIT * kv


async def _load(
    join: str, folder: Path, count: int, seconds: float, prompt: int, tokens: int, memory: _Memory
) -> dict[str, Any]:
    from swarm.client.sampling import Sampling
    from swarm.client.swarm import SwarmClient
    from swarm.net.join import parse_join

    ttft_s: list[float] = []
    tpot_s: list[float] = []
    outcomes: Counter[str] = Counter()
    rows = token_rows(count * prompt, prompt)
    checkpoint = Checkpoint.open(str(smollm2_folder()))
    async with SwarmClient(parse_join(join), checkpoint, folder / "client.key", admission_s=30.0) as client:
        _ = client.heads
        first = await client.session()
        async for _ in first.generate(rows[0], tokens, Sampling()):
            pass
        await first.close()
        memory.start()
        until = time.monotonic() + seconds

        async def one(number: int) -> None:
            chance = random.Random(number)
            while time.monotonic() < until:
                ids = rows[number][: chance.randint(prompt // 2, prompt)]
                began = last = time.monotonic()
                session = await client.session()
                try:
                    seen = 0
                    async for _ in session.generate(ids, chance.randint(tokens // 2, tokens), Sampling()):
                        last = time.monotonic()
                        if not seen:
                            ttft_s.append(last - began)
                            began = last
                        seen += 1
                    if seen > 1:
                        tpot_s.append((last - began) / (seen - 1))
                    outcomes["texts"] += 1
                    outcomes["tokens"] += seen
                except Busy:
                    outcomes["busy"] += 1
                except Exception as error:
                    outcomes["errors"] += 1
                    outcomes[f"error: {error}"[:200]] += 1
                finally:
                    outcomes["interrupted"] += session.rebuilt - session.preempted
                    outcomes["preempted"] += session.preempted
                    await session.close()

        async def watch() -> None:
            while time.monotonic() < until:
                memory.sample()
                await asyncio.sleep(0.25)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(watch())
            for number in range(count):
                tasks.create_task(one(number))
    return {
        "errors": outcomes["errors"],
        "ttft_p50_s": _percentile(ttft_s, 50),
        "ttft_p95_s": _percentile(ttft_s, 95),
        "tpot_p50_s": _percentile(tpot_s, 50),
        "tpot_p95_s": _percentile(tpot_s, 95),
        "tok_s": round(outcomes["tokens"] / seconds, 2),
        "texts": outcomes["texts"],
        "busy": outcomes["busy"],
        "interrupted": outcomes["interrupted"],
        "preempted": outcomes["preempted"],
        "clients": count,
        "seconds": seconds,
        "fit": _FIT,
        "reasons": {key: value for key, value in outcomes.items() if key.startswith("error:")},
    }


def _percentile(values: list[float], rank: int) -> float | None:
    return round(quantiles(values, n=100, method="inclusive")[rank - 1], 3) if len(values) > 1 else None


if __name__ == "__main__":
    typer.run(main)
