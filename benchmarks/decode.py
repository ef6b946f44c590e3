"""How fast is a token of the swarm, against one of plain `transformers` on the same cores?

Two `swarm node` processes hold half of SmolLM2-135M's blocks each; a client in a third process
decodes greedily over real libp2p. The other side is a process that runs nothing but `transformers`
in float32, once as `model.generate` and once as a hand-written loop: the faster of the two counts.
All take turns within the same few seconds, in another order every round; a ratio is the median over
the rounds. Prefill is not timed.

    ratio            float32 nodes, one session, against local
    int8_ratio       nodes with int8 weights against local float32, `int8_kl` beside it (nats, to float32)
    sessions8_ratio  8 sessions of one client process, sum of tokens/s against one session
    clients8_ratio   8 client processes of one session each, against one session

For several sessions the tokens are counted between the last session's first token and the first
session's last one. `quiet_ratio` compares the tenth percentile of all tokens' times: what is left when
other work on a shared machine, which hits a chain of processes harder than a single one, is out of
the way. The float32 texts must be the local ones, token for token; else the exit status is 1.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from typing import Annotated, Any

import typer

from benchmarks.processes import Json, Side, cpu_seconds, sent_bytes, start_swarm
from benchmarks.provenance import provenance, publish, spread
from benchmarks.texts import token_rows
from swarm.samples import smollm2_folder

SPANS = ("0:15", "15:30")
LINKS = len(SPANS) + 1
MANY = 8


def main(
    tokens: Annotated[int, typer.Option(min=8, help="Tokens a round and way.")] = 32,
    rounds: Annotated[int, typer.Option(min=2)] = 8,
    threads: Annotated[int, typer.Option(min=1, help="Of torch, in every process.")] = 1,
    judged: Annotated[int, typer.Option(min=256, help="Tokens that int8's quality is judged on.")] = 4096,
    json_to: Annotated[str, typer.Option("--json", help="Write the result to this file; -: to stdout.")] = "",
    save: Annotated[bool, typer.Option("--save", help="Keep the result in benchmarks/results.")] = False,
) -> None:
    """Decode with the swarm and with plain transformers in turn, and compare."""
    origin = provenance(threads)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="swarm-decode-")))
        exact, nodes = start_swarm(stack, folder / "exact", smollm2_folder(), SPANS, threads)
        int8, int8_nodes = start_swarm(stack, folder / "int8", smollm2_folder(), SPANS, threads, ("--quantize", "int8"))

        def side(name: str, kind: str, *rest: str) -> Side:
            arguments = ["benchmarks.decode_sides", kind, str(threads), *rest]
            environment = {} if kind == "local" else {"OMP_WAIT_POLICY": "PASSIVE"}
            started = Side(stack, name, arguments, folder, environment)
            started.hear()
            return started

        local = side("local", "local")
        clients = [side(f"client-{n}", "swarm", exact, str(folder / f"c{n}")) for n in range(MANY)]
        other = side("client-int8", "swarm", int8, str(folder / "c-int8"))
        prompt_ids = local.ready["prompt_ids"]
        if clients[0].ready["prompt_ids"] != prompt_ids:
            raise RuntimeError("the two sides tokenize the prompt differently")
        request = {"prompt_ids": prompt_ids, "tokens": tokens}
        bench = _Bench(local, clients, nodes, other, int8_nodes, request)
        result = bench.measure(rounds)
        judge = side("judge", "judge", exact, int8, str(folder / "judge"))
        quality = judge.ask({"texts": token_rows(judged, 256)})
        result |= {"int8_kl": round(quality["kl"], 5), "int8_perplexity_ratio": round(quality["perplexity_ratio"], 5)}
        result["int8_scored_tokens"] = quality["scored_tokens"]
    publish("decode", result, origin, json_to, save)
    if not result["identical"]:
        raise typer.Exit(1)


class _Bench:
    """The ways to decode, and what each round of them gave."""

    def __init__(
        self,
        local: Side,
        clients: Sequence[Side],
        nodes: Sequence[Side],
        other: Side,
        int8_nodes: Sequence[Side],
        request: Json,
    ) -> None:
        self._request = request
        self._clients = clients
        self._asked: dict[str, Side] = {
            "loop": local, "generate": local, "swarm": clients[0], "int8": other, "sessions8": clients[0]
        }  # fmt: skip
        costs: dict[str, list[Side]] = {
            "loop": [local], "generate": [local], "swarm": [clients[0], *nodes], "int8": [other, *int8_nodes],
            "sessions8": [clients[0], *nodes], "clients8": [*clients, *nodes],
        }  # fmt: skip
        self._families = {way: [p for side in sides for p in side.family()] for way, sides in costs.items()}
        self._ways = tuple(costs)
        self._tok_s: dict[str, list[float]] = {way: [] for way in costs}
        self._cpu_s: dict[str, list[float]] = {way: [] for way in costs}
        self._token_s: dict[str, list[float]] = {way: [] for way in costs}
        self._socket: list[float] = []
        self._payload: list[float] = []
        self._texts: set[tuple[int, ...]] = set()
        self._int8_texts: set[tuple[int, ...]] = set()

    def measure(self, rounds: int) -> dict[str, Any]:
        """Let each way generate, round by round; the first round only warms up."""
        for turn in range(rounds + 1):
            for place in range(len(self._ways)):
                self._take_turn(self._ways[(turn + place) % len(self._ways)], counts=turn > 0)
        tok_s = {way: spread(values) for way, values in self._tok_s.items()}
        local = max(("loop", "generate"), key=lambda way: tok_s[way].median)
        ratios = {
            "ratio": self._ratio("swarm", local),
            "int8_ratio": self._ratio("int8", local),
            "sessions8_ratio": self._ratio("sessions8", "swarm"),
            "clients8_ratio": self._ratio("clients8", "swarm"),
        }
        quiet = {way: quantiles(times, n=10)[0] for way, times in self._token_s.items() if times}
        cpu_ratio = spread([s / one for s, one in zip(self._cpu_s["swarm"], self._cpu_s[local], strict=True)])
        return {
            **{name: ratio.median for name, ratio in ratios.items()},
            "identical": len(self._texts) == 1,
            "bytes_per_token": spread(self._payload).median,
            "socket_bytes_per_token": spread(self._socket).median if self._socket else None,
            "links": LINKS,
            "local_is": local,
            "tok_s": {way: one.median for way, one in tok_s.items()},
            "spreads": {**ratios, **{f"{way}_tok_s": one for way, one in tok_s.items()}},
            "quiet_ratio": round(min(quiet["loop"], quiet["generate"]) / quiet["swarm"], 4),
            "quiet_int8_ratio": round(min(quiet["loop"], quiet["generate"]) / quiet["int8"], 4),
            "quiet_token_ms": {way: round(1000 * value, 2) for way, value in quiet.items()},
            "cpu_ratio": cpu_ratio.median,
            "int8_texts": len(self._int8_texts),
            "tokens": int(self._request["tokens"]),
            "prompt_tokens": len(self._request["prompt_ids"]),
            "rounds": rounds,
        }

    def _ratio(self, way: str, base: str) -> Any:
        return spread([a / b for a, b in zip(self._tok_s[way], self._tok_s[base], strict=True)])

    def _take_turn(self, way: str, *, counts: bool) -> None:
        cpu_before, sent_before = cpu_seconds(self._families[way]), sent_bytes(self._families[way])
        if way == "clients8":
            for client in self._clients:
                client.send(self._request | {"how": way})
            replies = [client.hear() for client in self._clients]
            tokens, seen_s = [r["tokens"] for r in replies], [r["seen_s"] for r in replies]
            payload = sum(r["client_bytes"] for r in replies)
        else:
            more = {"sessions": MANY} if way == "sessions8" else {}
            reply = self._asked[way].ask(self._request | {"how": way} | more)
            tokens, seen_s = reply["tokens"], reply["seen_s"]
            payload = reply.get("client_bytes", 0)
            if way != "sessions8":
                tokens, seen_s = [tokens], [seen_s]
        (self._int8_texts if way == "int8" else self._texts).update(tuple(text) for text in tokens)
        if not counts:
            return
        self._tok_s[way].append(rate(seen_s))
        self._cpu_s[way].append(cpu_seconds(self._families[way]) - cpu_before)
        if len(seen_s) == 1:
            self._token_s[way] += [after - before for before, after in pairwise(seen_s[0])]
        sent_after = sent_bytes(self._families[way])
        if way == "swarm":
            columns = int(self._request["tokens"]) + len(self._request["prompt_ids"])
            # The client's two links carry one hidden state a column each way; so does every link between nodes.
            self._payload.append(payload / columns * LINKS / 2)
            if sent_before is not None and sent_after is not None:
                self._socket.append((sent_after - sent_before) / columns)


def rate(seen_s: Sequence[Sequence[float]]) -> float:
    """Tokens per second of all sessions while all of them decode."""
    start, end = max(seen[0] for seen in seen_s), min(seen[-1] for seen in seen_s)
    return sum(sum(start < at <= end for at in seen) for seen in seen_s) / (end - start)


if __name__ == "__main__":
    typer.run(main)
