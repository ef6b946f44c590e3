"""What does a user notice when a node dies or freezes under a running session?

Two nodes for each half of SmolLM2-135M, one client that decodes greedily. In every trial a random node
of the session's chain gets SIGKILL or SIGSTOP: at a random token, or (one trial in five) at a random
moment of the prompt's prefill. `lost`: sessions that did not finish. `identical`: whether every text
is that of a run without faults. The stall is the longest gap between tokens (or until the first)
minus the same gap without faults; the 95th percentile over the trials is reported, by signal.

A killed node is started again before the next trial, a frozen one is thawed after the text is complete.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from typing import Annotated, Any

import torch
import typer
import uvloop

from benchmarks.processes import Side, start_node, start_swarm
from benchmarks.provenance import provenance, publish, spread
from swarm.logs import configure
from swarm.samples import smollm2_folder

SPANS = ("0:15", "0:15", "15:30", "15:30")
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
_PROMPTS = (
    "Tell me a story about the keeper of a lighthouse.",
    "Explain how rain forms, in five sentences.",
    "Write a letter to a friend who moved to another city. Mention the harbour, the old bakery, the library where "
    "you met, the long winter when the river froze, and the dog that followed you home one evening in March.",
    "What should one look for when buying a used bicycle? Think about the frame, the brakes, the wheels, the "
    "chain, the saddle, the price, and the questions to put to the person who sells it.",
)


@dataclass(frozen=True)
class _Run:
    tokens: list[int]
    gaps_s: list[float]
    """Until the first token, and between tokens."""
    rebuilt: int


def main(
    trials: Annotated[int, typer.Option(min=2, help="Of each signal.")] = 20,
    tokens: Annotated[int, typer.Option(min=8)] = 48,
    seed: int = 0,
    json_to: Annotated[str, typer.Option("--json", help="Write the result to this file; -: to stdout.")] = "",
    save: Annotated[bool, typer.Option("--save", help="Keep the result in benchmarks/results.")] = False,
) -> None:
    """Kill and freeze nodes under running sessions."""
    configure("error", role="client")
    torch.set_num_threads(1)
    origin = provenance(1)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="swarm-failover-")))
        join, nodes = start_swarm(stack, folder, smollm2_folder(), SPANS, 1)
        trial = _Trials(stack, folder, join, nodes, tokens, random.Random(seed))
        result = uvloop.run(trial.run(trials))
    publish("failover", result, origin, json_to, save)
    if result["lost"] or not result["identical"]:
        raise typer.Exit(1)


class _Trials:
    def __init__(
        self, stack: ExitStack, folder: Path, join: str, nodes: list[Side], tokens: int, chance: random.Random
    ) -> None:
        self._stack = stack
        self._folder = folder
        self._join = join
        self._nodes: dict[str, tuple[Side, str]] = {}
        for node, span in zip(nodes, SPANS, strict=True):
            self._nodes[node.ready["peer"]] = (node, span)
        self._tokens = tokens
        self._chance = chance
        self._clients = 0

    async def run(self, trials: int) -> dict[str, Any]:
        plain = {prompt: await self._generate(prompt, None, 0, 0.0) for prompt in _PROMPTS}
        stalls: dict[str, list[float]] = {"kill": [], "stop": []}
        lost: list[str] = []
        identical, unhit = True, 0
        for number in range(trials):
            for kind in _SIGNALS:
                prompt = self._chance.choice(_PROMPTS)
                reference = plain[prompt]
                at = 0 if self._chance.random() < 0.2 else self._chance.randrange(1, self._tokens - 4)
                wait_s = self._chance.random() * reference.gaps_s[0] if at == 0 else 0.0
                try:
                    run = await self._generate(prompt, kind, at, wait_s)
                except Exception as error:
                    lost.append(f"{kind} {number}: {error}")
                    continue
                identical = identical and run.tokens == reference.tokens
                unhit += not run.rebuilt
                stalls[kind].append(max(g - p for g, p in zip(run.gaps_s, reference.gaps_s, strict=True)))
                print(f"{kind} at {at}: {stalls[kind][-1]:.2f} s, {run.tokens == reference.tokens}", flush=True)
        return {
            "lost": len(lost),
            "identical": identical,
            "kill_stall_p95_s": _p95(stalls["kill"]),
            "stop_stall_p95_s": _p95(stalls["stop"]),
            "kill_stall": spread(stalls["kill"]),
            "stop_stall": spread(stalls["stop"]),
            "trials": trials,
            "not_noticed": unhit,
            "reasons": lost,
        }

    async def _generate(self, prompt: str, kind: str | None, at: int, wait_s: float) -> _Run:
        """One text, with a node of its chain killed or frozen before token `at`."""
        from swarm.client.sampling import Sampling
        from swarm.client.swarm import SwarmClient
        from swarm.model.checkpoint import Checkpoint
        from swarm.net.join import parse_join

        self._clients += 1
        identity = self._folder / f"client-{self._clients}" / "identity.key"
        identity.parent.mkdir()
        checkpoint = Checkpoint.open(str(smollm2_folder()))
        struck: list[str] = []
        async with SwarmClient(parse_join(self._join), checkpoint, identity, encoding="float32") as client:
            ids = client.encode_prompt(prompt)
            client.heads  # noqa: B018  # loaded before the clock starts
            await client.view()
            session = await client.session()

            async def strike() -> None:
                await asyncio.sleep(wait_s)
                hops = session.hops or await client.find_hops((), ())
                victim = self._chance.choice(list(hops)).peer_id
                struck.append(victim)
                os.kill(self._nodes[victim][0].pid, _SIGNALS[str(kind)])

            pending = asyncio.create_task(strike()) if kind and at == 0 else None
            tokens: list[int] = []
            seen_s = [time.perf_counter()]
            try:
                async for token in session.generate(ids, self._tokens, Sampling()):
                    tokens.append(token)
                    seen_s.append(time.perf_counter())
                    if kind and len(tokens) == at:
                        await strike()
            finally:
                if pending is not None:
                    await pending
                await session.close()
                for victim in struck:
                    await asyncio.to_thread(self._restore, victim, str(kind))
        return _Run(tokens, [after - before for before, after in pairwise(seen_s)], session.rebuilt)

    def _restore(self, victim: str, kind: str) -> None:
        node, span = self._nodes[victim]
        if kind == "stop":
            os.kill(node.pid, signal.SIGCONT)
            return
        node.wait()
        del self._nodes[victim]
        self._clients += 1
        new = start_node(self._stack, self._folder, f"node-again-{self._clients}", self._join, span, 1)
        new.hear()
        self._nodes[new.ready["peer"]] = (new, span)


def _p95(values: list[float]) -> float | None:
    if len(values) < 2:
        return None
    return round(quantiles(values, n=20, method="inclusive")[-1], 3)


if __name__ == "__main__":
    typer.run(main)
