"""Does a node still answer prompts while it trains, and still train while it answers?

One `swarm node` process holds all of SmolLM2-135M and is the whole pipeline of a real job: LoRA r 8 on all linear
layers, batches of 8 film reviews with every token labelled (the most that a head can have to do). A client in
another process decodes greedily, one session. `--threads` are torch's in each process: the node's serving and
training take turns on them (`swarm.baton`). The client stands for another machine: it, the coordinator and the
bootstrap have the last core with their libp2p daemons, in every phase, and the node may run on all. Three phases take
turns, round by round:

    idle       the job is paused; the client decodes
    alone      the job runs; nobody asks
    both       the job runs and the client decodes, one text after the other

    decode_p95_ratio   95th percentile of the time per token, both over idle
    training_ratio     trained tokens a second, both over alone; what ends a round counts where one ends within a phase

Training is counted in whole steps: of a phase, from the end of a step to that of another. A step that lies across two
phases would lend the slow one some of the other's speed.

Prefill is not timed; `first_token_s` says what it takes with the rest of a session's opening. All texts must be the
same, token for token; else the exit status is 1.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from itertools import chain, pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import typer

from benchmarks.processes import Side, cpu_seconds, run_command, start_coordinator, start_node, start_swarm
from benchmarks.provenance import provenance, publish, spread
from benchmarks.reviews import movie_reviews
from swarm.samples import smollm2_folder

_JOB = "reviews"
_REVIEWS = range(40, 440)
"""Earlier ones are for other benchmarks."""
_IDLE_TEXTS = 4
_LOOK_S, _REST = 1.0, 0.1
"""A node that used less than this share of a core for so long does nothing."""


def main(
    rounds: Annotated[int, typer.Option(min=2)] = 4,
    seconds: Annotated[float, typer.Option(min=10, help="Of each phase in which the job runs.")] = 40.0,
    tokens: Annotated[int, typer.Option(min=8, help="Of a text.")] = 64,
    threads: Annotated[int, typer.Option(min=1, help="Of torch, in every process.")] = 1,
    inner_steps: Annotated[int, typer.Option(min=1, help="Of a round of the job.")] = 4,
    json_to: Annotated[str, typer.Option("--json", help="Write the result to this file; -: to stdout.")] = "",
    save: Annotated[bool, typer.Option("--save", help="Keep the result in benchmarks/results.")] = False,
) -> None:
    """Decode idle, train alone, and do both, in turn."""
    origin = provenance(threads)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="swarm-both-")))
        bench = _Bench(stack, folder, tokens, threads, inner_steps)
        for number in range(rounds + 1):
            bench.take_turn(seconds if number else 10.0, counts=number > 0)
        result = bench.result()
    publish("serve_while_training", {**result, "rounds": rounds, "seconds": seconds}, origin, json_to, save)
    if not result["identical"]:
        raise typer.Exit(1)


class _Bench:
    """The processes, and what each phase gave."""

    def __init__(self, stack: ExitStack, folder: Path, tokens: int, threads: int, inner_steps: int) -> None:
        with _on_last_core():
            join, _ = start_swarm(stack, folder, smollm2_folder(), (), threads)
            self._join = start_coordinator(stack, folder, join)
        self._node = start_node(stack, folder, "node", self._join, "0:30", threads)
        self._node.hear()
        client_folder = folder / "client"
        arguments = ["benchmarks.decode_sides", "swarm", str(threads), self._join, str(client_folder)]
        with _on_last_core():
            self._client = Side(stack, "client", arguments, folder, {"OMP_WAIT_POLICY": "PASSIVE"})
        self._request = {"prompt_ids": self._client.hear()["prompt_ids"], "tokens": tokens, "how": "swarm"}
        self._owner = folder / "owner"
        self._idle_s: list[list[float]] = []
        self._both_s: list[list[float]] = []
        self._first_s: dict[str, list[float]] = {"idle": [], "both": []}
        self._alone_tok_s: list[float] = []
        self._both_tok_s: list[float] = []
        self._texts: set[tuple[int, ...]] = set()
        self._decode()
        (folder / "train.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in movie_reviews(_REVIEWS)))
        (folder / "job.yaml").write_text(
            f"name: {_JOB}\ndata: {{train: train.jsonl}}\nschedule: "
            f"{{rounds: 1000, inner_steps: {inner_steps}, batch_size: 8}}\n"
        )
        self._swarm("submit", str(folder / "job.yaml"))
        self._wait_steps(1)
        self._swarm("pause", _JOB)

    def take_turn(self, seconds: float, *, counts: bool) -> None:
        """All three phases once. The job is paused before and after."""
        self._wait_rest()
        idle_s = [gap for _ in range(_IDLE_TEXTS) for gap in self._decode("idle" if counts else "")]
        self._swarm("resume", _JOB)
        began_s = self._wait_step_after(time.time())
        middle_s = self._wait_step_after(began_s + seconds)
        both_s: list[float] = []
        while time.time() < middle_s + seconds or self._last_step_s() <= middle_s:
            both_s += self._decode("both" if counts else "")
        ended_s = self._last_step_s()
        if counts:
            self._idle_s.append(idle_s)
            self._both_s.append(both_s)
            self._alone_tok_s.append(tokens_per_s(self._steps(), began_s, middle_s))
            self._both_tok_s.append(tokens_per_s(self._steps(), middle_s, ended_s))
        self._swarm("pause", _JOB)

    def result(self) -> dict[str, Any]:
        idle, both = list(chain.from_iterable(self._idle_s)), list(chain.from_iterable(self._both_s))
        training = [b / a for b, a in zip(self._both_tok_s, self._alone_tok_s, strict=True)]
        p95 = [_percentile(b, 95) / _percentile(i, 95) for b, i in zip(self._both_s, self._idle_s, strict=True)]
        return {
            "decode_p95_ratio": round(_percentile(both, 95) / _percentile(idle, 95), 4),
            "training_ratio": round(sum(self._both_tok_s) / sum(self._alone_tok_s), 4),
            "identical": len(self._texts) == 1,
            "token_ms": {
                name: {f"p{rank}": round(1000 * _percentile(values, rank), 1) for rank in (50, 95, 99)}
                for name, values in (("idle", idle), ("both", both))
            },
            "first_token_s": {name: round(median(values), 3) for name, values in self._first_s.items()},
            "train_tok_s": {"alone": spread(self._alone_tok_s, 1), "both": spread(self._both_tok_s, 1)},
            "p95_ratio_spread": spread(p95),
            "training_ratio_spread": spread(training),
            "decoded": {"idle": len(idle), "both": len(both)},
            "texts": len(self._texts),
        }

    def _decode(self, phase: str = "") -> list[float]:
        """One text; the times between its tokens."""
        began = time.perf_counter()
        reply = self._client.ask(self._request)
        self._texts.add(tuple(reply["tokens"]))
        if phase:
            self._first_s[phase].append(reply["seen_s"][0] - began)
        return [after - before for before, after in pairwise(reply["seen_s"])]

    def _steps(self) -> list[dict[str, Any]]:
        return self._node.all_logged("inner_step")

    def _wait_steps(self, count: int) -> None:
        while len(self._steps()) < count:
            self._node.check()
            time.sleep(0.1)

    def _last_step_s(self) -> float:
        """When the newest step ended, by the clock."""
        return _ended_s(self._steps()[-1])

    def _wait_step_after(self, moment_s: float) -> float:
        """When the first step after that moment ended, as soon as it has."""
        while (ended_s := self._last_step_s()) <= moment_s:
            self._node.check()
            time.sleep(0.05)
        return ended_s

    def _wait_rest(self) -> None:
        """Until the node has ended the piece that it computed when the job was paused."""
        family = self._node.family()
        before, now = -1.0, cpu_seconds(family)
        while now - before > _REST * _LOOK_S:
            time.sleep(_LOOK_S)
            before, now = now, cpu_seconds(family)

    def _swarm(self, *command: str) -> None:
        run_command("job", *command, "--join", self._join, "--data-dir", str(self._owner))


@contextmanager
def _on_last_core() -> Iterator[None]:
    """Processes that are started within run there and nowhere else."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def tokens_per_s(steps: Sequence[dict[str, Any]], start_s: float, end_s: float) -> float:
    """Trained from the end of one step to that of another."""
    return sum(int(step["tokens"]) for step in steps if start_s < _ended_s(step) <= end_s) / (end_s - start_s)


def _ended_s(step: dict[str, Any]) -> float:
    return datetime.fromisoformat(str(step["timestamp"])).timestamp()


def _percentile(values: Sequence[float], rank: int) -> float:
    return quantiles(values, n=100, method="inclusive")[rank - 1]


if __name__ == "__main__":
    typer.run(main)
