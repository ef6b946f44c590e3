"""Where does a job over home uplinks end, against a single well-connected machine, and for how many bytes?

SmolLM2-135M, LoRA r 8 on all linear layers, K = 4 pipelines, at least 10 outer rounds. The baseline is synchronous data
parallelism (DDP) over the same samples and as many steps, with the learning rate that is best for it. A run is a cell;
cells that are done are kept in `results/convergence/` and not run again, so the whole may take many sessions:

    python -m benchmarks.convergence --list              what is done and what is not
    python -m benchmarks.convergence --only NAME …       these cells
    python -m benchmarks.convergence --json -            all that are missing, then the table

    saving_*    K × steps × parameters × 2 bytes (gradients in bfloat16, one direction) over what was sent
    penalty_*   held-out loss over DDP's of the same seed and steps, minus 1; the mean over seeds, with a 95% interval
    gain_share  the difference as a share of what training gains
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import torch
import typer

from benchmarks.convergence_run import PIPELINES, Cell, Run, World
from benchmarks.provenance import card_name, provenance, publish
from node.main import pick_device
from swarm.config import CodecSettings, OuterSettings

_FOLDER = Path(__file__).resolve().parent / "results" / "convergence"
_DENSE = CodecSettings(kind="dense", decay=0.0)
_PLAIN = OuterSettings(lr=1.0, momentum=0.0, nesterov=False)
_PAPER = OuterSettings(lr=0.7, momentum=0.9)
_SEEDS = (0, 1, 2)
_MORE_SEEDS = tuple(range(8))
"""Of the thinner of our two settings, whose penalty scatters more than it is. All of them count."""
_T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""Student's t for a 95% interval, by the number of seeds."""

OURS = Cell(
    "ours-h10",
    lr=1e-3,
    outer=_PLAIN,
    start="own",
    uplink=CodecSettings(density=0.03125, bits=2),
    # What four pipelines send is hardly denser than that, and has a level for every sum of theirs.
    downlink=CodecSettings(density=0.125, bits=4, decay=1.0),
)
OURS_BEST = replace(OURS, name="ours-best", inner_steps=20, uplink=CodecSettings(density=0.01887, bits=1))
"""More inner steps, sent thinner."""
_THINNER = replace(OURS_BEST, name="ours-h20", uplink=CodecSettings(density=0.015625, bits=1))
_ENERGY = replace(OURS_BEST, name="ours-h20-energy", uplink=CodecSettings(density=0.02, bits=1, allocation="energy"))
_COSINE = replace(OURS_BEST, name="ours-h20-cosine", decay="cosine")
_DDP_RATES = (5e-4, 1e-3, 2e-3)
_DDP_RATE = 1e-3
"""What other seeds and lengths are run at: the best of these for seed 0."""


def cells() -> list[Cell]:
    """Every cell of the table, the ones that others are judged by first."""
    found = [_ddp(ours, rate) for ours in (OURS, OURS_BEST) for rate in _DDP_RATES]
    found.append(replace(OURS, name="ours-rate-0.002", lr=2e-3))
    found.append(replace(_THINNER, name="ours-rate-0.002-h20", lr=2e-3))
    for ours in (OURS, OURS_BEST, _THINNER):
        for seed in _seeds(ours):
            found.append(replace(ours, name=f"{ours.name}-s{seed}" if seed else ours.name, seed=seed))
            if seed and ours is not _THINNER:  # the first is among the rates
                found.append(_ddp(ours, _DDP_RATE, seed))
    found += [
        _ENERGY,
        replace(_ENERGY, name=f"{_ENERGY.name}-s1", seed=1),
        _COSINE,
        _ddp(_COSINE, _DDP_RATE),
        Cell("diloco-fp32", uplink=_DENSE, downlink=_DENSE),
        Cell(
            "cocktail-published",
            outer=_PLAIN,
            uplink=CodecSettings(random_keep=0.2, density=0.1, bits=4, decay=1.0),
            downlink=CodecSettings(random_keep=0.2, density=0.1, bits=4, decay=1.0),
        ),
        Cell(
            "sparseloco-published",
            outer=_PLAIN,
            uplink=CodecSettings(density=0.015625, bits=2, decay=0.95),
            downlink=_DENSE,
        ),
        replace(OURS, name="ours-by-label", split="by-label"),
        replace(OURS, name="ours-drop-25", drop=0.25),
        replace(OURS, name="ours-late-25-kept", drop=0.25, dropped="kept"),
        replace(OURS, name="ours-late-25-merged", drop=0.25, dropped="merged"),
        replace(OURS, name="ours-repaired-25", drop=0.25, dropped="repaired"),
        replace(OURS, name="ours-joiner", join_round=6),
        replace(OURS, name="ours-overlap-2", overlap=2),
        replace(OURS, name="ours-int8", activations="int8"),
        replace(OURS, name="ours-int4", activations="int4"),
        replace(OURS, name="ours-overlap-10", overlap=10),
        replace(OURS, name="ours-reference", start="reference"),
        Cell("diloco-fp32-paper", outer=_PAPER, uplink=_DENSE, downlink=_DENSE),
    ]
    return found


def _seeds(ours: Cell) -> tuple[int, ...]:
    return _MORE_SEEDS if ours is OURS_BEST else _SEEDS


def _ddp(ours: Cell, rate: float, seed: int = 0) -> Cell:
    """The baseline of as many steps, at a rate that decays as ours does."""
    name = f"ddp-{rate:g}" + (f"-h{ours.inner_steps}" if ours.inner_steps != OURS.inner_steps else "")
    name += f"-{ours.decay}" if ours.decay != "none" else ""
    name += f"-s{seed}" if seed else ""
    return Cell(name, seed=seed, inner_steps=ours.inner_steps, lr=rate, decay=ours.decay, ddp=True)


def main(
    only: Annotated[list[str] | None, typer.Option(help="Run these cells alone. Repeatable.")] = None,
    show: Annotated[bool, typer.Option("--list", help="Say which cells are done, run nothing.")] = False,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    dtype: Annotated[str, typer.Option(help="Of the frozen weights: float32 or bfloat16.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cpu",
    json_to: Annotated[str, typer.Option("--json", help="Write the result to this file; -: to stdout.")] = "",
    save: Annotated[bool, typer.Option("--save", help="Keep the result in benchmarks/results.")] = False,
) -> None:
    """Train every cell that is not done yet, then compare."""
    wanted = [cell for cell in cells() if not only or cell.name in only]
    if show:
        for cell in wanted:
            typer.echo(f"{'done   ' if _path(cell).exists() else 'missing'} {cell.name}")
        return
    where = pick_device(device)
    origin, world = provenance(threads, card_name(where)), None
    for cell in wanted:
        if _path(cell).exists():
            continue
        world = world or World(threads, getattr(torch, dtype), where)
        result = Run(world, cell).run(lambda line: typer.echo(line, err=True))
        _FOLDER.mkdir(parents=True, exist_ok=True)
        kept = {"cell": cell, "result": result, "origin": origin, "dtype": dtype, "device": where.type}
        temporary = _path(cell).with_suffix(".tmp")
        temporary.write_text(json.dumps(kept, indent=2, default=_plain) + "\n")
        temporary.replace(_path(cell))
    publish("convergence", table(_done()), origin, json_to, save)


def table(done: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The rows of all cells that are done, and the figures of the two that are ours."""
    baselines: dict[_Kind, float] = {}
    for kept in done.values():
        if kept["cell"]["ddp"]:
            kind, loss = _kind(kept), kept["result"]["losses"][-1]
            baselines[kind] = min(loss, baselines.get(kind, loss))
    rows = [_row(name, kept, baselines) for name, kept in done.items() if not kept["cell"]["ddp"]]
    summary: dict[str, Any] = {
        "h_best": OURS_BEST.inner_steps,
        "rows": rows,
        "baselines": {"/".join(map(str, kind)): loss for kind, loss in baselines.items()},
    }
    downlink: list[float] = []
    for name, ours in (("h10", OURS), ("best", OURS_BEST)):
        own = {ours.name, *(f"{ours.name}-s{seed}" for seed in _seeds(ours))}
        group = [row for row in rows if row["cell"] in own and row["penalty"] is not None]
        if not group:
            continue
        summary[f"saving_{name}"] = min(row["saving"] for row in group)
        summary[f"penalty_{name}"], summary[f"penalty_{name}_half_width"] = _interval([row["penalty"] for row in group])
        summary[f"gain_share_{name}"] = round(mean(row["gain_share"] for row in group), 4)
        downlink += [row["downlink_saving"] for row in group]
    summary["downlink_saving"] = min(downlink, default=None)
    return summary


_Kind = tuple[int, int, str, str, str]
"""Seed, steps of the whole run, how the rate decays, dtype, device: what a baseline shares with the cells it judges."""


def _kind(kept: dict[str, Any]) -> _Kind:
    cell = kept["cell"]
    # Cells from before there was a decay, or a choice of device, have none.
    decay, device = cell.get("decay", "none"), kept.get("device", "cpu")
    return cell["seed"], cell["rounds"] * cell["inner_steps"], decay, kept["dtype"], device


def _row(name: str, kept: dict[str, Any], baselines: dict[_Kind, float]) -> dict[str, Any]:
    cell, result = kept["cell"], kept["result"]
    steps = cell["rounds"] * cell["inner_steps"]
    ddp, before, after = baselines.get(_kind(kept)), result["losses"][0], result["losses"][-1]
    one_way = PIPELINES * steps * result["parameters"] * 2
    return {
        "cell": name,
        "inner_steps": cell["inner_steps"],
        "rounds": cell["rounds"],
        "loss": round(after, 4),
        "penalty": None if ddp is None else round(after / ddp - 1, 5),
        "gain_share": None if ddp is None else round((after - ddp) / (before - ddp), 4),
        "saving": round(one_way / result["uplink_bytes"], 1),
        "downlink_saving": round(one_way / result["downlink_bytes"], 1),
    }


def _interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half of the width of its 95% interval."""
    if len(values) not in _T_975:
        return round(mean(values), 5), None
    return round(mean(values), 5), round(_T_975[len(values)] * stdev(values) / sqrt(len(values)), 5)


def _done() -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(_FOLDER.glob("*.json"))}


def _path(cell: Cell) -> Path:
    return _FOLDER / f"{cell.name}.json"


def _plain(value: object) -> Any:
    if isinstance(value, (OuterSettings, CodecSettings)):
        return value.model_dump()
    return asdict(value)  # type: ignore[call-overload]


if __name__ == "__main__":
    typer.run(main)
