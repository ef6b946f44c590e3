"""How fast is a token of the swarm, against one of plain `transformers` on the same cores?

Two `swarm node` processes hold half of SmolLM2-135M's blocks each; a client in a third process
decodes greedily over real libp2p, in float32 throughout. The other side is a process that runs
nothing but `transformers`, once as `model.generate` and once as a hand-written loop: the faster of the
two counts. The three take turns, in another order every round; `ratio` is the median over the
rounds of swarm / local, both decoded within the same few seconds. Prefill is not timed.
`quiet_ratio` compares the tenth percentile of all tokens' times instead: what is left when other work
on a shared machine, which hits a chain of processes harder than a single one, is out of the way.

The texts must be the same, token for token; the exit status is 1 if they are not.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from typing import Annotated

import typer

from benchmarks.processes import Json, Side, cpu_seconds, sent_bytes, start_swarm
from benchmarks.provenance import provenance, publish, spread
from swarm.samples import smollm2_folder

SPANS = ("0:15", "15:30")
LINKS = len(SPANS) + 1
WAYS = ("loop", "generate", "swarm")


def main(
    tokens: Annotated[int, typer.Option(min=8, help="Tokens a round and way.")] = 32,
    rounds: Annotated[int, typer.Option(min=2)] = 8,
    threads: Annotated[int, typer.Option(min=1, help="Of torch, in every process.")] = 1,
    json_to: Annotated[str, typer.Option("--json", help="Write the result to this file; -: to stdout.")] = "",
    save: Annotated[bool, typer.Option("--save", help="Keep the result in benchmarks/results.")] = False,
) -> None:
    """Decode with the swarm and with plain transformers in turn, and compare."""
    origin = provenance(threads)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="swarm-decode-")))
        join, nodes = start_swarm(stack, folder, smollm2_folder(), SPANS, threads)
        local = Side(stack, "local", ["benchmarks.decode_sides", "local", str(threads)], folder, {})
        arguments = ["benchmarks.decode_sides", "swarm", str(threads), join, str(folder)]
        client = Side(stack, "client", arguments, folder, {"OMP_WAIT_POLICY": "PASSIVE"})
        prompt_ids = local.hear()["prompt_ids"]
        if client.hear()["prompt_ids"] != prompt_ids:
            raise RuntimeError("the two sides tokenize the prompt differently")
        request = {"prompt_ids": prompt_ids, "tokens": tokens}
        result = _measure({"loop": [local], "generate": [local], "swarm": [client, *nodes]}, request, rounds)
    publish("decode", result, origin, json_to, save)
    if not result["identical"]:
        raise typer.Exit(1)


def _measure(sides: dict[str, list[Side]], request: Json, rounds: int) -> dict[str, object]:
    """Let each way's first side generate, round by round; all of a way's sides count as its cost."""
    families = {way: [process for side in members for process in side.family()] for way, members in sides.items()}
    tok_s: dict[str, list[float]] = {way: [] for way in WAYS}
    cpu_s: dict[str, list[float]] = {way: [] for way in WAYS}
    token_s: dict[str, list[float]] = {way: [] for way in WAYS}
    link_bytes: list[float] = []
    texts = set()
    count = int(request["tokens"])
    for turn in range(rounds + 1):
        for place in range(len(WAYS)):
            way = WAYS[(turn + place) % len(WAYS)]
            cpu_before, sent_before = cpu_seconds(families[way]), sent_bytes(families[way])
            reply = sides[way][0].ask(request | {"how": way})
            texts.add(tuple(reply["tokens"]))
            if turn == 0:
                continue  # warm-up
            seen_s = [float(at) for at in reply["seen_s"]]
            tok_s[way].append((count - 1) / (seen_s[-1] - seen_s[0]))
            token_s[way] += [after - before for before, after in pairwise(seen_s)]
            cpu_s[way].append(cpu_seconds(families[way]) - cpu_before)
            sent_after = sent_bytes(families[way])
            if way == "swarm" and sent_before is not None and sent_after is not None:
                link_bytes.append((sent_after - sent_before) / (count + len(request["prompt_ids"])))
    local = max(("loop", "generate"), key=lambda way: spread(tok_s[way]).median)
    ratio = spread([s / one for s, one in zip(tok_s["swarm"], tok_s[local], strict=True)])
    cpu_ratio = spread([s / one for s, one in zip(cpu_s["swarm"], cpu_s[local], strict=True)])
    quiet = {way: quantiles(times, n=10)[0] for way, times in token_s.items()}
    return {
        "local_tok_s": spread(tok_s[local]).median,
        "swarm_tok_s": spread(tok_s["swarm"]).median,
        "ratio": ratio.median,
        "identical": len(texts) == 1,
        "local_is": local,
        "ratio_spread": ratio,
        "swarm_spread": spread(tok_s["swarm"]),
        "loop_spread": spread(tok_s["loop"]),
        "generate_spread": spread(tok_s["generate"]),
        "quiet_ratio": round(min(quiet["loop"], quiet["generate"]) / quiet["swarm"], 4),
        "quiet_token_ms": {way: round(1000 * quiet[way], 2) for way in WAYS},
        "cpu_ratio": cpu_ratio.median,
        "cpu_ratio_spread": cpu_ratio,
        "bytes_per_token": spread(link_bytes).median if link_bytes else None,
        "links": LINKS,
        "tokens": count,
        "prompt_tokens": len(request["prompt_ids"]),
        "rounds": rounds,
    }


if __name__ == "__main__":
    typer.run(main)
