"""A coordinator with simulated nodes in one process: real codec payloads, real SQLite, no network.

Every simulated node is a pure function of what the coordinator tells it, so a run that is cut
anywhere and started again must end with the same parameters as one that was not.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray
from safetensors.numpy import save

from coordinator.app import Coordinator
from coordinator.ports import CoordinatorSettings, ModelFacts, Tensors
from coordinator.service import CoordinatorService
from swarm.compress import FrameContext, decode, encode
from swarm.config import LoraMethod, job_from_json
from swarm.errors import ContributionError, JobConflict, SyncFailed
from swarm.identity import Identity, verify
from swarm.ids import HEAD, Span, block_of, seed_from, sha256
from swarm.optim.params import block_hash, by_block, params_hash, unpack_block
from swarm.wire.v1 import common_pb2
from swarm.wire.v1 import coordinator_pb2 as pb
from swarm.wire.version import hello

F32 = NDArray[np.float32]
MODEL_HASH = sha256(b"tiny model")
HELDOUT = b'{"messages": [ ]}\n' * 8
DATASET = b'{"messages": []}\n' * 64


class TinyAdapters:
    """A real AdapterSource in numpy: two small matrices a block, and one tensor of the head."""

    def __init__(self, n_blocks: int = 4, *, head: bool = True) -> None:
        self._n_blocks = n_blocks
        self._head = head

    def shapes(self, method: LoraMethod) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for block in range(self._n_blocks):
            shapes[f"{block}/q.lora_A"] = (method.r, 16)
            shapes[f"{block}/q.lora_B"] = (16, method.r)
        if self._head:
            shapes["head/soft_prompt"] = (3, 16)
        return shapes

    def initial(self, method: LoraMethod, seed: int) -> dict[str, F32]:
        return {key: _random(shape, "initial", seed, key, method.r) for key, shape in self.shapes(method).items()}

    def export(self, method: LoraMethod, params: Tensors, model_name: str) -> dict[str, bytes]:
        config = json.dumps({"peft_type": "LORA", "r": method.r, "base_model_name_or_path": model_name})
        return {
            "adapter_config.json": config.encode(),
            "adapter_model.safetensors": save({key: np.ascontiguousarray(v) for key, v in params.items()}),
        }


def model_facts(n_blocks: int = 4, *, head: bool = True) -> ModelFacts:
    return ModelFacts("tiny", "local", MODEL_HASH, n_blocks, TinyAdapters(n_blocks, head=head))


def identity(name: str = "coordinator") -> Identity:
    """The same key for the same name."""
    return Identity(Ed25519PrivateKey.from_private_bytes(sha256(name.encode())))


class ManualClock:
    """Stands still until a test moves it; whoever sleeps past the new time wakes in order."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []
        self._more_sleep = asyncio.Event()

    def monotonic(self) -> float:
        return self.now_s

    def unix(self) -> float:
        return 1_800_000_000.0 + self.now_s

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            return
        wake: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._more_sleep.set()
        self._sleepers.append((self.now_s + seconds, wake))
        await wake

    async def sleep_over(self, seconds: float) -> None:
        """Advance as soon as somebody sleeps who wakes exactly then."""
        while not any(due == self.now_s + seconds for due, wake in self._sleepers if not wake.done()):
            self._more_sleep.clear()
            await self._more_sleep.wait()
        self.advance(seconds)

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
        due = sorted((s for s in self._sleepers if s[0] <= self.now_s), key=lambda s: s[0])
        self._sleepers = [s for s in self._sleepers if s[0] > self.now_s and not s[1].done()]
        for _, wake in due:
            if not wake.done():
                wake.set_result(None)


def job_spec(**changes: object) -> str:
    """The JSON of a small job; `changes` replace whole sections."""
    sections: dict[str, object] = {
        "name": "poems",
        "data": {"train": "train.jsonl"},
        "method": {"r": 4},
        "schedule": {"rounds": 2, "inner_steps": 3, "batch_size": 2, "max_length": 16, "min_pipelines": 2},
        "outer": {"momentum": 0.5},
        "uplink": {"density": 0.25, "chunk": 64},
        "downlink": {"density": 0.5, "chunk": 64, "decay": 1.0},
    }
    return json.dumps(sections | changes)


def _random(shape: tuple[int, ...], *seed: object) -> F32:
    generator = np.random.Generator(np.random.Philox(key=seed_from(*seed)))
    return generator.uniform(-1, 1, shape).astype(np.float32)


async def upload(service: CoordinatorService, caller: str, data: bytes, pieces: int = 2) -> bytes:
    """Upload from wherever the coordinator says it stopped; returns the hash."""
    digest = sha256(data)
    asked = await service.put_piece(caller, pb.PutPieceRequest(sha256=digest, size=len(data)))
    step = -(-len(data) // pieces)
    while not asked.complete:
        piece = data[asked.committed : asked.committed + step]
        request = pb.PutPieceRequest(sha256=digest, size=len(data), offset=asked.committed, data=piece)
        asked = await service.put_piece(caller, request)
    return digest


async def download(service: CoordinatorService, caller: str, digest: bytes, size: int) -> bytes:
    data = b""
    while len(data) < size:
        request = pb.GetPieceRequest(sha256=digest, offset=len(data), length=1000)
        data += (await service.get_piece(caller, request)).data
    assert sha256(data) == digest
    return data


async def submit(service: CoordinatorService, caller: str, spec: str, dataset: bytes = DATASET) -> pb.JobStatus:
    digest = await upload(service, caller, dataset)
    request = pb.SubmitJobRequest(
        hello=hello(MODEL_HASH), spec_json=spec, dataset=digest, dataset_size=len(dataset), samples=64
    )
    if "eval" in json.loads(spec):
        request.heldout = await upload(service, caller, HELDOUT)
        request.heldout_size, request.heldout_samples = len(HELDOUT), 8
    return await service.submit_job(caller, request)


@dataclass
class SimNode:
    """A volunteer that follows the protocol. `params` are the whole job's, as it rebuilt them."""

    service: CoordinatorService
    name: str
    span: Span
    acknowledged: Callable[[pb.Receipt], None] = lambda receipt: None
    params: dict[str, F32] = field(default_factory=dict)
    at_round: int = -1
    hashes: dict[int, bytes] = field(default_factory=dict)
    receipts: dict[int, pb.Receipt] = field(default_factory=dict)
    leased: dict[tuple[int, int], list[tuple[int, int]]] = field(default_factory=dict)
    ahead: dict[int, pb.LeaseReply] = field(default_factory=dict)
    """What it was leased ahead, by the round it is for: the four nodes stay together."""
    lineage: int = 0
    slow_lead: str = ""
    """Pipelines led by the node of this name train until they are asked to wrap up: two inner steps."""
    blames: str = ""
    """As a lead it gives up every pipeline with the node of this name, as if that one were gone."""
    owner_interferes: bool = False
    """Rounds may be closed or discarded under the node's hands."""

    def __post_init__(self) -> None:
        self.peer = identity(self.name).peer_id

    async def register(self) -> pb.RegisterReply:
        return await self.service.register(
            self.peer,
            pb.RegisterRequest(
                hello=hello(MODEL_HASH),
                span=common_pb2.Span(start=self.span.start, end=self.span.end),
                addrs=[f"/ip4/127.0.0.1/tcp/1/p2p/{self.peer}"],
                device="cpu",
                dtype="float32",
            ),
        )

    async def poll(self, seen: int = 0, wait_s: float = 0.0) -> pb.PollReply:
        return await self.service.poll(self.peer, pb.PollRequest(seen=seen, wait_s=wait_s))

    async def assigned(self, old: pb.Assignment | None = None) -> pb.Assignment:
        """Wait until there is an assignment, and another one than `old`."""
        seen = 0
        while True:
            reply = await self.poll(seen, 30)
            if reply.HasField("assignment") and (old is None or _part_of(reply.assignment) != _part_of(old)):
                return reply.assignment
            seen = reply.version

    async def run(self) -> None:
        """Train whatever comes, until cancelled."""
        seen = 0
        done: set[tuple[str, int, int, int, int]] = set()
        while True:
            reply = await self.poll(seen, 30)
            seen = reply.version
            if reply.register_again:
                await self.register()
                continue
            part = reply.assignment
            key = _part_of(part)
            if part.score and part.index == 0:
                await self.score(part)
            if not reply.HasField("assignment") or key in done:
                continue
            done.add(key)
            try:
                if await self.gave_up(part):
                    continue
                receipt = await self.train(part)
                if self.owner_interferes and receipt.verdict in (pb.VERDICT_LATE, pb.VERDICT_REJECTED):
                    continue
                assert receipt.verdict in (pb.VERDICT_HELD, pb.VERDICT_ACCEPTED), receipt
                self.acknowledged(receipt)
                await self.settle_or_leave(part)
            except ContributionError:
                continue  # the round ended meanwhile: the next assignment is on its way

    async def gave_up(self, part: pb.Assignment) -> bool:
        blamed = identity(self.blames).peer_id if self.blames else ""
        if part.index or blamed not in [hop.peer_id for hop in part.hops]:
            # The node that others call gone is gone: it waits to be given up.
            return bool(self.blames) and self.peer == blamed
        request = pb.AbandonRequest(
            job_id=part.job_id,
            round=part.round,
            generation=part.generation,
            pipeline_id=part.pipeline_id,
            reason=common_pb2.Error(code="SW303", cause=f"{self.blames} went away", blame=blamed),
        )
        await self.service.abandon(self.peer, request)
        return True

    async def score(self, part: pb.Assignment) -> None:
        """Held-out losses that fall until round 2."""
        request = pb.ReportScoreRequest(
            job_id=part.job_id,
            round=part.round,
            generation=part.generation,
            pipeline_id=part.pipeline_id,
            loss=2.0 / part.round if part.round <= 2 else part.round,
            tokens=11,
        )
        await self.service.report_score(self.peer, request)

    async def train(self, part: pb.Assignment) -> pb.Receipt:
        """One round up to the held contribution."""
        await self.catch_up(part)
        lease = None
        if part.index == 0:
            lease = await self.service.lease(
                self.peer,
                pb.LeaseRequest(
                    job_id=part.job_id,
                    round=part.round,
                    generation=part.generation,
                    pipeline_id=part.pipeline_id,
                ),
            )
            key = (part.round, part.generation)
            self.leased[key] = [(r.start, r.end) for r in lease.ranges]
            if part.round in self.ahead and not self.owner_interferes:
                assert lease.lease_id == self.ahead[part.round].lease_id
                assert list(lease.ranges) == list(self.ahead[part.round].ranges)
            if lease.HasField("ahead"):
                self.ahead[part.round + 1] = lease.ahead
        if self.is_slow(part):
            await self.asked_to_wrap_up(part)
        frame = self.frame(part)
        digest = await upload(self.service, self.peer, frame)
        return await self.contribute(part, digest, len(frame), lease.lease_id if lease else 0)

    def is_slow(self, part: pb.Assignment) -> bool:
        return bool(self.slow_lead) and part.hops[0].peer_id == identity(self.slow_lead).peer_id

    async def asked_to_wrap_up(self, part: pb.Assignment) -> None:
        """By the job's log; the lead is told when it polls."""
        after = 0
        while True:
            request = pb.JobLogRequest(job=part.job_id, after=after, wait_s=30)
            lines = (await self.service.job_log(self.peer, request)).lines
            if any((line.kind, line.round) == ("wrap_up", part.round) for line in lines):
                break
            after = max([after, *(line.seq for line in lines)])
        if part.index == 0:
            told = await self.poll()
            # A contribution of an earlier life may be held: then the round may be over before this lead asks.
            assert told.wrap_up or _part_of(told.assignment) != _part_of(part)

    async def contribute(
        self, part: pb.Assignment, digest: bytes, size: int, lease: int, **changes: object
    ) -> pb.Receipt:
        spec = job_from_json(part.spec_json).schedule
        request = pb.ContributeRequest(
            job_id=part.job_id,
            round=part.round,
            generation=part.generation,
            pipeline_id=part.pipeline_id,
            payload_sha256=digest,
            payload_size=size,
            inner_steps=spec.inner_steps - self.is_slow(part),
            tokens=7,
            label_tokens=3 if self.is_slow(part) else 5,
            lease_id=lease,
            span=part.hops[part.index].span,
            loss=2.0 / part.round if part.index == 0 else None,
        )
        request.MergeFrom(pb.ContributeRequest(**changes))
        receipt = await self.service.contribute(self.peer, request)
        signature, receipt.signature = receipt.signature, b""
        verify(identity().peer_id, receipt.SerializeToString(deterministic=True), signature)
        receipt.signature = signature
        return receipt

    async def settle_or_leave(self, part: pb.Assignment) -> None:
        """Settle, but for a round that was discarded meanwhile: it is over when there is another assignment."""
        waits = [self.settle(part), self.assigned(part)] if self.owner_interferes else [self.settle(part)]
        tasks: list[asyncio.Task[Any]] = [asyncio.create_task(wait) for wait in waits]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()

    async def settle(self, part: pb.Assignment) -> None:
        """Wait for the round's end and keep the final receipt."""
        request = pb.AwaitRoundRequest(job_id=part.job_id, round=part.round, wait_s=30)
        while True:
            reply = await self.service.await_round(self.peer, request)
            if reply.HasField("receipt"):
                self.receipts[part.round] = reply.receipt
            if reply.committed or reply.finished or reply.HasField("receipt"):
                return

    def own_shapes(self, part: pb.Assignment) -> dict[str, tuple[int, ...]]:
        spec = job_from_json(part.spec_json)
        span = part.hops[part.index].span
        return {
            key: shape
            for key, shape in TinyAdapters().shapes(spec.method).items()
            if (part.index == 0 if block_of(key) == HEAD else span.start <= int(block_of(key)) < span.end)
        }

    def delta(self, part: pb.Assignment) -> dict[str, F32]:
        """A pseudo-gradient that depends on the samples, the node's blocks and the parameters."""
        samples = self.leased.get((part.round, part.generation))
        return {
            key: np.float32(0.1) * (self.params[key] + _random(shape, part.round, key, samples, self.name))
            for key, shape in self.own_shapes(part).items()
        }

    def frame(self, part: pb.Assignment, delta: dict[str, F32] | None = None) -> bytes:
        spec = job_from_json(part.spec_json)
        context = FrameContext(part.job_id, part.round, self.hashes[part.round - 1])
        return encode(delta or self.delta(part), spec.uplink, context)

    async def catch_up(self, part: pb.Assignment) -> None:
        """Bring the parameters to the start of the round: by the update if possible, else by snapshot."""
        request = pb.AwaitRoundRequest(job_id=part.job_id, round=part.round - 1)
        reply = await self.service.await_round(self.peer, request)
        if self.owner_interferes and not (reply.committed and reply.update.round == part.round - 1):
            raise ContributionError("the round was discarded")
        assert reply.committed
        if part.lineage != self.lineage:
            self.lineage, self.at_round = part.lineage, -1
        if self.at_round == part.round - 2 and reply.update.size:
            await self._apply(part, reply.update)
        else:
            await self._load(part, reply.update)
        hashes = {
            block: block_hash({key: self.params[key] for key in keys}) for block, keys in by_block(self.params).items()
        }
        assert params_hash(hashes) == reply.update.params_hash
        self.at_round = reply.update.round
        self.hashes[self.at_round] = reply.update.params_hash
        assert part.base_hash == self.hashes[part.round - 1]

    async def _apply(self, part: pb.Assignment, update: pb.OuterUpdate) -> None:
        data = await download(self.service, self.peer, update.blob, update.size)
        for piece in update.blocks:
            frame = data[piece.offset : piece.offset + piece.length]
            assert sha256(frame) == piece.sha256
            keys = by_block(self.params)[piece.block]
            old = {key: self.params[key] for key in keys}
            context = FrameContext(part.job_id, update.round, block_hash(old))
            decoded = decode(frame, {key: value.shape for key, value in old.items()}, context)
            for key in keys:
                self.params[key] = self.params[key] + decoded[key]
            assert block_hash({key: self.params[key] for key in keys}) == piece.params_hash

    async def _load(self, part: pb.Assignment, update: pb.OuterUpdate) -> None:
        data = await download(self.service, self.peer, update.snapshot, update.snapshot_size)
        shapes = TinyAdapters().shapes(job_from_json(part.spec_json).method)
        self.params = {}
        for piece in update.snapshot_blocks:
            block = data[piece.offset : piece.offset + piece.length]
            assert sha256(block) == piece.sha256
            of_block = {key: shape for key, shape in shapes.items() if block_of(key) == piece.block}
            self.params.update(unpack_block(block, of_block))


SPARE = ("e", Span(1, 4))
TWO_PIPELINES = (("a", Span(0, 2)), ("b", Span(2, 4)), ("c", Span(0, 2)), ("d", Span(1, 4)))


async def run_job(
    data_dir: Path,
    spec: str,
    settings: CoordinatorSettings,
    acknowledged: Callable[[pb.Receipt], None] = lambda receipt: None,
    owner: Callable[[CoordinatorService, str], Awaitable[None]] | None = None,
    slow_lead: str = "",
    dead: str = "",
    spans: Sequence[tuple[str, Span]] = TWO_PIPELINES,
) -> pb.JobStatus:
    """Open the folder, let the nodes `spans` finish the job (submitting it if need be), close. The clock stands.

    `owner` is what the submitter does meanwhile; it returns once the job has ended. With `dead`, the
    node of that name is given up by its lead whenever it is assigned. Raises SyncFailed if the
    coordinator stops for it.
    """
    coordinator = await Coordinator.open(data_dir, model_facts(), identity(), settings, ManualClock())
    try:
        async with asyncio.TaskGroup() as group:
            halted = group.create_task(coordinator.halted())
            status = await finish_job(coordinator.service, spec, acknowledged, owner, slow_lead, dead, spans)
            halted.cancel()
    except* SyncFailed as stopped:
        raise SyncFailed(str(stopped.exceptions[0])) from stopped
    finally:
        await coordinator.close()
    return status


async def finish_job(
    service: CoordinatorService,
    spec: str,
    acknowledged: Callable[[pb.Receipt], None],
    owner: Callable[[CoordinatorService, str], Awaitable[None]] | None,
    slow_lead: str,
    dead: str,
    spans: Sequence[tuple[str, Span]],
) -> pb.JobStatus:
    """What `run_job` does between opening and closing."""
    nodes = [SimNode(service, name, span, acknowledged) for name, span in spans]
    for node in nodes:
        node.owner_interferes, node.slow_lead, node.blames = owner is not None or bool(dead), slow_lead, dead
    for node in nodes:
        await node.register()
    try:
        job_id = (await submit(service, "researcher", spec)).job_id
    except JobConflict:
        job_id = (await service.get_job("researcher", pb.GetJobRequest(job="poems"))).job_id
    async with asyncio.TaskGroup() as group:
        working = [group.create_task(node.run()) for node in nodes]
        rounds = json.loads(spec)["schedule"]["rounds"]
        current = 1
        if owner is not None:
            await owner(service, job_id)
            current = rounds + 1
        while current <= rounds:
            request = pb.AwaitRoundRequest(job_id=job_id, round=current, wait_s=30)
            reply = await service.await_round("researcher", request)
            current = rounds + 1 if reply.finished else max(reply.current_round, current)
        for task in working:
            task.cancel()
    return await service.get_job("researcher", pb.GetJobRequest(job=job_id))


async def meddle(service: CoordinatorService, job_id: str) -> None:
    """An owner who changes a setting, pauses, rewinds to round 1, and stops after round 3.

    What is done already is read from the job's log, so that a coordinator that dies in between makes
    no difference.
    """
    caller, kinds, after = "researcher", set(), 0
    while True:
        reply = await service.job_log(caller, pb.JobLogRequest(job=job_id, after=after, wait_s=30))
        kinds |= {line.kind for line in reply.lines}
        after = max([after, *(line.seq for line in reply.lines)])
        status = await service.get_job(caller, pb.GetJobRequest(job=job_id))
        if status.state == "finished":
            return
        with suppress(JobConflict):  # the job has just gone on by itself: look again
            if "settings_changed" not in kinds and status.round >= 2:
                settings = {"inner.lr": "5e-4"}
                await service.change_job(caller, pb.ChangeJobRequest(job=job_id, settings=settings))
            elif "job_rewound" not in kinds and status.state == "paused":
                await service.resume_job(caller, pb.ResumeJobRequest(job=job_id, round=1))
            elif "job_rewound" not in kinds and status.round >= 3:
                await service.pause_job(caller, pb.GetJobRequest(job=job_id))
            elif "job_rewound" in kinds and status.round >= 4:
                await service.stop_job(caller, pb.GetJobRequest(job=job_id))


def _part_of(part: pb.Assignment) -> tuple[str, int, int, int, int]:
    """What one training of an assignment is of."""
    return part.job_id, part.lineage, part.round, part.generation, part.pipeline_id
