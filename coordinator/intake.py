"""Whether a contribution may be held: everything that is checked before the state machine sees it.

In: a caller's ContributeRequest and the job's driver. Out: a signed receipt; a refused one is
typed, says why, and leaves no row behind. Decoding runs in a thread, few at a time, since each
holds its parameters in memory.
"""

from __future__ import annotations

import asyncio
import math

from coordinator.blobs import Blobs
from coordinator.driver import JobDriver
from coordinator.ports import Clock, CoordinatorSettings
from coordinator.records import ContributionRecord
from coordinator.results import shapes_of_member
from coordinator.round_events import Contribution
from coordinator.round_model import Pipeline
from coordinator.rounds import refusal
from swarm.compress import FrameContext, max_frame_bytes
from swarm.errors import CodecError, ContributionError, CorruptData
from swarm.wire.v1 import coordinator_pb2 as pb

_HASH_BYTES = 32


class Intake:
    """The gate of all jobs; it bounds how many payloads are decoded at once."""

    def __init__(self, blobs: Blobs, settings: CoordinatorSettings, clock: Clock) -> None:
        self._blobs = blobs
        self._clock = clock
        self._decoding = asyncio.Semaphore(settings.concurrent_decodes)

    async def contribute(self, driver: JobDriver, caller: str, request: pb.ContributeRequest) -> bytes:
        """The receipt. Raises StorageError if this machine's disk refuses; the node tries again."""
        event = Contribution(
            now_s=self._clock.monotonic(),
            round=request.round,
            generation=request.generation,
            pipeline_id=request.pipeline_id,
            peer=caller,
            payload=request.payload_sha256,
            inner_steps=request.inner_steps,
        )
        if refusal(driver.state, event) is not None:
            # The state machine refuses it too: cheap to know before a payload is read.
            return await driver.contribute(event, None)
        pipeline = driver.state.pipeline(request.pipeline_id)
        assert pipeline is not None, "an unknown pipeline is refused above"
        problem = self._implausible(driver, pipeline, caller, request)
        problem = problem or await self._unreadable(driver, pipeline, caller, request)
        if problem is not None:
            return driver.ledger.receipt(request.round, caller, pb.VERDICT_REJECTED, problem, request.payload_sha256)
        return await driver.contribute(event, self._row(driver, pipeline, caller, request))

    def _implausible(
        self, driver: JobDriver, pipeline: Pipeline, caller: str, request: pb.ContributeRequest
    ) -> str | None:
        """What is wrong with what the request says, in words."""
        member = next(m for m in pipeline.members if m.peer == caller)
        leads = pipeline.members[0].peer == caller
        schedule = driver.spec.schedule
        most_tokens = request.inner_steps * schedule.samples_per_step * schedule.max_length
        least_steps = 1 if driver.state.wrapping else schedule.inner_steps
        shapes = shapes_of_member(driver.results.shapes, pipeline.members, caller)
        most_bytes = max_frame_bytes(shapes)
        if len(request.payload_sha256) != _HASH_BYTES:
            return "payload_sha256 is not a SHA-256"
        if (request.span.start, request.span.end) != (member.span.start, member.span.end):
            said = f"{request.span.start}:{request.span.end}"
            return f"the contribution is of blocks {said}, the node was assigned {member.span}"
        if not least_steps <= request.inner_steps <= schedule.inner_steps:
            return f"{request.inner_steps} inner steps instead of {schedule.inner_steps}"
        if request.tokens > most_tokens or (leads and request.tokens == 0):
            return f"{request.tokens} tokens; a round has from 1 to {most_tokens}"
        if request.skipped_steps >= request.inner_steps:
            return f"{request.skipped_steps} of {request.inner_steps} inner steps were skipped"
        if request.label_tokens > request.tokens:
            return f"{request.label_tokens} labelled tokens of {request.tokens}"
        if request.HasField("loss") and not (math.isfinite(request.loss) and request.loss >= 0):
            return f"a loss of {request.loss}"
        lease_id = driver.lease_id(request.round, request.pipeline_id)
        if lease_id is None or (leads and request.lease_id != lease_id):
            return f"lease {request.lease_id} is not the pipeline's"
        if request.payload_size > most_bytes:
            return f"a payload of {request.payload_size} bytes; its blocks need {most_bytes}"
        return None

    async def _unreadable(
        self, driver: JobDriver, pipeline: Pipeline, caller: str, request: pb.ContributeRequest
    ) -> str | None:
        """What is wrong with the payload, in words."""
        size = await asyncio.to_thread(self._blobs.size, request.payload_sha256)
        if size is None:
            return "the payload is not uploaded"
        if size != request.payload_size:
            return f"the payload has {size} bytes, not {request.payload_size}"
        start = driver.published.get(request.round - 1)
        if start is None:
            return f"round {request.round} is over"
        context = FrameContext(driver.job.job_id, request.round, start.params_hash)
        async with self._decoding:
            try:
                # A frame with values that are not finite, or huge, does not decode.
                await asyncio.to_thread(
                    driver.results.decode, request.payload_sha256, pipeline.members, caller, context
                )
            except (CodecError, ContributionError, CorruptData) as error:
                return error.cause
        return None

    def _row(
        self, driver: JobDriver, pipeline: Pipeline, caller: str, request: pb.ContributeRequest
    ) -> ContributionRecord:
        verdict = pb.VERDICT_HELD
        return ContributionRecord(
            round=request.round,
            generation=request.generation,
            pipeline_id=request.pipeline_id,
            peer=caller,
            lead=pipeline.members[0].peer == caller,
            payload=request.payload_sha256,
            payload_size=request.payload_size,
            inner_steps=request.inner_steps,
            tokens=request.tokens,
            loss=request.loss if request.HasField("loss") else None,
            verdict=verdict,
            reason="",
            receipt=driver.ledger.receipt(request.round, caller, verdict, "", request.payload_sha256),
            label_tokens=request.label_tokens,
            skipped_steps=request.skipped_steps,
        )
