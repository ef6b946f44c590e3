"""What share of its time does a pipeline over home links compute, with rounds that overlap and with rounds that wait?

A job of two nodes, each with a part of SmolLM2-135M in float32 and one thread: LoRA r 8 on all linear layers,
H = 20 inner steps of 16 pieces of 256 tokens of film reviews, every position labelled, codecs and 8-bit activations
as a job has them by default. Each piece is a microbatch: the first and the last crossing of a step are hidden behind
nothing, and the smaller they are, the shorter. Real processes behind the shaping proxy (`benchmarks.links`): each
node is dialled over a link of its own and dials the coordinator over another, all of 100 ms round trip and 20 Mbit/s
each way. One job whose rounds wait, then one whose rounds overlap. In each, with the same processes, back to
back: the first round over free links, the second one over the shaped ones, and the beginning of the third over
free links again.

A round goes from the end of the inner steps of the one before to the end of its own, so that everything is in it:
contributing, aggregating, fetching the update, forming the pipeline, and H inner steps. What is not in
inner steps is its `gap_s`.

    compute_share      what H inner steps take over free links (mean of those before and after), over what the
                       round took over the shaped ones. A stage that waits for its neighbour counts as computing
                       as far as it would wait with free links too: that is the pipeline's balance, not the
                       links' doing.
    over_unshaped      a round over free links (H such steps and the gap before the third round's) over the same
    busiest_cpu_share  CPU time of the busier node (all its threads) over the time of the shaped round, beside it.
                       The proxy works on the same cores as the nodes: `proxy_cpu_share` is its CPU time likewise

`link_rate` is a calculation from what was measured, for nodes 10 and 100 times as fast: the rate in Mbit/s that leaves
0.95 for computing, if the hop's bytes are sent while others are computed so that the line only has to keep up
(`hidden`), and if nothing at all is hidden behind computing (`unhidden`); bytes a token as here. The delay is
no question of rate: `tokens_for_delay` is how large an optimizer step must be for two round trips to be 5% of it.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import mean
from typing import Annotated

import typer

from benchmarks.links import LinkProcess
from benchmarks.processes import Json, Side, cpu_seconds, start_coordinator, start_node, start_swarm
from benchmarks.provenance import provenance, publish, spread
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
BAR = 0.95
HOP, COORDINATOR = slice(0, 2), slice(2, 4)
"""Of the links: where each node is dialled, and where each dials the coordinator."""
_LOOK_S = 0.1
_LONGEST_ROUND_S = 1800.0


@dataclass(frozen=True)
class Stretch:
    """Inner steps of one round in a row, as the lead's log and the proxy tell it."""

    gap_s: float
    """From the end of the step before the first of them: what was not spent in these steps."""
    steps_s: tuple[float, ...]
    tokens: int
    cpu_s: tuple[float, ...]
    """Of each node, and of the proxy."""
    links: tuple[Counts, ...]
    """What passed meanwhile."""

    @property
    def seconds(self) -> float:
        return self.gap_s + sum(self.steps_s)


@dataclass(frozen=True)
class Measured:
    """One job."""

    before: Stretch
    """The first round over free links, its first step left out."""
    shaped: Stretch
    """The second round."""
    after: Stretch
    """The third one's beginning, over free links."""

    def free_step_s(self) -> float:
        return mean((*self.before.steps_s, *self.after.steps_s))


def main(
    inner_steps: Annotated[int, typer.Option(min=3, help="H.")] = 20,
    overlap_steps: Annotated[int, typer.Option(min=1, help="Of the job whose rounds overlap.")] = 2,
    batch: Annotated[int, typer.Option(min=4, help="Pieces of an inner step.")] = 16,
    piece_tokens: Annotated[int, typer.Option(min=8, help="Tokens of a piece.")] = 256,
    microbatches: Annotated[int, typer.Option(min=0, help="Of a batch; 0: as a job has by default.")] = 16,
    threads: Annotated[int, typer.Option(min=1, help="Of torch, in every process.")] = 1,
    json_to: Annotated[str, typer.Option("--json", help="Write the result to this file; -: to stdout.")] = "",
    save: Annotated[bool, typer.Option("--save", help="Keep the result in benchmarks/results.")] = False,
) -> None:
    """Train over long links and over free ones in turn."""
    origin = provenance(threads)
    schedule = {
        "inner_steps": inner_steps,
        "batch_size": batch,
        "max_length": piece_tokens,
        "microbatches": microbatches or "auto",
    }
    with ExitStack() as stack:
        swarm = TrainingSwarm(stack, threads)
        waits = swarm.train("waits", schedule)
        overlaps = swarm.train("overlaps", schedule | {"overlap_steps": overlap_steps})
    rows = {"waits": row(waits), "overlaps": row(overlaps)}
    result = {
        "compute_share": rows["overlaps"]["compute_share"],
        "compute_share_no_overlap": rows["waits"]["compute_share"],
        "over_unshaped": rows["overlaps"]["over_unshaped"],
        "over_unshaped_no_overlap": rows["waits"]["over_unshaped"],
        "bytes_per_token": rows["overlaps"]["bytes_per_token"],
        "link_rate": {f"{speed}x": needed(overlaps, speed) for speed in (10, 100)},
        **schedule,
        "overlap_steps": overlap_steps,
        "tokens_per_step": round(overlaps.shaped.tokens / inner_steps),
        "rtt_ms": 2 * DELAY_MS,
        "mbit": MBIT,
        **rows,
    }
    publish("wan_training", result, origin, json_to, save)


class TrainingSwarm:
    """Two nodes and a coordinator, each link of theirs behind the proxy."""

    def __init__(self, stack: ExitStack, threads: int) -> None:
        self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="swarm-wan-training-")))
        self._identity = Identity.generate()
        join, _ = start_swarm(stack, self._folder, smollm2_folder(), (), threads)
        self._join = parse_join(start_coordinator(stack, self._folder, join))
        ports = free_ports(len(SPANS))
        targets = [*(f"127.0.0.1:{port}" for port in ports), *[self._join.coordinator] * len(SPANS)]
        self._links = LinkProcess(stack, self._folder, targets, 0.0, 0.0)
        self._nodes: list[Side] = []
        for number, (span, port) in enumerate(zip(SPANS, ports, strict=True)):
            dialled, coordinator = self._links.ports[number], self._links.ports[len(SPANS) + number]
            own = self._join.with_coordinator(f"127.0.0.1:{coordinator}", self._join.tls_fingerprint).encode()
            options = ("--port", str(port), "--announce", f"/ip4/127.0.0.1/tcp/{dialled}")
            self._nodes.append(start_node(stack, self._folder, f"node-{number}", own, span, threads, options))
        for node in self._nodes:
            node.hear()

    def train(self, name: str, schedule: Json) -> Measured:
        """One job, which is stopped in its third round."""
        steps = int(schedule["inner_steps"])
        self._links.reshape(0.0, 0.0)
        asyncio.run(self._with_coordinator(lambda client: self._submit(client, name, schedule)))
        self._wait_for(name, 1, 1)
        before = self._stretch(name, 1, range(2, steps + 1), self._counted())
        _tell(f"{name}, round 1 over free links", before)
        self._links.reshape(DELAY_MS, MBIT)
        shaped = self._stretch(name, 2, range(1, steps + 1), self._counted())
        _tell(f"{name}, round 2 over {MBIT:g} Mbit/s and {2 * DELAY_MS:g} ms", shaped)
        self._links.reshape(0.0, 0.0)
        # As many as see the update applied, where it comes late.
        few = min(steps, int(schedule.get("overlap_steps", 0)) + 2)
        after = self._stretch(name, 3, range(1, few + 1), self._counted())
        _tell(f"{name}, round 3 over free links", after)
        asyncio.run(self._with_coordinator(lambda client: client.stop_job(name)))
        payload = shaped.links[HOP]
        if sum(c.up_bytes + c.down_bytes for c in payload) < shaped.tokens * 4 * 576:
            raise RuntimeError("the activations did not pass the proxy")
        return Measured(before, shaped, after)

    async def _with_coordinator(self, action: Callable[[CoordinatorClient], Awaitable[pb.JobStatus]]) -> None:
        """As the job's owner, and not over a shaped link."""
        client = await CoordinatorClient.connect(self._join.coordinator, self._join.tls_fingerprint, self._identity)
        await action(client)
        await client.close()

    async def _submit(self, client: CoordinatorClient, name: str, schedule: Json) -> pb.JobStatus:
        data = self._folder / "reviews.txt"
        data.write_text("\n".join(movie_reviews(range(2000))), encoding="utf-8")
        source = load_source(data)
        spec = JobSpec.model_validate({"name": name, "data": {"train": data}, "schedule": {**schedule, "rounds": 3}})
        digest = await client.put_blob(source.data)
        request = pb.SubmitJobRequest(
            hello=hello(self._join.model_hash, ("train",)),
            spec_json=spec.model_dump_json(),
            dataset=digest,
            dataset_size=len(source.data),
            samples=source.samples,
        )
        return await client.submit_job(request)

    def _counted(self) -> tuple[list[float], list[Counts]]:
        """CPU seconds of nodes and proxy, and what passed the links, so far."""
        families = [*(node.family() for node in self._nodes), self._links.family()]
        cpu_s = [cpu_seconds(family) for family in families]
        return cpu_s, self._links.counts()

    def _stretch(self, job: str, number: int, steps: range, before: tuple[list[float], list[Counts]]) -> Stretch:
        """Those steps of a round, once they are done. `before`: what had been counted when the last one ended."""
        ended_s = self._wait_for(job, number, steps[-1])
        cpu_s, counts = self._counted()
        every = [step for step in self._nodes[0].all_logged("inner_step") if step["job"] == job]
        of_round = [step for step in every if step["round"] == number]
        first = every.index(of_round[0]) + steps[0] - 1
        chosen = every[first : first + len(steps)]
        seconds = tuple(float(step["took_s"]) for step in chosen)
        return Stretch(
            ended_s - _unix_s(every[first - 1]) - sum(seconds),
            seconds,
            sum(int(step["tokens"]) for step in chosen),
            tuple(now - then for then, now in zip(before[0], cpu_s, strict=True)),
            tuple(_passed(then, now) for then, now in zip(before[1], counts, strict=True)),
        )

    def _wait_for(self, job: str, number: int, step: int) -> float:
        """Unix time of the end of a round's inner step. Raises RuntimeError: a node gave it up, or it is late."""
        until_s = time.monotonic() + _LONGEST_ROUND_S
        while time.monotonic() < until_s:
            for entry in self._nodes[0].all_logged("inner_step"):
                if (entry["job"], entry["round"], entry["step"].partition("/")[0]) == (job, number, str(step)):
                    return _unix_s(entry)
            failed = [entry for node in self._nodes for entry in node.all_logged("round_failed")]
            if failed:
                raise RuntimeError(json.dumps(failed))
            time.sleep(_LOOK_S)
        raise RuntimeError(f"step {step} of round {number} of job {job} did not end in {_LONGEST_ROUND_S:.0f} s")


def row(job: Measured) -> Json:
    """Shares, times and bytes of one job."""
    shaped, steps = job.shaped, len(job.shaped.steps_s)
    free_steps_s = steps * job.free_step_s()
    busier = max(shaped.cpu_s[: len(SPANS)])
    return {
        "compute_share": round(free_steps_s / shaped.seconds, 4),
        "over_unshaped": round((job.after.gap_s + free_steps_s) / shaped.seconds, 4),
        "busiest_cpu_share": round(busier / shaped.seconds, 4),
        "proxy_cpu_share": round(shaped.cpu_s[-1] / shaped.seconds, 4),
        "round_s": round(shaped.seconds, 2),
        "gap_s": {"shaped": round(shaped.gap_s, 3), "free": round(job.after.gap_s, 3)},
        "step_s": {"shaped": spread(shaped.steps_s), "free": spread((*job.before.steps_s, *job.after.steps_s))},
        "bytes_per_token": {
            "hop_forth": _per_token(shaped, sum(c.up_bytes for c in shaped.links[HOP])),
            "hop_back": _per_token(shaped, sum(c.down_bytes for c in shaped.links[HOP])),
            "coordinator_up": _per_token(shaped, sum(c.up_bytes for c in shaped.links[COORDINATOR])),
            "coordinator_down": _per_token(shaped, sum(c.down_bytes for c in shaped.links[COORDINATOR])),
        },
    }


def needed(job: Measured, speed: int) -> Json:
    """What links of nodes so many times as fast must carry for a compute share of BAR. A calculation."""
    shaped = job.shaped
    step_tokens = shaped.tokens / len(shaped.steps_s)
    token_s = job.free_step_s() / step_tokens / speed
    forth = sum(c.up_bytes for c in shaped.links[HOP]) / shaped.tokens
    back = sum(c.down_bytes for c in shaped.links[HOP]) / shaped.tokens
    coordinator = sum(c.up_bytes + c.down_bytes for c in shaped.links[COORDINATOR]) / len(SPANS) / shaped.tokens
    spare_s = token_s * (1 / BAR - 1)
    return {
        "hidden": round(8e-6 * max(forth, back) / (token_s / BAR), 1),
        "unhidden": round(8e-6 * (forth + back + coordinator) / spare_s, 1),
        "step_s": round(token_s * step_tokens, 4),
        "tokens_for_delay": round(2 * 2e-3 * DELAY_MS / (0.05 * token_s)),
    }


def _per_token(stretch: Stretch, size: int) -> float:
    return round(size / stretch.tokens, 2)


def _passed(then: Counts, now: Counts) -> Counts:
    return Counts(
        now.up_bytes - then.up_bytes, now.down_bytes - then.down_bytes, now.connections, now.open, now.most_held_bytes
    )


def _unix_s(entry: Json) -> float:
    return datetime.fromisoformat(str(entry["timestamp"])).timestamp()


def _tell(what: str, stretch: Stretch) -> None:
    """How far it is, for who waits."""
    typer.echo(
        f"{what}: {len(stretch.steps_s)} steps of {mean(stretch.steps_s):.2f} s, {stretch.gap_s:.2f} s beside them",
        err=True,
    )


if __name__ == "__main__":
    typer.run(main)
