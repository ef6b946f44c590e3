"""How long is an inner step of the swarm, against one of plain PEFT on the same cores?

LoRA r 8 on all linear layers of SmolLM2-135M, batches of 8 film reviews, float32, AdamW. `ratio_time`
is the time of a node that holds every block over that of `get_peft_model` + `loss.backward()` +
`optimizer.step()` as anyone writes it; `pipeline_ratio_time` is that of two nodes with half of the
blocks each, in two processes that speak over real libp2p. The three take turns, in another order
every round, with the same batches; ratios are medians over the rounds of neighbours in time.
Below 1 the swarm is faster.

The warm-up round sends the pipeline's activations as float32: there, and alone always, the losses of the
swarm must be the local ones up to rounding, and the exit status is 1 if they are not. The rounds
that count send them as jobs do unless told (`--activations`); `loss_gap` is the largest relative
difference of a step's loss from the local one, so for the pipeline what the encoding does to training.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.processes import Side, cpu_seconds, sent_bytes
from benchmarks.provenance import provenance, publish, spread

WAYS = ("local", "alone", "pipeline")
ROUNDING = 1e-4
"""Relative difference of two losses that were summed in another order."""


def main(
    rounds: Annotated[int, typer.Option(min=2)] = 6,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps a round and side.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Of torch, in every process.")] = 1,
    activations: Annotated[str, typer.Option(help="How they cross the pipeline's link.")] = "int8",
    json_to: Annotated[str, typer.Option("--json", help="Write the result to this file; -: to stdout.")] = "",
    save: Annotated[bool, typer.Option("--save", help="Keep the result in benchmarks/results.")] = False,
) -> None:
    """Train with the swarm and with plain PEFT in turn, and compare."""
    origin = provenance(threads)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="swarm-train-")))

        def start(side: str, environment: dict[str, str], *more: str) -> Side:
            return Side(stack, side, ["benchmarks.train_sides", side, str(threads), *more], folder, environment)

        passive = {"OMP_WAIT_POLICY": "PASSIVE"}
        local, alone, stage = start("local", {}), start("alone", passive), start("stage", passive, str(folder))
        lead = start("lead", passive, str(folder), json.dumps(stage.hear()))
        for side in (local, alone, lead):
            side.hear()
        result = _measure({"local": [local], "alone": [alone], "pipeline": [lead, stage]}, rounds, steps, activations)
    publish("train_step", result, origin, json_to, save)
    if not result["losses_agree"]:
        raise typer.Exit(1)


def _measure(sides: dict[str, list[Side]], rounds: int, steps: int, activations: str) -> dict[str, object]:
    """Let each way's first side train, round by round; all of a way's sides count as its cost."""
    families = {way: [process for side in members for process in side.family()] for way, members in sides.items()}
    step_s: dict[str, list[float]] = {way: [] for way in WAYS}
    cpu_s: dict[str, list[float]] = {way: [] for way in WAYS}
    losses: dict[str, list[float]] = {way: [] for way in WAYS}
    tokens, link_bytes = 0, 0
    for turn in range(rounds + 1):
        for place in range(len(WAYS)):
            way = WAYS[(turn + place) % len(WAYS)]
            cpu_before, sent_before = cpu_seconds(families[way]), sent_bytes(families[way])
            encoding = activations if turn else "float32"
            reply = sides[way][0].ask({"first": turn * steps, "steps": steps, "activations": encoding})
            losses[way] += reply["losses"]
            if turn == 0:
                continue  # warm-up
            step_s[way].append(float(reply["seconds"]) / steps)
            cpu_s[way].append((cpu_seconds(families[way]) - cpu_before) / steps)
            if way == "pipeline":
                tokens += int(reply["tokens"])
                link_bytes += (sent_bytes(families[way]) or 0) - (sent_before or 0)
    ratios = {
        way: spread([mine / plain for mine, plain in zip(step_s[way], step_s["local"], strict=True)])
        for way in WAYS[1:]
    }
    cpu_ratios = {
        way: spread([mine / plain for mine, plain in zip(cpu_s[way], cpu_s["local"], strict=True)]) for way in WAYS[1:]
    }
    gaps = {
        way: [abs(mine / plain - 1) for mine, plain in zip(losses[way], losses["local"], strict=True)]
        for way in WAYS[1:]
    }
    return {
        "ratio_time": ratios["alone"].median,
        "pipeline_ratio_time": ratios["pipeline"].median,
        "losses_agree": max(gaps["alone"] + gaps["pipeline"][:steps]) <= ROUNDING,
        "activations": activations,
        "loss_gap": {way: float(f"{max(gap[steps:]):.2g}") for way, gap in gaps.items()},
        "last_loss": {way: round(losses[way][-1], 5) for way in WAYS},
        "ratio_spread": ratios["alone"],
        "pipeline_ratio_spread": ratios["pipeline"],
        "local_step_s": spread(step_s["local"]),
        "swarm_step_s": spread(step_s["alone"]),
        "pipeline_step_s": spread(step_s["pipeline"]),
        "cpu_ratio": cpu_ratios["alone"].median,
        "pipeline_cpu_ratio": cpu_ratios["pipeline"].median,
        "pipeline_bytes_per_token": round(link_bytes / tokens, 1) if link_bytes else None,
        "tokens_per_step": round(tokens / (rounds * steps), 1),
        "rounds": rounds,
        "steps": steps,
    }


if __name__ == "__main__":
    typer.run(main)
