"""How near the floor is a token over long links, and how much faster is it than with a client that relays?

Nodes of SmolLM2-135M behind the shaping proxy (`benchmarks.links`): 100 ms round trip and 20 Mbit/s a hop,
bfloat16 activations, nodes and head in float32, greedy. Two nodes, then four.

`time_over_floor`, one token a trip: the time of a token over k + 1 one-way trips plus what the nodes and
the client compute for it, which a second swarm of the same spans without the proxy takes in turn, round by
round. `speculative_vs_star`: the time of a token where the client relays every hop (2 k one-way trips, one
token a trip, as Petals does) over that of the chain with prompt lookup, in turn over the same prompts, each
of which asks to rewrite a real review. Both are the worse of two and four nodes. Only decoding counts, from
the first token on; `whole_answer` counts the prompt's prefill too. `quiet_time_over_floor` compares the tenth
percentile of all tokens' times: what is left when other work on a shared machine is out of the way. The star
decodes fewer tokens of each answer, since all take it equally long. Other requests than the one measured gain
less: `other_requests`.
"""

from __future__ import annotations

import socket
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated

import typer

from benchmarks.links import LinkProcess
from benchmarks.processes import Json, Side, start_node, start_swarm
from benchmarks.provenance import provenance, publish, spread
from benchmarks.reviews import FOR_CHOOSING, MEASURED, movie_reviews
from swarm.samples import smollm2_folder

REQUEST = "Rewrite this movie review with correct punctuation and capital letters, keeping the reviewer's words:\n\n{}"
"""The one of ten that copies most on other reviews than those measured (docs/experiments.md)."""
OTHER_REQUESTS = {
    "meaning": "Rewrite this movie review without changing its meaning:\n\n{}",
    "summary": "Summarise this movie review:\n\n{}",
}
SPANS = {2: ("0:15", "15:30"), 4: ("0:8", "8:15", "15:23", "23:30")}
DELAY_MS = 50.0
MBIT = 20.0
_PROBE_BYTES = 1_000_000
HIDDEN_BYTES = 576 * 2


def main(
    tokens: Annotated[int, typer.Option(min=8, help="Of an answer, at most.")] = 48,
    star_tokens: Annotated[int, typer.Option(min=2, help="Of an answer that the star decodes.")] = 9,
    prompts: Annotated[int, typer.Option(min=2, max=len(MEASURED))] = len(MEASURED),
    others: Annotated[int, typer.Option(min=0, help="Prompts of each other request, on two nodes.")] = 4,
    rounds: Annotated[int, typer.Option(min=2, help="Of the comparison with the floor.")] = 6,
    nodes: Annotated[list[int] | None, typer.Option(help="2 or 4; else both.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of torch, in every process.")] = 1,
    json_to: Annotated[str, typer.Option("--json", help="Write the result to this file; -: to stdout.")] = "",
    save: Annotated[bool, typer.Option("--save", help="Keep the result in benchmarks/results.")] = False,
) -> None:
    """Decode over long links and compare."""
    origin = provenance(threads)
    reviews = movie_reviews(MEASURED)[:prompts]
    results: dict[str, Json] = {}
    for count in nodes or SPANS:
        with ExitStack() as stack:
            swarm = ShapedSwarm(stack, SPANS[count], threads)
            result = {"links": swarm.links_measured()} | swarm.floor(REQUEST.format(reviews[0]), rounds)
            result |= swarm.against_star([REQUEST.format(review) for review in reviews], tokens, star_tokens)
            if count == 2:
                result["other_requests"] = {
                    name: swarm.against_star([text.format(r) for r in reviews[:others]], tokens, star_tokens)
                    for name, text in OTHER_REQUESTS.items()
                    if others
                }
            results[str(count)] = result
    summary = {
        "time_over_floor": max(result["time_over_floor"] for result in results.values()),
        "speculative_vs_star": min(result["speculative_vs_star"] for result in results.values()),
        "rtt_ms": 2 * DELAY_MS,
        "mbit": MBIT,
        "request": REQUEST,
        "nodes": results,
    }
    publish("wan", summary, origin, json_to, save)


class ShapedSwarm:
    """Nodes behind the proxy, the same nodes without it, and a client of both."""

    def __init__(self, stack: ExitStack, spans: tuple[str, ...], threads: int) -> None:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="swarm-wan-")))
        model = smollm2_folder()
        for name in ("shaped", "direct"):
            (folder / name).mkdir()
        direct, _ = start_swarm(stack, folder / "direct", model, spans, threads)
        join, _ = start_swarm(stack, folder / "shaped", model, (), threads)
        ports = free_ports(len(spans))
        echo = _echo_server(stack)
        self._links = LinkProcess(stack, folder, [f"127.0.0.1:{port}" for port in (*ports, echo)], DELAY_MS, MBIT)
        started = []
        for number, (span, port) in enumerate(zip(spans, ports, strict=True)):
            outside = f"/ip4/127.0.0.1/tcp/{self._links.ports[number]}"
            options = ("--port", str(port), "--announce", outside)
            started.append(start_node(stack, folder / "shaped", f"node-{number}", join, span, threads, options))
        for node in started:
            node.hear()
        arguments = ["benchmarks.wan_sides", str(threads), join, direct, str(folder)]
        self._client = Side(stack, "client", arguments, folder, {"OMP_WAIT_POLICY": "PASSIVE"})
        self._client.hear()
        self._crossings = len(spans) + 1
        warm_up = REQUEST.format(movie_reviews(FOR_CHOOSING)[0])
        for how in ("direct", "plain", "star", "speculative"):
            self._client.ask({"how": how, "prompt": warm_up, "tokens": 16})

    def links_measured(self) -> Json:
        """What the proxy really does, on a link of its own."""
        with socket.create_connection(("127.0.0.1", self._links.ports[-1])) as link:
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            rtts_s = [_exchange(link, 64) for _ in range(11)][1:]
            # Both directions carry it at once.
            took_s = [_exchange(link, _PROBE_BYTES) for _ in range(3)]
        rate = [8e-6 * _PROBE_BYTES / (took - median(rtts_s)) for took in took_s]
        return {"rtt_ms": spread([1000 * rtt for rtt in rtts_s]), "mbit": spread(rate)}

    def floor(self, prompt: str, rounds: int) -> Json:
        """One token a trip against trips and compute, round by round."""
        plain_s, direct_s, over = [], [], []
        gaps: dict[str, list[float]] = {"plain": [], "direct": []}
        tokens, link_bytes = 0, 0
        for number in range(rounds):
            replies = {}
            for how in ("direct", "plain") if number % 2 else ("plain", "direct"):
                before = self._passed()
                replies[how] = self._client.ask({"how": how, "prompt": prompt, "tokens": 16})
                if how == "plain":
                    link_bytes += self._passed() - before
                    tokens += len(replies[how]["tokens"]) - 1 + replies[how]["prompt_tokens"]
            for how, reply in replies.items():
                gaps[how] += _gaps(reply)
            plain_s.append(median(_gaps(replies["plain"])))
            direct_s.append(median(_gaps(replies["direct"])))
            over.append(plain_s[-1] / (self._crossings * DELAY_MS / 1000 + direct_s[-1]))
            _tell(f"{self._crossings - 1} nodes, round {number + 1} of {rounds}: {over[-1]:.3f} of the floor")
        # What crosses every link: all positions, and from the last node one position a step.
        payload = (self._crossings - 1) * HIDDEN_BYTES * tokens
        if link_bytes < payload:
            raise RuntimeError(f"{link_bytes} bytes passed the proxy, {payload} of activations were sent")
        ratio = spread(over)
        quiet_s = {how: quantiles(all_s, n=10)[0] for how, all_s in gaps.items()}
        return {
            "time_over_floor": ratio.median,
            "time_over_floor_spread": ratio,
            "quiet_time_over_floor": round(
                quiet_s["plain"] / (self._crossings * DELAY_MS / 1000 + quiet_s["direct"]), 4
            ),
            "plain_token_s": spread(plain_s),
            "compute_token_s": spread(direct_s),
            "link_bytes_per_token": round(link_bytes / tokens),
        }

    def against_star(self, prompts: list[str], tokens: int, star_tokens: int) -> Json:
        """Speculative decoding against a client that relays, prompt by prompt in turn."""
        decode_s = {"speculative": 0.0, "star": 0.0}
        steps = {"speculative": 0, "star": 0}
        first_s: dict[str, list[float]] = {"speculative": [], "star": []}
        ratios, answers, same = [], [], 0
        guesses = {"trips": 0, "drafted": 0, "accepted": 0}
        for number, prompt in enumerate(prompts):
            replies = {}
            for how in ("star", "speculative") if number % 2 else ("speculative", "star"):
                count = tokens if how == "speculative" else star_tokens
                replies[how] = self._client.ask({"how": how, "prompt": prompt, "tokens": count})
            star, ours = replies["star"], replies["speculative"]
            same += star["tokens"] == ours["tokens"][: len(star["tokens"])]
            answers.append(ours["text"])
            guesses = {name: total + ours[name] for name, total in guesses.items()}
            pace = {}
            for how, reply in replies.items():
                seconds, made = _decoded(reply, tokens if how == "speculative" else star_tokens)
                decode_s[how] += seconds
                steps[how] += made
                first_s[how].append(reply["seen_s"][0])
                pace[how] = seconds / made
            ratios.append(pace["star"] / pace["speculative"])
            _tell(
                f"{self._crossings - 1} nodes, prompt {number + 1} of {len(prompts)}: {ratios[-1]:.2f} times the star"
            )
        token_s = {how: seconds / steps[how] for how, seconds in decode_s.items()}
        answer_steps = steps["speculative"] / len(prompts)
        whole_s = {how: median(first_s[how]) + answer_steps * token_s[how] for how in token_s}
        return {
            "speculative_vs_star": round(token_s["star"] / token_s["speculative"], 4),
            "each_prompt": spread(ratios),
            "whole_answer": round(whole_s["star"] / whole_s["speculative"], 4),
            "token_s": {how: round(seconds, 4) for how, seconds in token_s.items()},
            "first_token_s": {how: round(median(seconds), 4) for how, seconds in first_s.items()},
            "acceptance": round(guesses["accepted"] / max(1, guesses["drafted"]), 4),
            "tokens_a_trip": round(steps["speculative"] / max(1, guesses["trips"]), 3),
            **guesses,
            "prompts": len(prompts),
            "same_text": same,
            "answers": answers,
        }

    def _passed(self) -> int:
        """Bytes that nodes' links have delivered so far."""
        return sum(counts.up_bytes + counts.down_bytes for counts in self._links.counts()[:-1])


def _tell(line: str) -> None:
    """How far it is, for who waits: the whole takes ten minutes on a quiet machine."""
    typer.echo(line, err=True)


def _gaps(reply: Json) -> list[float]:
    seen_s = reply["seen_s"]
    return [after - before for before, after in pairwise(seen_s)]


def _decoded(reply: Json, asked: int) -> tuple[float, int]:
    """Seconds after the first token, and steps that they went into; finding the end is one."""
    return reply["end_s"] - reply["seen_s"][0], len(reply["tokens"]) - 1 + (len(reply["tokens"]) < asked)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on just now."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _echo_server(stack: ExitStack) -> int:
    """Sends back what it gets, on a thread; its port."""
    server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

    def serve() -> None:
        with suppress(OSError):  # closed: the measurement is over
            while True:
                connection, _ = server.accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with connection:
                    while data := connection.recv(1 << 16):
                        connection.sendall(data)

    threading.Thread(target=serve, daemon=True).start()
    return int(server.getsockname()[1])


def _exchange(link: socket.socket, size: int) -> float:
    """Seconds until so many bytes are back."""
    began_s, missing = time.perf_counter(), size
    sender = threading.Thread(target=link.sendall, args=(bytes(size),))
    sender.start()
    while missing:
        missing -= len(link.recv(min(missing, 1 << 16)))
    took_s = time.perf_counter() - began_s
    sender.join()
    return took_s


if __name__ == "__main__":
    typer.run(main)
