"""What share of its time does a pipeline over home links compute, with rounds that overlap and with rounds that wait?

A job of two nodes, each with half of SmolLM2-135M in float32 and one thread: LoRA r 8 on all linear layers,
H = 20 inner steps of 8 pieces of film reviews of 128 tokens, every position labelled, codecs and 8-bit activations
as a job has them by default. Real processes behind the shaping proxy (`benchmarks.links`): each node is dialled over
a link of its own and dials the coordinator over another, all of 100 ms round trip and 20 Mbit/s each way. A
job without overlap, then one with. From the second round on, the links are shaped in one round and free in
the next, in turn, within the job and with the same processes, so that each pair is taken back to back. A
round goes from the end of the inner steps of the one before to the end of its own: contributing, aggregating,
fetching the update, forming the pipeline and every inner step are in it.

    compute_share     what the H inner steps take over free links, over what the round takes over the shaped ones.
                      A stage that waits for its neighbour counts as computing if it would with free links too:
                      that is the pipeline's balance, not the network's doing. Medians over the pairs.
    over_unshaped     a round over free links, over one over the shaped ones: what the links alone cost
    busiest_cpu_share CPU time of the busier node (all threads) over the time of the shaped rounds, beside it

`link_rate` is a calculation from what was measured, for nodes 10 and 100 times as fast: the rate that leaves 0.95
for computing if the hop's bytes are sent while others are computed, so that the line only has to keep up
(`hidden`), and if nothing at all is hidden behind computing (`unhidden`); bytes a token and tokens a step as here.
The delay is no question of rate: `tokens_for_delay` is how large an optimizer step must be for two round
trips to be 5% of it.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from benchmarks.links import LinkProcess
from benchmarks.processes import Json, Side, cpu_seconds, start_coordinator, start_node, start_swarm
from benchmarks.provenance import provenance, publish
from benchmarks.reviews import movie_reviews
from benchmarks.shaping import Counts
from benchmarks.wan import free_ports
from swarm.client.coordinator import CoordinatorClient
from swarm.config import JobSpec
from swarm.data.sources import load_source
from swarm.identity import Identity
from swarm.net.join import parse_join
from swarm.samples import smollm2_folder
from swarm.wire.v1 import coordinator_pb2 as pb
from swarm.wire.version import hello

DELAY_MS, MBIT = 50.0, 20.0
SPANS = ("0:12", "12:30")
"""The lead computes the head too, which takes as long as six blocks (`benchmarks.train_step`)."""
PIECE_TOKENS = 128
BAR = 0.95
_LOOK_S = 0.05
_LONGEST_ROUND_S = 1200.0
HOP, COORDINATOR = slice(0, 2), slice(2, 4)
"""Of the links: where each node is dialled, and where each dials the coordinator."""


@dataclass(frozen=True)
class Round:
    """One round as the lead's log and the proxy tell it."""

    shaped: bool
    seconds: float
    steps_s: float
    """Inner steps alone."""
    tokens: int
    cpu_s: tuple[float, ...]
    """Of each node."""
    links: tuple[Counts, ...]
    """What passed in this round."""


def main(
    inner_steps: Annotated[int, typer.Option(min=2, help="H.")] = 20,
    overlap_steps: Annotated[int, typer.Option(min=1, help="Of the job whose rounds overlap.")] = 2,
    batch: Annotated[int, typer.Option(min=4, help="Pieces of an inner step.")] = 8,
    pairs: Annotated[int, typer.Option(min=1, help="Shaped and free rounds, in turn, of each job.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Of torch, in every process.")] = 1,
    json_to: Annotated[str, typer.Option("--json", help="Write the result to this file; -: to stdout.")] = "",
    save: Annotated[bool, typer.Option("--save", help="Keep the result in benchmarks/results.")] = False,
) -> None:
    """Train over long links and over free ones in turn."""
    origin = provenance(threads)
    with ExitStack() as stack:
        swarm = TrainingSwarm(stack, threads)
        jobs = {}
        for name, overlap in (("waits", 0), ("overlaps", overlap_steps)):
            jobs[name] = swarm.train(name, inner_steps, overlap, batch, pairs)
    waits, overlaps = (summary(rounds) for rounds in jobs.values())
    result = {
        "compute_share": overlaps["compute_share"],
        "compute_share_no_overlap": waits["compute_share"],
        "over_unshaped": overlaps["over_unshaped"],
        "over_unshaped_no_overlap": waits["over_unshaped"],
        "inner_steps": inner_steps,
        "overlap_steps": overlap_steps,
        "tokens_per_step": round(jobs["waits"][0].tokens / inner_steps),
        "rtt_ms": 2 * DELAY_MS,
        "mbit": MBIT,
        "overlaps": overlaps,
        "waits": waits,
        "link_rate": {f"{speed}x": needed(jobs["overlaps"], inner_steps, speed) for speed in (10, 100)},
        "bars": {"compute_share": BAR, "compute_share_no_overlap": BAR},
    }
    publish("wan_training", result, origin, json_to, save)


class TrainingSwarm:
    """Two nodes and a coordinator, each link of theirs behind the proxy."""

    def __init__(self, stack: ExitStack, threads: int) -> None:
        self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="swarm-wan-training-")))
        model, root = smollm2_folder(), self._folder
        join, _ = start_swarm(stack, root, model, (), threads)
        self._join = parse_join(start_coordinator(stack, root, join))
        ports = free_ports(len(SPANS))
        targets = [*(f"127.0.0.1:{port}" for port in ports), *[self._join.coordinator] * len(SPANS)]
        self._links = LinkProcess(stack, root, targets, 0.0, 0.0)
        self._nodes: list[Side] = []
        for number, (span, port) in enumerate(zip(SPANS, ports, strict=True)):
            dialled, coordinator = self._links.ports[number], self._links.ports[len(SPANS) + number]
            own = self._join.with_coordinator(f"127.0.0.1:{coordinator}", self._join.tls_fingerprint).encode()
            options = ("--port", str(port), "--announce", f"/ip4/127.0.0.1/tcp/{dialled}")
            self._nodes.append(start_node(stack, root, f"node-{number}", own, span, threads, options))
        for node in self._nodes:
            node.hear()

    def train(self, name: str, inner_steps: int, overlap: int, batch: int, pairs: int) -> list[Round]:
        """One job: a round to warm up, then shaped and free ones in turn; without the first."""
        schedule = {
            "rounds": 1 + 2 * pairs,
            "inner_steps": inner_steps,
            "overlap_steps": overlap,
            "batch_size": batch,
            "max_length": PIECE_TOKENS,
        }
        data = self._folder / "reviews.txt"
        data.write_text("\n".join(movie_reviews(range(400))), encoding="utf-8")
        asyncio.run(self._submit(JobSpec.model_validate({"name": name, "data": {"train": data}, "schedule": schedule})))
        rounds: list[Round] = []
        self._shape(False)
        before = self._when_ended(name, 1, inner_steps)
        for number in range(2, 2 + 2 * pairs):
            shaped = number % 2 == 0
            links, cpu_s = self._shape(shaped), self._cpu_s()
            after = self._when_ended(name, number, inner_steps)
            steps = [step for step in self._steps(name) if step["round"] == number]
            passed = zip(links, self._links.counts(), strict=True)
            rounds.append(
                Round(
                    shaped,
                    after - before,
                    sum(step["seconds"] for step in steps),
                    sum(step["tokens"] for step in steps),
                    tuple(now - then for then, now in zip(cpu_s, self._cpu_s(), strict=True)),
                    tuple(_difference(then, now) for then, now in passed),
                )
            )
            before = after
            kind = "shaped" if shaped else "free"
            typer.echo(
                f"{name}, round {number} of {1 + 2 * pairs}, {kind}: {rounds[-1].seconds:.1f} s, "
                f"of which {rounds[-1].steps_s:.1f} s in inner steps",
                err=True,
            )
        self._shape(False)
        return rounds

    async def _submit(self, spec: JobSpec) -> None:
        source = load_source(spec.data.train)
        client = await CoordinatorClient.connect(
            self._join.coordinator, self._join.tls_fingerprint, Identity.generate()
        )
        digest = await client.put_blob(source.data)
        await client.submit_job(
            pb.SubmitJobRequest(
                hello=hello(self._join.model_hash, ("train",)),
                spec_json=spec.model_dump_json(),
                dataset=digest,
                dataset_size=len(source.data),
                samples=source.samples,
            )
        )
        await client.close()

    def _shape(self, shaped: bool) -> list[Counts]:
        """Counts so far."""
        return self._links.reshape(DELAY_MS, MBIT) if shaped else self._links.reshape(0.0, 0.0)

    def _cpu_s(self) -> list[float]:
        return [cpu_seconds(node.family()) for node in self._nodes]

    def _steps(self, job: str) -> list[Json]:
        return [step for step in self._nodes[0].all_logged("inner_step") if step["job"] == job]

    def _when_ended(self, job: str, number: int, inner_steps: int) -> float:
        """Unix time of a round's last inner step, once it is done. Raises RuntimeError: the node gave the round up."""
        until_s = time.monotonic() + _LONGEST_ROUND_S
        while time.monotonic() < until_s:
            for step in self._steps(job):
                if (step["round"], step["step"]) == (number, f"{inner_steps}/{inner_steps}"):
                    return datetime.fromisoformat(step["timestamp"]).timestamp()
            failed = [e for node in self._nodes for e in node.all_logged("round_failed")]
            if failed:
                raise RuntimeError(json.dumps(failed))
            time.sleep(_LOOK_S)
        raise RuntimeError(f"round {number} of job {job} did not end in {_LONGEST_ROUND_S:.0f} s")


def summary(rounds: Sequence[Round]) -> Json:
    """Shares over neighbouring pairs of a shaped and a free round, and what passed the links in the shaped ones."""
    pairs = list(zip(rounds[::2], rounds[1::2], strict=True))
    shaped = [round for round in rounds if round.shaped]
    tokens = sum(round.tokens for round in shaped)
    busiest = max(range(len(SPANS)), key=lambda n: sum(r.cpu_s[n] for r in shaped))
    return {
        "compute_share": _median([free.steps_s / slow.seconds for slow, free in pairs]),
        "over_unshaped": _median([free.seconds / slow.seconds for slow, free in pairs]),
        "busiest_cpu_share": round(sum(r.cpu_s[busiest] for r in shaped) / sum(r.seconds for r in shaped), 4),
        "round_s": {"shaped": [round(r.seconds, 2) for r in shaped], "free": [round(f.seconds, 2) for _, f in pairs]},
        "steps_s": {"shaped": [round(r.steps_s, 2) for r in shaped], "free": [round(f.steps_s, 2) for _, f in pairs]},
        "bytes_per_token": {
            "hop_forth_and_back": _per_token(shaped, HOP, tokens),
            "coordinator_up": round(sum(c.up_bytes for r in shaped for c in r.links[COORDINATOR]) / tokens, 2),
            "coordinator_down": round(sum(c.down_bytes for r in shaped for c in r.links[COORDINATOR]) / tokens, 2),
        },
    }


def needed(rounds: Sequence[Round], inner_steps: int, speed: int) -> Json:
    """Megabits a second for a compute share of BAR on nodes so many times as fast. A calculation."""
    shaped, free = ([r for r in rounds if r.shaped is kind] for kind in (True, False))
    tokens = sum(r.tokens for r in shaped)
    token_s = sum(r.steps_s for r in free) / sum(r.tokens for r in free) / speed
    links = [counts for r in shaped for counts in r.links[HOP]]
    forth_and_back = (sum(c.up_bytes for c in links), sum(c.down_bytes for c in links))
    of_coordinator = [sum(c.up_bytes + c.down_bytes for c in r.links[COORDINATOR]) / len(SPANS) for r in shaped]
    spare_s = token_s * (1 / BAR - 1)
    step_tokens = tokens / len(shaped) / inner_steps
    return {
        "hidden": round(8e-6 * max(forth_and_back) / tokens / (token_s / BAR), 2),
        "unhidden": round(8e-6 * (sum(forth_and_back) + sum(of_coordinator)) / tokens / spare_s, 2),
        "step_s": round(token_s * step_tokens, 4),
        "tokens_for_delay": round(2 * 2e-3 * DELAY_MS / (0.05 * token_s)),
    }


def _per_token(rounds: Sequence[Round], links: slice, tokens: int) -> list[float]:
    counts = [count for r in rounds for count in r.links[links]]
    return [round(sum(c.up_bytes for c in counts) / tokens, 1), round(sum(c.down_bytes for c in counts) / tokens, 1)]


def _difference(then: Counts, now: Counts) -> Counts:
    return Counts(
        now.up_bytes - then.up_bytes, now.down_bytes - then.down_bytes, now.connections, now.open, now.most_held_bytes
    )


def _median(values: Sequence[float]) -> float:
    return round(median(values), 4)


if __name__ == "__main__":
    typer.run(main)
