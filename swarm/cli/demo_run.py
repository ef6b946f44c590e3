"""What the demo does, step by step: start processes, score, train, score again, prompt, report.

Every process is a `swarm` command of its own; this one only watches, scores over the swarm as any
client does, and ends what it started. Logs of all processes are under `logs/`.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import time
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from swarm.cli.jobs import job_dict, with_coordinator, write_folder
from swarm.client.coordinator import CoordinatorClient
from swarm.client.sampling import Sampling
from swarm.client.score import Question, Score, score
from swarm.client.swarm import SwarmClient
from swarm.errors import AdapterNotFound, SwarmError
from swarm.model.checkpoint import Checkpoint
from swarm.net.join import parse_join
from swarm.net.routing import find_route
from swarm.net.view import Hop
from swarm.samples import movie_sentences, review_chat, smollm2_folder, write_sentiment_jsonl
from swarm.wire.v1 import coordinator_pb2 as pb

JOB = "sentiment"
CHOICES = ("positive", "negative")
START_TIMEOUT_S = 90.0
ANNOUNCE_TIMEOUT_S = 60.0
_JOB_YAML = """\
# LoRA on movie-review sentiment; what is not said here has a default (docs/jobs.md).
name: {name}
method: {{kind: lora, r: 8, alpha: 16, targets: all-linear}}
data: {{train: train.jsonl}}
schedule: {{rounds: {rounds}, inner_steps: {inner_steps}, batch_size: 8, min_pipelines: 2}}
inner: {{lr: 1.0e-3}}
# In a handful of rounds outer momentum overshoots, and what is not sent at once hardly gets sent:
# every value at one bit beats the largest eighth at two (docs/experiments.md).
outer: {{lr: 1.0, momentum: 0.0, nesterov: false}}
uplink: {{density: 1.0, bits: 1, decay: 1.0}}
downlink: {{density: 1.0, bits: 4, decay: 1.0}}
"""


@dataclass(frozen=True)
class DemoSettings:
    out: Path
    rounds: int
    inner_steps: int
    held_out: int


class Processes:
    """`swarm` commands as child processes; ends them all, however the demo ends."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: list[tuple[str, asyncio.subprocess.Process]] = []

    async def start(self, name: str, *arguments: str) -> dict[str, Any]:
        """Start a command with `--json` and return its `ready` event."""
        environment = dict(os.environ, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
        with (self._logs / f"{name}.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "swarm.cli",
                *arguments,
                "--json",
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=environment,
                # Ctrl-C reaches this process alone, which then ends its children in order.
                start_new_session=True,
            )
        self._running.append((name, process))
        assert process.stdout is not None
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                line = await process.stdout.readline()
        except TimeoutError as error:
            raise SwarmError(f"{name} did not start within {START_TIMEOUT_S:.0f} s", f"see {log.name}") from error
        event: dict[str, Any] = json.loads(line or b"{}")
        if event.get("event") != "ready":
            problem = event.get("error", {})
            raise SwarmError(f"{name} did not start: {problem.get('cause', 'no reason given')}", f"see {log.name}")
        return event

    async def stop(self) -> None:
        """SIGTERM in reverse order, and wait."""
        for _, process in reversed(self._running):
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        for _, process in self._running:
            with suppress(TimeoutError):
                async with asyncio.timeout(20):
                    await process.wait()
            if process.returncode is None:
                process.kill()
                await process.wait()
        self._running.clear()


async def run_demo(settings: DemoSettings) -> None:
    """Run the demo and write `summary.json`. Raises SwarmError."""
    began = time.monotonic()
    console = Console()

    def tell(text: str) -> None:
        console.print(f"[dim]{time.monotonic() - began:5.0f} s[/dim]  {text}", highlight=False, soft_wrap=True)

    torch.set_num_threads(1)
    out = settings.out
    for old in ("logs", "data", "adapter", "summary.json"):
        path = out / old
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    logs = out / "logs"
    logs.mkdir(parents=True)
    tell("preparing SmolLM2-135M-Instruct and the Rotten Tomatoes sentences (20 s, the first time only)")
    model = str(await asyncio.to_thread(smollm2_folder))
    (out / "data").mkdir()
    write_sentiment_jsonl(out / "data" / "train.jsonl", "train", 4000)
    job_file = out / "data" / "job.yaml"
    job_file.write_text(_JOB_YAML.format(name=JOB, rounds=settings.rounds, inner_steps=settings.inner_steps))
    questions = [
        Question(tuple(review_chat(sample.text)), CHOICES, CHOICES.index(sample.label))
        for sample in movie_sentences("held_out", settings.held_out)
    ]
    async with AsyncExitStack() as stack:
        processes = Processes(logs)
        stack.push_async_callback(processes.stop)
        tell("starting a bootstrap node, a coordinator and three volunteers")
        join = await _start_swarm(processes, out, model)
        client = SwarmClient(parse_join(join), Checkpoint.open(model), out / "data" / "client.key")
        await stack.enter_async_context(client)
        view = await client.view()
        for node in view.nodes:
            tell(f"  node {node.peer_id[-8:]} serves blocks {node.span}")
        before = await _score(client, questions, "", tell)
        tell(f"before training: loss {before.loss:.3f}, accuracy {before.accuracy:.3f}")
        tell(f"job '{JOB}': {settings.rounds} rounds of {settings.inner_steps} inner steps on two pipelines")
        job = await _train(join, job_file, out, tell)
        await _adapter_announced(client, len(view.nodes))
        after = await _score(client, questions, JOB, tell)
        tell(f"after training: loss {after.loss:.3f}, accuracy {after.accuracy:.3f}")
        status, files, nodes = await with_coordinator(join, out / "data", _results)
        write_folder(out / "adapter", files)
        sample, tokens_per_s = await _prompt(client)
        tell(f"“{sample['prompt']}” → {sample['answer']}")
    summary = _summary(settings, before, after, status, nodes, job, sample, tokens_per_s)
    summary["seconds"] = round(time.monotonic() - began, 1)
    (out / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    _table(console, summary)
    tell(f"adapter in PEFT's format: {out / 'adapter'}; summary: {out / 'summary.json'}; logs: {logs}")


async def _start_swarm(processes: Processes, out: Path, model: str) -> str:
    data = out / "data"
    ready = await processes.start(
        "bootstrap", "bootstrap", "start", "--model", model, "--port", "0", "--data-dir", str(data / "bootstrap")
    )
    ready = await processes.start(
        "coordinator",
        *("coordinator", "start", "--join", ready["join"], "--port", "0"),
        *("--data-dir", str(data / "coordinator")),
    )
    join = str(ready["join"])
    await asyncio.gather(
        *(
            processes.start(
                name,
                *("node", "start", "--join", join, "--blocks", blocks, "--threads", "1"),
                *("--data-dir", str(data / name)),
            )
            for name, blocks in (("node-a", "0:15"), ("node-b", "15:30"), ("node-c", "0:30"))
        )
    )
    return join


async def _score(client: SwarmClient, questions: list[Question], adapter: str, tell: Any) -> Score:
    """Score over two disjoint chains side by side: half of the blocks on each of two nodes, and all on one."""
    view = await client.view()
    whole = next(node for node in view.nodes if len(node.span) == client.n_blocks)
    first = (Hop(whole.peer_id, whole.span, whole.addrs),)
    second = find_route(view.nodes, client.n_blocks, avoid={whole.peer_id}).hops
    async with AsyncExitStack() as stack:
        workers = []
        for hops in (first, second):
            scorer = await client.scorer(adapter, hops)
            stack.push_async_callback(scorer.close)
            workers.append(scorer.hidden)

        def progress(done: int, total: int) -> None:
            if done % 4 == 0 or done == total:
                tell(f"  scored {done} of {total} batches")

        return await score(questions, client.tokenizer, client.head.logits, workers, progress=progress)


async def _train(join: str, job_file: Path, out: Path, tell: Any) -> dict[str, Any]:
    """Submit the job as a person would and follow it to its end."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "swarm.cli", "job", "submit", str(job_file)),
        *("--join", join, "--data-dir", str(out / "data"), "--json"),
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise SwarmError("the job was not accepted", "see the lines above")
    assert json.loads(output)["name"] == JOB

    async def follow(client: CoordinatorClient) -> dict[str, Any]:
        shown_round, shown_steps = 0, ""
        while True:
            status = await client.get_job(JOB)
            for entry in status.history:
                if entry.phase == "committed" and entry.round > shown_round:
                    shown_round = entry.round
                    tell(
                        f"  round {entry.round} of {status.rounds}: training loss {entry.loss:.3f},"
                        f" {entry.contribution_bytes / 1e3:.0f} kB up, {entry.update_bytes / 1e3:.0f} kB update,"
                        f" {entry.seconds:.0f} s, parameters {entry.params_hash.hex()[:8]}"
                    )
            steps = ", ".join(f"step {p.inner_step} loss {p.loss:.2f}" for p in status.progress if p.inner_step)
            if steps and steps != shown_steps and status.state == "running":
                shown_steps = steps
                tell(f"  round {status.round}: {steps}")
            if status.state == "finished":
                return job_dict(status)
            if status.state == "paused":
                raise SwarmError(f"the job paused: {status.reason}", f"see the logs under {out / 'logs'}")
            await asyncio.sleep(2.0)

    return await with_coordinator(join, out / "data", follow)


async def _adapter_announced(client: SwarmClient, nodes: int) -> None:
    """Wait until every node holds the trained adapter."""
    try:
        async with asyncio.timeout(ANNOUNCE_TIMEOUT_S):
            while True:
                found = (await client.view()).adapter(JOB)
                if found is not None and len(found.holders) >= nodes:
                    return
                await asyncio.sleep(0.5)
    except TimeoutError as error:
        raise AdapterNotFound(
            f"not every node announced the trained adapter within {ANNOUNCE_TIMEOUT_S:.0f} s", "see the nodes' logs"
        ) from error


async def _results(client: CoordinatorClient) -> tuple[pb.JobStatus, dict[str, bytes], list[pb.NodeStatus]]:
    status = await client.get_job(JOB)
    files = {f.name: await client.get_blob(f.sha256, f.size) for f in status.adapter}
    return status, files, list((await client.list_jobs()).nodes)


async def _prompt(client: SwarmClient) -> tuple[dict[str, str], float]:
    """Ask the trained adapter about a fresh sentence, and time a longer answer of the base model."""
    review = "A warm, clever and beautifully acted film that I did not want to end."
    messages = [message.as_dict() for message in review_chat(review)]
    text = client.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = client.tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = await _generate(client, ids, 8, JOB)
    story = client.encode_prompt("Tell me a short story about a volunteer.")
    began = time.monotonic()
    tokens = await _generate(client, story, 48, "")
    elapsed_s = time.monotonic() - began
    return {"prompt": review, "answer": client.tokenizer.decode(answer, skip_special_tokens=True)}, len(
        tokens
    ) / elapsed_s


async def _generate(client: SwarmClient, ids: list[int], count: int, adapter: str) -> list[int]:
    session = await client.session(adapter)
    try:
        return [token async for token in session.generate(ids, count, Sampling(), client.stop_tokens())]
    finally:
        await session.close()


def _summary(
    settings: DemoSettings,
    before: Score,
    after: Score,
    status: pb.JobStatus,
    nodes: list[pb.NodeStatus],
    job: dict[str, Any],
    sample: dict[str, str],
    tokens_per_s: float,
) -> dict[str, Any]:
    contribution = sum(node.traffic.contribution_bytes for node in nodes)
    seconds = sum(entry["seconds"] for entry in job["history"])
    return {
        "eval_loss_before": round(before.loss, 4),
        "eval_loss_after": round(after.loss, 4),
        "accuracy_before": round(before.accuracy, 4),
        "accuracy_after": round(after.accuracy, 4),
        "rounds": settings.rounds,
        "inner_steps": settings.inner_steps,
        "contribution_bytes": contribution,
        "downlink_bytes": sum(node.traffic.downlink_bytes for node in nodes),
        "activation_bytes": sum(node.traffic.activation_bytes for node in nodes),
        "ddp_bf16_bytes": status.ddp_bf16_bytes,
        "saving": round(status.ddp_bf16_bytes / contribution, 1),
        "train_tokens_per_s": round(sum(entry["tokens"] for entry in job["history"]) / seconds, 1),
        "generate_tokens_per_s": round(tokens_per_s, 2),
        "sample": sample,
        "trainable_parameters": status.trainable_parameters,
        "held_out": before.questions,
        "params_hash": job["history"][-1]["params_hash"],
    }


def _table(console: Console, summary: dict[str, Any]) -> None:
    table = Table("what", "before", "after", title="SmolLM2-135M, LoRA r 8, movie-review sentiment")
    table.add_row("held-out loss", f"{summary['eval_loss_before']:.3f}", f"{summary['eval_loss_after']:.3f}")
    table.add_row(
        f"accuracy on {summary['held_out']} sentences",
        f"{summary['accuracy_before']:.3f}",
        f"{summary['accuracy_after']:.3f}",
    )
    console.print(table)
    table = Table("traffic of all nodes", "bytes")
    for name in ("contribution_bytes", "downlink_bytes", "activation_bytes", "ddp_bf16_bytes"):
        table.add_row(name.removesuffix("_bytes").replace("_", " "), f"{summary[name]:,}")
    table.add_row("saving against DDP in bfloat16", f"{summary['saving']:.0f} ×")
    table.add_row("training tokens/s", f"{summary['train_tokens_per_s']:.0f}")
    table.add_row("generated tokens/s", f"{summary['generate_tokens_per_s']:.1f}")
    console.print(table)
