"""How fast does the swarm train, and in how much memory, against plain PEFT with the same threads?

LoRA r 8 on all linear layers of SmolLM2-135M, batches of 8 film reviews of 60 to 120 words, every token labelled,
float32, AdamW. `single_ratio` is the tokens a second of a node that holds every block over those of
`get_peft_model` + `loss.backward()` + `optimizer.step()` as anyone writes it; `pipeline_speedup` is that of two
nodes, each with as many threads as PEFT has, in two processes that speak over real libp2p. Where the blocks are
cut follows from what a block and the head were measured to take. `memory_ratio` is the larger node's peak
memory over PEFT's, both above what their interpreter with the same imports takes. The three take turns, in
another order every round, with the same batches; ratios are medians over the rounds of neighbours in time.

The warm-up round sends the pipeline's activations as float32: there, and alone always, the losses of the
swarm must be the local ones up to rounding, and the exit status is 1 if they are not. The rounds
that count send them as jobs do unless told (`--activations`); `loss_gap` is the largest relative
difference of a step's loss from the local one, so for the pipeline what the encoding does to training.

`--labels answers` trains on the one-word answers of chats, as jobs do: the swarm then leaves all other
positions out before the LM head, which PEFT does not.
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
from benchmarks.train_sides import WHOLE
from swarm.net.split import choose_cuts

WAYS = ("local", "alone", "pipeline")
ROUNDING = 1e-4
"""Relative difference of two losses that were summed in another order."""


def main(
    rounds: Annotated[int, typer.Option(min=2)] = 6,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps a round and side.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Of torch, in every process.")] = 1,
    activations: Annotated[str, typer.Option(help="How they cross the pipeline's link.")] = "int8",
    labels: Annotated[str, typer.Option(help="all, or answers: of chats, whose prompts carry no loss.")] = "all",
    microbatches: Annotated[int, typer.Option(min=0, help="Of the pipeline; 0: as a job has by default.")] = 0,
    json_to: Annotated[str, typer.Option("--json", help="Write the result to this file; -: to stdout.")] = "",
    save: Annotated[bool, typer.Option("--save", help="Keep the result in benchmarks/results.")] = False,
) -> None:
    """Train with the swarm and with plain PEFT in turn, and compare."""
    origin = provenance(threads)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="swarm-train-")))

        settings = json.dumps({"threads": threads, "labels": labels, "microbatches": microbatches})

        def start(side: str, environment: dict[str, str], *more: str) -> Side:
            return Side(stack, side, ["benchmarks.train_sides", side, settings, *more], folder, environment)

        passive = {"OMP_WAIT_POLICY": "PASSIVE"}
        alone = start("alone", passive)
        costs = alone.hear()
        head_blocks = costs["head_s"] / costs["block_s"]
        front, rest = choose_cuts([WHOLE, WHOLE], head_blocks)
        local, stage = start("local", {}), start("stage", passive, str(rest), str(folder))
        lead = start("lead", passive, str(front), str(folder), json.dumps(stage.hear()))
        for side in (local, lead):
            side.hear()
        result = _measure({"local": [local], "alone": [alone], "pipeline": [lead, stage]}, rounds, steps, activations)
        split = {"lead_blocks": str(front), "stage_blocks": str(rest), "head_blocks": round(head_blocks, 2)}
    publish("train_step", {**result, **split, "labels": labels}, origin, json_to, save)
    if not result["losses_agree"]:
        raise typer.Exit(1)


def _measure(sides: dict[str, list[Side]], rounds: int, steps: int, activations: str) -> dict[str, object]:
    """Let each way's first side train, round by round; all of a way's sides count as its cost."""
    families = {way: [process for side in members for process in side.family()] for way, members in sides.items()}
    step_s: dict[str, list[float]] = {way: [] for way in WAYS}
    cpu_s: dict[str, list[float]] = {way: [] for way in WAYS}
    losses: dict[str, list[float]] = {way: [] for way in WAYS}
    tokens, link_bytes, parts = 0, 0, 0
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
                parts = int(reply["microbatches"])
                link_bytes += (sent_bytes(families[way]) or 0) - (sent_before or 0)
    ratios = {
        way: spread([plain / mine for mine, plain in zip(step_s[way], step_s["local"], strict=True)])
        for way in WAYS[1:]
    }
    cpu_ratios = {
        way: spread([mine / plain for mine, plain in zip(cpu_s[way], cpu_s["local"], strict=True)]) for way in WAYS[1:]
    }
    gaps = {
        way: [abs(mine / plain - 1) for mine, plain in zip(losses[way], losses["local"], strict=True)]
        for way in WAYS[1:]
    }
    peaks = {side.name: _peak_bytes(side) for members in sides.values() for side in members}
    return {
        "single_ratio": ratios["alone"].median,
        "pipeline_speedup": ratios["pipeline"].median,
        "memory_ratio": round(max(peaks["lead"], peaks["stage"]) / peaks["local"], 4),
        "single_spread": ratios["alone"],
        "pipeline_spread": ratios["pipeline"],
        "peak_mib": {name: round(size / 2**20) for name, size in peaks.items()},
        "microbatches": parts,
        "losses_agree": max(gaps["alone"] + gaps["pipeline"][:steps]) <= ROUNDING,
        "activations": activations,
        "loss_gap": {way: float(f"{max(gap[steps:]):.2g}") for way, gap in gaps.items()},
        "last_loss": {way: round(losses[way][-1], 5) for way in WAYS},
        "local_step_s": spread(step_s["local"]),
        "swarm_step_s": spread(step_s["alone"]),
        "pipeline_step_s": spread(step_s["pipeline"]),
        "cpu_ratio": cpu_ratios["alone"].median,
        "pipeline_cpu_ratio": cpu_ratios["pipeline"].median,
        "pipeline_bytes_per_token": round(link_bytes / tokens, 1) if link_bytes else None,
        "tokens_per_s": {way: round(tokens / sum(step_s[way]) / steps, 1) for way in WAYS},
        "tokens_per_step": round(tokens / (rounds * steps), 1),
        "rounds": rounds,
        "steps": steps,
    }


def _peak_bytes(side: Side) -> int:
    """A process's most memory above what it took before it loaded anything."""
    return int(side.ask({"first": 0, "steps": 0, "activations": "float32"})["peak_bytes"]) - int(
        side.ready["bare_bytes"]
    )


if __name__ == "__main__":
    typer.run(main)
