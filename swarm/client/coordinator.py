"""Typed calls to a coordinator, for volunteers and researchers alike.

One method per rpc of `proto/swarm/v1/coordinator.proto`, plus whole blobs out of pieces, resumable
at any byte in both directions. Calls do not retry: who calls decides what an outage means. Only a file that is being
made is asked for until it is there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import TypeVar

import structlog
from google.protobuf.message import Message

from swarm.errors import BeingMade, CorruptData, ProtocolError
from swarm.identity import Identity
from swarm.metrics import Traffic
from swarm.wire.rpc import COORDINATOR_SERVICE, Channel
from swarm.wire.v1 import coordinator_pb2 as pb

PIECE_BYTES = 1024 * 1024
_CALL_TIMEOUT_S = 30.0
R = TypeVar("R", bound=Message)
log = structlog.get_logger()


class CoordinatorClient:
    """A connection to one coordinator. Counts its bytes into `traffic`."""

    def __init__(self, channel: Channel, traffic: Traffic | None = None) -> None:
        self._channel = channel
        self._traffic = traffic or Traffic()

    @classmethod
    async def connect(
        cls, address: str, fingerprint: bytes, identity: Identity, traffic: Traffic | None = None
    ) -> CoordinatorClient:
        """Raises CoordinatorLost, PinError."""
        return cls(await Channel.connect(address, fingerprint, identity), traffic)

    async def close(self) -> None:
        await self._channel.close()

    async def _call(
        self,
        name: str,
        request: Message,
        reply: type[R],
        *,
        wait_s: float = 0.0,
        sent: Callable[[int], None] | None = None,
    ) -> R:
        method = f"/{COORDINATOR_SERVICE.full_name}/{name}"
        return await self._channel.call(
            method, request, reply, _CALL_TIMEOUT_S + wait_s, sent=sent, received=self._count_downlink
        )

    def _count_downlink(self, size: int) -> None:
        self._traffic.downlink_bytes += size

    def _count_contribution(self, size: int) -> None:
        self._traffic.contribution_bytes += size

    async def register(self, request: pb.RegisterRequest) -> pb.RegisterReply:
        return await self._call("Register", request, pb.RegisterReply)

    async def poll(self, request: pb.PollRequest) -> pb.PollReply:
        return await self._call("Poll", request, pb.PollReply, wait_s=request.wait_s)

    async def lease(self, request: pb.LeaseRequest) -> pb.LeaseReply:
        return await self._call("Lease", request, pb.LeaseReply)

    async def contribute(self, request: pb.ContributeRequest) -> pb.Receipt:
        return await self._call("Contribute", request, pb.Receipt, sent=self._count_contribution)

    async def await_round(self, request: pb.AwaitRoundRequest) -> pb.RoundReply:
        return await self._call("AwaitRound", request, pb.RoundReply, wait_s=request.wait_s)

    async def abandon(self, request: pb.AbandonRequest) -> None:
        await self._call("Abandon", request, pb.AbandonReply)

    async def report_score(self, request: pb.ReportScoreRequest) -> None:
        await self._call("ReportScore", request, pb.ReportScoreReply)

    async def submit_job(self, request: pb.SubmitJobRequest) -> pb.JobStatus:
        return await self._call("SubmitJob", request, pb.JobStatus)

    async def list_jobs(self) -> pb.ListJobsReply:
        return await self._call("ListJobs", pb.ListJobsRequest(), pb.ListJobsReply)

    async def get_job(self, job: str, adapter_round: int | None = None) -> pb.JobStatus:
        """By id or name. Raises JobNotFound, JobConflict: the adapter of that round is not kept."""
        return await self._call("GetJob", pb.GetJobRequest(job=job, adapter_round=adapter_round), pb.JobStatus)

    async def pause_job(self, job: str) -> pb.JobStatus:
        """Raises JobNotFound, NotJobOwner, JobConflict; so do the three after it."""
        return await self._call("PauseJob", pb.GetJobRequest(job=job), pb.JobStatus)

    async def stop_job(self, job: str) -> pb.JobStatus:
        return await self._call("StopJob", pb.GetJobRequest(job=job), pb.JobStatus)

    async def resume_job(self, job: str, round: int | None = None) -> pb.JobStatus:
        """With `round`, the rounds after it are discarded."""
        return await self._call("ResumeJob", pb.ResumeJobRequest(job=job, round=round), pb.JobStatus)

    async def change_job(self, job: str, settings: Mapping[str, str]) -> pb.JobStatus:
        """Raises ConfigError too."""
        return await self._call("ChangeJob", pb.ChangeJobRequest(job=job, settings=settings), pb.JobStatus)

    async def job_log(self, job: str, after: int = 0, wait_s: float = 0.0) -> pb.JobLogReply:
        request = pb.JobLogRequest(job=job, after=after, wait_s=wait_s)
        return await self._call("JobLog", request, pb.JobLogReply, wait_s=wait_s)

    async def put_blob(self, data: bytes, *, contribution: bool = False) -> bytes:
        """Upload content in pieces from where the coordinator already is; returns its SHA-256."""
        digest = hashlib.sha256(data).digest()
        sent = self._count_contribution if contribution else None
        held = await self._put_piece(digest, len(data), 0, b"", None)
        while not held.complete:
            start = held.committed
            piece = data[start : start + PIECE_BYTES]
            if not piece:
                raise ProtocolError("the coordinator holds all bytes but does not call the blob complete")
            held = await self._put_piece(digest, len(data), start, piece, sent)
        return digest

    async def _put_piece(
        self, digest: bytes, size: int, offset: int, data: bytes, sent: Callable[[int], None] | None
    ) -> pb.PutPieceReply:
        request = pb.PutPieceRequest(sha256=digest, size=size, offset=offset, data=data)
        return await self._call("PutPiece", request, pb.PutPieceReply, sent=sent)

    async def get_blob(self, digest: bytes, size: int) -> bytes:
        """Download a whole blob and verify its SHA-256. Raises CorruptData."""
        content = await self.get_range(digest, 0, size)
        if hashlib.sha256(content).digest() != digest:
            raise CorruptData(f"the coordinator sent another content for blob {digest.hex()[:16]}")
        return content

    async def get_range(self, digest: bytes, offset: int, length: int) -> bytes:
        """A part of a blob; the caller verifies it."""
        content = bytearray()
        while len(content) < length:
            wanted = min(PIECE_BYTES, length - len(content))
            request = pb.GetPieceRequest(sha256=digest, offset=offset + len(content), length=wanted)
            try:
                piece = (await self._call("GetPiece", request, pb.GetPieceReply)).data
            except BeingMade as error:
                # It has waited for as long as a call may.
                log.warning("waiting", reason=error.cause)
                continue
            if not piece or len(piece) > wanted:
                raise ProtocolError(f"the coordinator sent {len(piece)} bytes where {wanted} were asked for")
            content += piece
        return bytes(content)
