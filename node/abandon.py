"""Telling the coordinator that a pipeline will not deliver, so that its round need not wait for it."""

from __future__ import annotations

from contextlib import suppress
from typing import Protocol

import structlog

from node.link import Link
from swarm.errors import SwarmError
from swarm.wire.v1 import common_pb2
from swarm.wire.v1 import coordinator_pb2 as pb

log = structlog.get_logger()


class Part(Protocol):
    """A pipeline's part in a round: an assignment, or the work that came of it."""

    @property
    def round(self) -> int: ...
    @property
    def generation(self) -> int: ...
    @property
    def pipeline_id(self) -> int: ...


async def abandon(link: Link, job_id: str, job: str, part: Part, error: Exception, blame: str | None = None) -> None:
    """Log why and report it, whatever it was. `job`: its name in the log. `blame`: the node at fault; None: the one
    that the error names. Without effect once all contributions of the pipeline are held."""
    known = error if isinstance(error, SwarmError) else SwarmError(f"the node failed: {type(error).__name__}")
    log.warning("round_failed", job=job, round=part.round, error=str(known), exc_info=None if known is error else error)
    request = pb.AbandonRequest(
        job_id=job_id,
        round=part.round,
        generation=part.generation,
        pipeline_id=part.pipeline_id,
        reason=common_pb2.Error(
            code=known.code, cause=known.cause, fix=known.fix, blame=known.blame if blame is None else blame
        ),
    )
    with suppress(SwarmError):  # a round or job that is over has no use for it
        await link.call(lambda client: client.abandon(request))
