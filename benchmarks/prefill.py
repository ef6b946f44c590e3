"""How long does a prompt take until its first token, against plain `transformers` on the same cores?

Two `swarm node` processes hold half of SmolLM2-135M's blocks each; the prompt is real text of 512 and
2,048 tokens, float32 on both sides and on the links. Both sides prefill in turn, in another order
every round. `ratio_512` and `ratio_2048`: local time / swarm time, medians of the rounds. A prompt
travels in chunks, so the nodes work side by side; with one thread a process, the swarm uses two cores
where local `transformers` uses one: `ratio_same_cores_*` compares with local on as many threads.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.processes import Side, start_swarm
from benchmarks.provenance import provenance, publish, spread
from benchmarks.texts import token_rows
from swarm.samples import smollm2_folder

SPANS = ("0:15", "15:30")
LENGTHS = (512, 2048)


def main(
    rounds: Annotated[int, typer.Option(min=2)] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Of torch, in every process.")] = 1,
    json_to: Annotated[str, typer.Option("--json", help="Write the result to this file; -: to stdout.")] = "",
    save: Annotated[bool, typer.Option("--save", help="Keep the result in benchmarks/results.")] = False,
) -> None:
    """Prefill with the swarm and with plain transformers in turn, and compare."""
    origin = provenance(threads)
    result: dict[str, object] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="swarm-prefill-")))
        join, _ = start_swarm(stack, folder / "swarm", smollm2_folder(), SPANS, threads)
        sides = {
            "local": _side(stack, folder, "local", "local", threads),
            "wide": _side(stack, folder, "wide", "local", threads * len(SPANS)),
            "swarm": _side(stack, folder, "client", "swarm", threads, join, str(folder / "c")),
        }
        ways, same = tuple(sides), True
        for length in LENGTHS:
            took_s: dict[str, list[float]] = {way: [] for way in ways}
            prompt_ids = token_rows(length, length)[0]
            for turn in range(rounds + 1):
                answers = {}
                for place in range(len(ways)):
                    way = ways[(turn + place) % len(ways)]
                    reply = sides[way].ask({"how": "prefill", "prompt_ids": prompt_ids})
                    answers[way] = reply["tokens"]
                    if turn:
                        took_s[way].append(reply["took_s"])
                same = same and len({tuple(tokens) for tokens in answers.values()}) == 1
            ratio = spread([a / b for a, b in zip(took_s["local"], took_s["swarm"], strict=True)])
            wide = spread([a / b for a, b in zip(took_s["wide"], took_s["swarm"], strict=True)])
            result |= {
                f"ratio_{length}": ratio.median,
                f"ratio_same_cores_{length}": wide.median,
                f"spread_{length}": ratio,
                f"spread_same_cores_{length}": wide,
                f"took_s_{length}": {way: spread(values).median for way, values in took_s.items()},
            }
        result |= {"same_token": same, "rounds": rounds}
    publish("prefill", result, origin, json_to, save)
    if not result["same_token"]:
        raise typer.Exit(1)


def _side(stack: ExitStack, folder: Path, name: str, kind: str, threads: int, *rest: str) -> Side:
    environment = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    side = Side(stack, name, ["benchmarks.decode_sides", kind, str(threads), *rest], folder, environment)
    side.hear()
    return side


if __name__ == "__main__":
    typer.run(main)
