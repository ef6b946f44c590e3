"""The Coordinator rpc service: one method a call, named as in coordinator.proto.

In: the verified peer id of the caller and the request. Out: the reply, or a SwarmError for the
caller. Long polls end within their `wait_s`, at once when what they wait for is there. Every call
counts as a sign of life of its caller. Decides nothing itself; blocks never.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import islice

from coordinator import views
from coordinator.blobs import Progress
from coordinator.driver import JobDriver
from coordinator.intake import Intake
from coordinator.jobs import Jobs
from coordinator.nodes import Nodes
from coordinator.owner import Owner
from coordinator.records import AdapterFile, NodeRecord
from coordinator.round_model import JobState
from coordinator.shared import Shared
from coordinator.signal import wait_until
from coordinator.turns import Turns
from swarm.errors import (
    BlobAbsent,
    ContributionError,
    CorruptData,
    DiskFull,
    FrameTooLarge,
    InputError,
    JobConflict,
    ResourceError,
    SpanError,
)
from swarm.ids import Span
from swarm.wire.v1 import coordinator_pb2 as pb
from swarm.wire.version import check_hello

_MAX_ADDRS = 64
_MAX_TEXT = 512
_MAX_HISTORY = 1000
_MAX_LISTED = 500
_LISTED_HISTORY = 10
_MAX_ADAPTERS = 100
_MAX_LINES = 500
_MOST_TOKEN_BLOCK_S = 60.0
"""Replies stay below the 8 MiB of a message: lists show the newest, a single job shows more rounds."""
_FINAL = frozenset({pb.VERDICT_ACCEPTED, pb.VERDICT_CLIPPED, pb.VERDICT_LATE, pb.VERDICT_REJECTED})


class CoordinatorService:
    """What `swarm.wire.rpc.RpcServer` calls."""

    def __init__(self, shared: Shared, nodes: Nodes, jobs: Jobs) -> None:
        self._shared = shared
        self._nodes = nodes
        self._jobs = jobs
        self._intake = Intake(shared.blobs, shared.settings, shared.clock)
        self._turns = Turns()
        self._adapters: tuple[asyncio.Event, pb.PollReply] | None = None

    # --- volunteers ---------------------------------------------------------------------------

    async def register(self, caller: str, request: pb.RegisterRequest) -> pb.RegisterReply:
        """Raises VersionError, ModelMismatch, SpanError, InputError, ResourceError."""
        check_hello(request.hello, self._shared.model.model_hash)
        record = self._node_record(caller, request)
        known = self._nodes.get(caller)
        if known is None and len(self._nodes) >= self._shared.settings.max_nodes:
            raise ResourceError(f"{len(self._nodes)} nodes are registered here already", "try again later")
        new = known is None or known.record != record
        if new:
            await asyncio.to_thread(self._store_node, record)
        self._nodes.register(record, self._now())
        driver = self._jobs.assigned(caller)
        pipeline = driver.assignment_of(caller) if driver else None
        if driver and pipeline:
            member = next(m for m in pipeline.members if m.peer == caller)
            if not record.span.covers(member.span):
                driver.node_lost(caller, f"{caller} came back with blocks {record.span}")
        if new:
            # Polls say who is registered, and where the nodes of a pipeline are reached.
            self._shared.assignments.notify()
        self._jobs.nodes_changed()
        return pb.RegisterReply(
            poll_every_s=self._shared.settings.poll_every_s, coordinator_id=self._shared.signer.peer_id
        )

    async def poll(self, caller: str, request: pb.PollRequest) -> pb.PollReply:
        async def changed() -> pb.PollReply | None:
            reply = self._poll_reply(caller)
            return None if reply.version == request.seen else reply

        wait_s = self._wait_s(request.wait_s)
        async with self._heard(caller, wait_s):
            self._note(caller, request)
            reply = await wait_until(changed, self._shared.assignments, wait_s, self._shared.clock)
        return reply or self._poll_reply(caller)

    async def lease(self, caller: str, request: pb.LeaseRequest) -> pb.LeaseReply:
        """Raises JobNotFound, ContributionError."""
        async with self._heard(caller):
            driver = self._jobs.find(request.job_id)
            lease, ahead = driver.lease(caller, request.round, request.generation, request.pipeline_id)
        reply = pb.LeaseReply(lease_id=lease.lease_id, ranges=views.sample_ranges(lease))
        if ahead is not None:
            reply.ahead.CopyFrom(pb.LeaseReply(lease_id=ahead.lease_id, ranges=views.sample_ranges(ahead)))
        return reply

    async def contribute(self, caller: str, request: pb.ContributeRequest) -> pb.Receipt:
        """Raises JobNotFound, StorageError; what is wrong with the contribution is in the receipt."""
        async with self._heard(caller):
            driver = self._jobs.find(request.job_id)
            return pb.Receipt.FromString(await self._intake.contribute(driver, caller, request))

    async def await_round(self, caller: str, request: pb.AwaitRoundRequest) -> pb.RoundReply:
        """Answers once the round is committed, or the caller's receipt is final before that.

        Raises JobNotFound, ContributionError: a round that is not open yet.
        """
        driver = self._jobs.find(request.job_id)
        if request.round > driver.state.round:
            raise ContributionError(
                f"round {request.round} is not open; round {driver.state.round} is", "poll for the assignment"
            )

        async def settled() -> pb.RoundReply | None:
            reply = await self._round_reply(driver, caller, request.round)
            return reply if reply.committed or reply.HasField("receipt") else None

        wait_s = self._wait_s(request.wait_s)
        async with self._heard(caller, wait_s):
            reply = await wait_until(settled, driver.changed, wait_s, self._shared.clock)
        return reply or await self._round_reply(driver, caller, request.round)

    async def abandon(self, caller: str, request: pb.AbandonRequest) -> pb.AbandonReply:
        """Raises JobNotFound, ContributionError: not a member of the pipeline."""
        async with self._heard(caller):
            driver = self._jobs.find(request.job_id)
            why = f"{request.reason.code} {request.reason.cause}".strip()[:_MAX_TEXT] or "given up by its lead"
            await driver.abandon(
                *(caller, request.round, request.generation, request.pipeline_id, why), request.reason.blame
            )
        return pb.AbandonReply()

    async def report_score(self, caller: str, request: pb.ReportScoreRequest) -> pb.ReportScoreReply:
        """Raises JobNotFound, ContributionError."""
        async with self._heard(caller):
            driver = self._jobs.find(request.job_id)
            await driver.report_score(
                *(caller, request.round, request.generation, request.pipeline_id, request.loss, request.tokens)
            )
        return pb.ReportScoreReply()

    # --- pieces -------------------------------------------------------------------------------

    async def put_piece(self, caller: str, request: pb.PutPieceRequest) -> pb.PutPieceReply:
        """A full disk has room made once. Raises FrameTooLarge, ProtocolError, CorruptData, StorageError."""
        limit = self._shared.settings.max_piece_bytes
        if len(request.data) > limit:
            raise FrameTooLarge(f"a piece of {len(request.data)} bytes is over the cap of {limit}")
        async with self._heard(caller):
            try:
                progress = await self._put(request)
            except DiskFull:
                await self._shared.collector.collect()
                progress = await self._put(request)
        return pb.PutPieceReply(committed=progress.committed, complete=progress.complete)

    async def _put(self, request: pb.PutPieceRequest) -> Progress:
        return await self._turns.take(
            self._shared.blobs.put_piece, request.sha256, request.size, request.offset, request.data
        )

    async def get_piece(self, caller: str, request: pb.GetPieceRequest) -> pb.GetPieceReply:
        """At most `max_piece_bytes`. Raises ProtocolError, BlobAbsent, BeingMade, CorruptData, StorageError."""
        length = min(request.length, self._shared.settings.max_piece_bytes)
        async with self._heard(caller):
            data = await self._piece(request.sha256, request.offset, length)
        return pb.GetPieceReply(data=data)

    async def _piece(self, blob: bytes, offset: int, length: int) -> bytes:
        """Of a blob; of one that is damaged or gone, once it is made again."""
        read = partial(self._turns.take, self._shared.blobs.read_piece, blob, offset, length)
        try:
            return await read()
        except (BlobAbsent, CorruptData) as error:
            lost = error
        try:
            if await self._jobs.remake(blob):
                return await read()
        except CorruptData as error:
            lost = error
        content = await self._jobs.past_file(blob)
        if content is None:
            raise lost
        return content[offset : offset + length]

    # --- researchers --------------------------------------------------------------------------

    async def submit_job(self, caller: str, request: pb.SubmitJobRequest) -> pb.JobStatus:
        """Raises ConfigError, VersionError, ModelMismatch, JobConflict, StorageError."""
        check_hello(request.hello, self._shared.model.model_hash)
        driver = await self._jobs.submit(
            *(caller, request.spec_json, request.dataset, request.dataset_size, request.samples),
            heldout=(request.heldout, request.heldout_size, request.heldout_samples),
        )
        return await self._status(driver)

    async def list_jobs(self, caller: str, request: pb.ListJobsRequest) -> pb.ListJobsReply:
        nodes = []
        for node in self._nodes.all():
            peer = node.record.peer
            reason = views.idle_reason(self._jobs.all(), peer)
            nodes.append(views.node_status(node, self._jobs.assigned(peer), reason, self._now()))
        newest = self._jobs.all()[-_MAX_LISTED:]
        return pb.ListJobsReply(jobs=[await self._status(d, _LISTED_HISTORY) for d in newest], nodes=nodes)

    async def get_job(self, caller: str, request: pb.GetJobRequest) -> pb.JobStatus:
        """Raises JobNotFound, JobConflict: there is no such round."""
        driver = self._jobs.find(request.job)
        wanted = request.adapter_round if request.HasField("adapter_round") else None
        return await self._status(driver, adapter_round=wanted)

    async def pause_job(self, caller: str, request: pb.GetJobRequest) -> pb.JobStatus:
        """Raises JobNotFound, NotJobOwner, JobConflict."""
        driver = self._jobs.find(request.job)
        await Owner(driver, self._shared, caller).pause()
        return await self._status(driver)

    async def stop_job(self, caller: str, request: pb.GetJobRequest) -> pb.JobStatus:
        """Raises JobNotFound, NotJobOwner, JobConflict."""
        driver = self._jobs.find(request.job)
        await Owner(driver, self._shared, caller).stop()
        return await self._status(driver)

    async def resume_job(self, caller: str, request: pb.ResumeJobRequest) -> pb.JobStatus:
        """Raises JobNotFound, NotJobOwner, JobConflict, StorageError, CorruptData."""
        driver = self._jobs.find(request.job)
        await Owner(driver, self._shared, caller).resume(request.round if request.HasField("round") else None)
        return await self._status(driver)

    async def change_job(self, caller: str, request: pb.ChangeJobRequest) -> pb.JobStatus:
        """Raises JobNotFound, NotJobOwner, JobConflict, ConfigError."""
        driver = self._jobs.find(request.job)
        await Owner(driver, self._shared, caller).change(dict(request.settings))
        return await self._status(driver)

    async def job_log(self, caller: str, request: pb.JobLogRequest) -> pb.JobLogReply:
        """Lines after `after`, at once if there are any. Raises JobNotFound."""
        driver = self._jobs.find(request.job)
        storage, job_id = self._shared.storage, driver.job.job_id

        async def newer() -> pb.JobLogReply | None:
            # Asked before the lines are read: a job that ends in between is seen by the next call.
            ended = driver.state.job is JobState.FINISHED
            lines = await asyncio.to_thread(storage.log, job_id, request.after, _MAX_LINES)
            if not lines and not ended:
                return None
            # Lines are durable before the state that they tell of is visible: who reads them may act on it.
            await driver.caught_up()
            finished = ended and len(lines) < _MAX_LINES
            return pb.JobLogReply(lines=[views.log_line(line) for line in lines], finished=finished)

        reply = await wait_until(newer, driver.changed, self._wait_s(request.wait_s), self._shared.clock)
        return reply or pb.JobLogReply()

    # --- parts --------------------------------------------------------------------------------

    def _poll_reply(self, caller: str) -> pb.PollReply:
        """Its version is a hash of what it says: the same before and after a restart."""
        drivers = self._jobs.all()
        reply = pb.PollReply(register_again=self._nodes.get(caller) is None)
        driver = self._jobs.assigned(caller)
        part = views.assignment(driver, caller, self._nodes) if driver else None
        if reply.register_again:
            reply.reason = "the coordinator does not know this node, or had given it up"
        elif part is not None:
            reply.assignment.CopyFrom(part)
            reply.reason = driver.reason if driver else ""
            reply.wrap_up = part.index == 0 and driver is not None and driver.state.wrapping
        else:
            reply.reason = views.idle_reason(drivers, caller)
        reply.MergeFrom(self._finished_adapters())
        digest = hashlib.sha256(reply.SerializeToString(deterministic=True)).digest()
        # Never 0: that is what a node that has seen nothing sends.
        reply.version = int.from_bytes(digest[:8], "little") or 1
        return reply

    def _finished_adapters(self) -> pb.PollReply:
        """The part of a poll's reply that is the same for all: made once after each notification."""
        ticket = self._shared.assignments.ticket()
        if self._adapters is None or self._adapters[0] is not ticket:
            found = (views.finished_adapter(driver) for driver in reversed(self._jobs.all()))
            newest = list(islice((adapter for adapter in found if adapter is not None), _MAX_ADAPTERS))
            self._adapters = ticket, pb.PollReply(adapters=reversed(newest))
        return self._adapters[1]

    async def _round_reply(self, driver: JobDriver, caller: str, round: int) -> pb.RoundReply:
        committed = round <= driver.committed_round
        reply = pb.RoundReply(
            committed=committed,
            reason="" if committed else driver.reason or f"round {round} is {driver.state.phase}",
            current_round=driver.state.round,
            finished=driver.state.job == "finished",
        )
        stored = await driver.stored_receipt(round, caller)
        receipt = pb.Receipt.FromString(stored) if stored else None
        if receipt is not None and receipt.verdict in _FINAL:
            reply.receipt.CopyFrom(receipt)
        if committed:
            # An older round's update is gone: the newest one has the snapshot to go on from.
            kept = round if round in driver.published else driver.committed_round
            reply.update.CopyFrom(views.outer_update(kept, driver.published[kept]))
        return reply

    async def _status(
        self, driver: JobDriver, rounds: int = _MAX_HISTORY, adapter_round: int | None = None
    ) -> pb.JobStatus:
        if adapter_round is None:
            adapter_round = driver.adapter_round
        elif not 1 <= adapter_round <= driver.committed_round:
            raise JobConflict(
                f"job {driver.job.name} has not committed a round {adapter_round}",
                f"the newest that it has is {driver.committed_round}",
            )
        files = await self._adapter_files(driver, adapter_round) if adapter_round else ()
        storage, job_id = self._shared.storage, driver.job.job_id
        history = await asyncio.to_thread(storage.history, job_id, rounds)
        totals = await asyncio.to_thread(storage.totals, job_id)
        unix_s = self._shared.clock.unix()
        return views.job_status(driver, self._nodes, history, totals, unix_s, adapter_round, files)

    async def _adapter_files(self, driver: JobDriver, round: int) -> tuple[AdapterFile, ...]:
        """Of a committed round. They are made when they are read, if they are not kept (`Jobs.remake`)."""
        outcome = driver.published.get(round)
        if outcome is None:
            outcome = await asyncio.to_thread(self._shared.storage.outcomes.find, driver.job.job_id, round)
        return outcome.files if outcome is not None else ()  # it may have been discarded in between

    def _note(self, caller: str, request: pb.PollRequest) -> None:
        """Keep what a node says of itself; progress only of a job it leads, so that it is bounded."""
        node = self._nodes.get(caller)
        if node is None:
            return
        node.traffic = request.traffic
        driver = self._jobs.assigned(caller)
        if driver is not None and request.progress.job_id == driver.job.job_id:
            node.progress = request.progress

    def _node_record(self, caller: str, request: pb.RegisterRequest) -> NodeRecord:
        span = Span(request.span.start, request.span.end)
        n_blocks = self._shared.model.n_blocks
        if span.end > n_blocks:
            raise SpanError(f"span {span} ends beyond the model's {n_blocks} blocks")
        texts = (*request.addrs, request.device, request.dtype)
        if len(request.addrs) > _MAX_ADDRS or any(len(text) > _MAX_TEXT for text in texts):
            raise InputError(f"a node has at most {_MAX_ADDRS} addresses of {_MAX_TEXT} characters")
        # Written so that NaN means not known; whoever boasts is asked to train faster, no more.
        token_block_s = request.token_block_s if 0 < request.token_block_s < _MOST_TOKEN_BLOCK_S else 0.0
        return NodeRecord(caller, span, tuple(request.addrs), request.device, request.dtype, token_block_s)

    def _store_node(self, record: NodeRecord) -> None:
        with self._shared.storage.transaction("node"):
            self._shared.storage.put_node(record)

    def _wait_s(self, asked_s: float) -> float:
        # Written so that NaN means no wait.
        return min(asked_s, self._shared.settings.max_wait_s) if asked_s > 0 else 0.0

    def _now(self) -> float:
        return self._shared.clock.monotonic()

    @asynccontextmanager
    async def _heard(self, caller: str, wait_s: float = 0.0) -> AsyncIterator[None]:
        """The caller is there while its call goes on, at most `wait_s`, and when it ends."""
        if self._nodes.called(caller):
            self._jobs.nodes_changed()
        self._nodes.heard(caller, self._now(), wait_s)
        try:
            yield
        finally:
            self._nodes.heard(caller, self._now())
