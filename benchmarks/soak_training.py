"""Does a job come to the same end when its volunteers come and go all the time?

Six nodes with half of SmolLM2 each, real processes, train LoRA adapters on film reviews, every position labelled.
In the disturbed run one random thing happens every 20 seconds: a random node gets SIGKILL, or one that was killed
is started again on its own data folder. After `seconds` all are started, and the job is stopped: its open round
closes. The undisturbed run then trains as many samples, with the same nodes and settings.

`worse` is by how much the disturbed run's held-out loss is above the other's, as a fraction; both are scored
here by plain PEFT on reviews that neither saw. `twice`: positions of the sample order that were accepted more
than once; `outstanding`: those given back and not leased again when the job ended; `miscounted`: accepted
pipelines whose lease is not as long as what they say they trained. `false_refusals`: contributions that were
rejected, though every node is honest (late ones are counted apart).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import uvloop

from benchmarks.processes import Side, start_coordinator, start_node, start_swarm
from benchmarks.provenance import provenance, publish
from benchmarks.reviews import movie_reviews
from benchmarks.soak_ledger import Accounts, accounts
from swarm.cli.jobs import with_coordinator, write_folder
from swarm.client.coordinator import CoordinatorClient
from swarm.config import load_job
from swarm.data.batch import collate
from swarm.data.sources import load_source
from swarm.data.text import text_pieces
from swarm.logs import configure
from swarm.model.checkpoint import Checkpoint
from swarm.net.join import parse_join
from swarm.samples import smollm2_folder
from swarm.wire.v1 import coordinator_pb2 as pb
from swarm.wire.version import hello

NODES = {f"{half}-{number}": span for number in (1, 2, 3) for half, span in (("front", "0:15"), ("back", "15:30"))}
"""Six nodes of half of SmolLM2 each: up to three pipelines."""
PIPELINES = 3
INNER_STEPS, BATCH, TOKENS = 2, 2, 64
_ROUND_SAMPLES = PIPELINES * INNER_STEPS * BATCH
_HELD_OUT, _TRAIN = range(300, 350), range(350, 1350)
"""Numbers of reviews. More to train on than a run reads: where samples came a third time,
held-out loss rose by 1% within three rounds, faults or not."""
_JOB = f"""\
name: soak
data: {{train: train.txt}}
schedule: {{rounds: %d, inner_steps: {INNER_STEPS}, batch_size: {BATCH}, max_length: {TOKENS}}}
inner: {{lr: 1.0e-3, start: own}}
outer: {{lr: 1.0, momentum: 0.0, nesterov: false}}
uplink: {{density: 0.03125, bits: 2}}
downlink: {{density: 0.125, bits: 4, decay: 1.0}}
"""
"""Settings of `benchmarks.convergence` at H = 10."""
_EVERY_S = 20.0
_MOST_DOWN = 3
_WORST = 0.01


def main(
    seconds: Annotated[float, typer.Option(min=40, help="Of kills and starts.")] = 600.0,
    seed: Annotated[int, typer.Option(help="Of who is killed and started.")] = 0,
    json_to: Annotated[str, typer.Option("--json", help="Write the result to this file; -: to stdout.")] = "",
    save: Annotated[bool, typer.Option("--save", help="Keep the result in benchmarks/results.")] = False,
) -> None:
    """Kill and start the nodes of a job, and compare it with one that was left alone."""
    configure("error", role="client")
    torch.set_num_threads(1)
    origin = provenance(1)
    with tempfile.TemporaryDirectory(prefix="swarm-soak-") as name:
        folder = Path(name)
        disturbed = _run(folder / "disturbed", 100_000, Disturbance(seconds, random.Random(seed)))
        rounds = -(-disturbed.accounts.accepted // _ROUND_SAMPLES)
        plain = _run(folder / "undisturbed", rounds, None)
        before, left_alone, loss = (_held_out(run) for run in (None, plain.adapter, disturbed.adapter))
    result = {
        "worse": round(loss / left_alone - 1, 5),
        "loss_disturbed": round(loss, 4),
        "loss_undisturbed": round(left_alone, 4),
        "loss_before": round(before, 4),
        "gain_kept": round((before - loss) / (before - left_alone), 4),
        **disturbed.shown(),
        "undisturbed": plain.shown(),
        "seconds": seconds,
        "seed": seed,
    }
    publish("soak_training", result, origin, json_to, save)
    faults = ("twice", "outstanding_too_many", "miscounted", "false_refusals", "pauses")
    if result["worse"] > _WORST or any(run.shown()[fault] for run in (disturbed, plain) for fault in faults):
        raise typer.Exit(1)


@dataclass(frozen=True)
class Disturbance:
    seconds: float
    chance: random.Random


@dataclass(frozen=True)
class Run:
    """One job, from its submission to its exported adapter."""

    adapter: Path
    accounts: Accounts
    seconds: float
    kills: int
    starts: int
    errors: Counter[str]
    """Lines of level error in any log, by event."""
    warnings: Counter[str]

    def shown(self) -> dict[str, Any]:
        return {
            **self.accounts.shown(),
            "job_seconds": round(self.seconds, 1),
            "kills": self.kills,
            "starts": self.starts,
            "errors": dict(self.errors),
            "warnings": dict(self.warnings),
        }


def _run(root: Path, rounds: int, disturbance: Disturbance | None) -> Run:
    """A swarm of its own, ended afterwards."""
    root.mkdir()
    (root / "train.txt").write_text("\n\n".join(movie_reviews(_TRAIN)))
    (root / "job.yaml").write_text(_JOB % rounds)
    with ExitStack() as stack:
        join, _ = start_swarm(stack, root, smollm2_folder(), (), 1)
        join = start_coordinator(stack, root, join)
        nodes = _Nodes(stack, root, join)
        nodes.start_all()
        seconds = uvloop.run(_job(root, join, nodes, disturbance))
    errors, warnings = _complaints(root)
    return Run(
        root / "adapter",
        accounts(root / "coordinator" / "coordinator.db", BATCH, _ROUND_SAMPLES, _samples()),
        *(seconds, nodes.kills, nodes.starts, errors, warnings),
    )


class _Nodes:
    """The six nodes; each life has its own log, all lives of one their data folder."""

    def __init__(self, stack: ExitStack, root: Path, join: str) -> None:
        self._stack, self._root, self._join = stack, root, join
        self._up: dict[str, Side] = {}
        self._lives: Counter[str] = Counter()
        self.kills = self.starts = 0

    @property
    def down(self) -> list[str]:
        return [name for name in NODES if name not in self._up]

    def start_all(self) -> None:
        for name in self.down:
            self.start(name)
        for node in self._up.values():
            if not node.ready:
                node.hear()

    def start(self, name: str) -> None:
        """Without waiting: it loads its weights while the others work."""
        self._lives[name] += 1
        life = f"{name}-life-{self._lives[name]}"
        self._up[name] = start_node(self._stack, self._root, life, self._join, NODES[name], 1, data=name)
        self.starts += self._lives[name] > 1

    def kill(self, name: str) -> None:
        node = self._up.pop(name)
        os.kill(node.pid, signal.SIGKILL)
        node.wait()
        self.kills += 1

    def disturb(self, chance: random.Random) -> str:
        """Kill or start one; returns what was done."""
        if self.down and (len(self.down) == _MOST_DOWN or chance.random() < 0.5):
            name = chance.choice(self.down)
            self.start(name)
            return f"started {name}"
        name = chance.choice(sorted(self._up))
        self.kill(name)
        return f"killed {name}"


async def _job(root: Path, join: str, nodes: _Nodes, disturbance: Disturbance | None) -> float:
    """Submit, disturb if asked to, wait for the end, export. Returns the seconds it took."""
    spec = load_job(root / "job.yaml")
    train = load_source(spec.data.train)

    async def work(client: CoordinatorClient) -> float:
        digest = await client.put_blob(train.data)
        request = pb.SubmitJobRequest(
            hello=hello(parse_join(join).model_hash, ("train",)),
            spec_json=spec.model_dump_json(),
            dataset=digest,
            dataset_size=len(train.data),
            samples=train.samples,
        )
        await client.submit_job(request)
        began = time.monotonic()
        if disturbance is not None:
            await _disturb(client, nodes, disturbance)
            nodes.start_all()
            await client.stop_job("soak")
        status = await _finished(client)
        seconds = time.monotonic() - began
        files = {file.name: await client.get_blob(file.sha256, file.size) for file in status.adapter}
        write_folder(root / "adapter", files)
        return seconds

    return await with_coordinator(join, root / "client", work)


async def _disturb(client: CoordinatorClient, nodes: _Nodes, disturbance: Disturbance) -> None:
    await _committed(client, 1)  # from here on it is training, not loading
    until = time.monotonic() + disturbance.seconds
    while time.monotonic() + _EVERY_S < until:
        await asyncio.sleep(_EVERY_S)
        done = nodes.disturb(disturbance.chance)
        status = await client.get_job("soak")
        print(f"{until - time.monotonic():4.0f} s left: {done}; round {status.round} {status.reason}", flush=True)
    await asyncio.sleep(until - time.monotonic())


async def _committed(client: CoordinatorClient, round: int) -> None:
    request = pb.AwaitRoundRequest(job_id=(await client.get_job("soak")).job_id, round=round, wait_s=20)
    while not (await client.await_round(request)).committed:
        pass


async def _finished(client: CoordinatorClient) -> pb.JobStatus:
    """The status of the ended job. A job that pauses by itself is resumed; the log says that it did."""
    while True:
        status = await client.get_job("soak")
        if status.state == "finished":
            return status
        if status.state == "paused":
            await client.resume_job("soak")
        await asyncio.sleep(1.0)


def _complaints(root: Path) -> tuple[Counter[str], Counter[str]]:
    """Events of all logs at level error and at level warning; a traceback outside the log is an error too."""
    found: dict[str, Counter[str]] = {"error": Counter(), "warning": Counter()}
    for path in sorted(root.glob("*.log")):
        for line in path.read_text(errors="replace").splitlines():
            with suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict) and entry.get("level") in found:
                    found[entry["level"]][str(entry.get("event"))] += 1
                continue
            found["error"]["traceback"] += line.startswith("Traceback")
    return +found["error"], found["warning"]


def _samples() -> int:
    """Samples of an epoch."""
    tokenizer = Checkpoint.open(str(smollm2_folder())).tokenizer()
    return len(text_pieces(tokenizer, ["\n\n".join(movie_reviews(_TRAIN))], TOKENS))


@torch.inference_mode()
def _held_out(adapter: Path | None) -> float:
    """Mean loss of a token of the held-out reviews, by plain `transformers` and PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    tokenizer = Checkpoint.open(str(smollm2_folder())).tokenizer()
    pieces = sorted(text_pieces(tokenizer, movie_reviews(_HELD_OUT), TOKENS), key=lambda piece: len(piece.input_ids))
    total = count = 0.0
    for start in range(0, len(pieces), 8):
        batch = collate(pieces[start : start + 8], 0)
        total += float(model(input_ids=batch.input_ids_BT, labels=batch.labels_BT).loss) * batch.label_tokens
        count += batch.label_tokens
    return total / count


if __name__ == "__main__":
    typer.run(main)
