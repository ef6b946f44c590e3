"""What do different adapters in one batch cost?

Two `swarm node` processes hold half of SmolLM2-135M's blocks each and eight LoRA adapters (r = 8, all
linear layers, random and large enough to change the text). One client process decodes eight sessions side
by side: all on one adapter, and each on its own, in turns. `mixed_ratio`: tokens/s of the mixture / of one
adapter, median over the rounds. Every text of the mixture must be the one that its adapter gives alone.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.decode import rate
from benchmarks.processes import Side, start_swarm
from benchmarks.provenance import provenance, publish, spread
from swarm.adapters.registry import ModelAdapters
from swarm.config import LoraMethod
from swarm.model.checkpoint import Checkpoint
from swarm.samples import smollm2_folder

SPANS = ("0:15", "15:30")
COUNT = 8
_SCALE = 0.02


def main(
    tokens: Annotated[int, typer.Option(min=8, help="Tokens a round and session.")] = 24,
    rounds: Annotated[int, typer.Option(min=2)] = 6,
    threads: Annotated[int, typer.Option(min=1, help="Of torch, in every process.")] = 1,
    json_to: Annotated[str, typer.Option("--json", help="Write the result to this file; -: to stdout.")] = "",
    save: Annotated[bool, typer.Option("--save", help="Keep the result in benchmarks/results.")] = False,
) -> None:
    """Decode eight sessions on one adapter and on eight."""
    origin = provenance(threads)
    names = [f"random-{number}" for number in range(COUNT)]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="swarm-adapters-")))
        options: list[str] = []
        for number, name in enumerate(names):
            options += ["--adapter", f"{name}={_random_adapter(folder / name, number)}"]
        join, _ = start_swarm(stack, folder / "swarm", smollm2_folder(), SPANS, threads, options)
        arguments = ["benchmarks.decode_sides", "swarm", str(threads), join, str(folder / "client")]
        client = Side(stack, "client", arguments, folder, {"OMP_WAIT_POLICY": "PASSIVE"})
        request = {"prompt_ids": client.hear()["prompt_ids"], "tokens": tokens, "how": "swarm"}
        alone = [client.ask(request | {"adapters": [name]})["tokens"][0] for name in names]
        ways = {"one": [names[0]] * COUNT, "mixed": names, "base": [""] * COUNT}
        tok_s: dict[str, list[float]] = {way: [] for way in ways}
        identical = True
        for turn in range(rounds + 1):
            for place in range(len(ways)):
                way = list(ways)[(turn + place) % len(ways)]
                reply = client.ask(request | {"adapters": ways[way]})
                if way == "mixed":
                    identical = identical and reply["tokens"] == alone
                if turn:
                    tok_s[way].append(rate(reply["seen_s"]))
    mixed = spread([m / o for m, o in zip(tok_s["mixed"], tok_s["one"], strict=True)])
    base = spread([m / o for m, o in zip(tok_s["mixed"], tok_s["base"], strict=True)])
    result = {
        "mixed_ratio": mixed.median,
        "identical": identical,
        "texts": len({tuple(text) for text in alone}),
        "mixed_to_base": base.median,
        "spreads": {"mixed": mixed, "to_base": base},
        "tok_s": {way: spread(values).median for way, values in tok_s.items()},
        "adapters": COUNT,
        "tokens": tokens,
        "rounds": rounds,
    }
    publish("adapters", result, origin, json_to, save)
    if not identical:
        raise typer.Exit(1)


def _random_adapter(folder: Path, seed: int) -> Path:
    """A LoRA adapter in PEFT's format whose B matrices are random too."""
    checkpoint = Checkpoint.open(str(smollm2_folder()))
    adapters, method = ModelAdapters(checkpoint), LoraMethod(r=8, alpha=16, targets="all-linear")
    generator = torch.Generator().manual_seed(seed)
    values = {
        key: array if key.endswith("lora_A") else (torch.randn(array.shape, generator=generator) * _SCALE).numpy()
        for key, array in adapters.initial(method, seed).items()
    }
    folder.mkdir()
    for name, content in adapters.export(method, values, checkpoint.name).items():
        (folder / name).write_bytes(content)
    return folder


if __name__ == "__main__":
    typer.run(main)
