"""The jobs that this node takes part in: a member each, from its first assignment until its memory is wanted elsewhere.

A member settles its rounds beside whatever the node does next. It is never replaced or released before it has, because
its successor's state is in the same folder.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from pathlib import Path

import structlog

from node.abandon import abandon
from node.jobstate import JobFolder
from node.link import Link
from node.member import Ended, JobMember, Work
from node.memory import Ledger
from node.serving import NodeModel
from node.stage import AdapterStage
from swarm.compress import compile_ahead
from swarm.compute import Compute, Priority
from swarm.config import JobSpec, job_from_json
from swarm.errors import SwarmError
from swarm.ids import Span
from swarm.wire.v1 import coordinator_pb2 as pb

log = structlog.get_logger()


class Members:
    """By job id. Used on the loop."""

    def __init__(
        self, compute: Compute, model: NodeModel, ledger: Ledger, link: Link, data_dir: Path, peer_id: str
    ) -> None:
        self._compute = compute
        self._model = model
        self._ledger = ledger
        self._link = link
        self._data_dir = data_dir
        self._peer_id = peer_id
        self._members: dict[str, JobMember] = {}
        self._making = asyncio.Lock()
        self._settling: dict[str, dict[asyncio.Task[None], int]] = {}
        """Tasks that settle a round, and which."""
        self._leaving: set[str] = set()
        self._over: set[str] = set()
        self._discarding: asyncio.Task[None] | None = None

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._members

    async def get(self, assignment: pb.Assignment) -> JobMember:
        """This node's member of the assignment's job, with the assigned blocks.

        Raises OutOfMemory, UnsupportedModel, JobConflict, StorageError, and what an unfinished contribution meets.
        """
        async with self._making:
            return await self._get(assignment)

    async def _get(self, assignment: pb.Assignment) -> JobMember:
        job_id, hop = assignment.job_id, assignment.hops[assignment.index]
        span = Span(hop.span.start, hop.span.end)
        self._leaving.discard(job_id)
        member = self._members.get(job_id)
        if member is not None and member.span != span:
            await self._settled(job_id)
            member.close()
            del self._members[job_id]
            member = None
        if member is None:
            member = self._members[job_id] = await self._make(assignment, span)
        # An owner may change settings between rounds.
        member.spec = job_from_json(assignment.spec_json)
        return member

    async def _make(self, assignment: pb.Assignment, span: Span) -> JobMember:
        spec = job_from_json(assignment.spec_json)
        # The first round of a new installation would wait for it at its end, and its pipeline with it.
        await asyncio.to_thread(compile_ahead, spec.uplink, spec.downlink)
        stage = await self._stage(span, spec, f"job {assignment.job_name}")
        folder, adapters = JobFolder(self._data_dir, assignment.job_id), self._model.adapters
        member = JobMember(assignment.job_id, spec, span, stage, adapters, self._compute, self._link, folder)
        try:
            await member.finish_pending()
        except BaseException:
            member.close()
            raise
        return member

    async def _stage(self, span: Span, spec: JobSpec, owner: str) -> AdapterStage:
        if self._discarding is not None:
            # It is charged for, under the same name.
            await asyncio.wait({self._discarding})
        building = asyncio.ensure_future(
            self._compute.run(
                Priority.BACKGROUND,
                *(AdapterStage, self._model, span, spec, self._ledger, owner, self._compute.give_way),
            )
        )
        try:
            return await asyncio.shield(building)
        except asyncio.CancelledError:
            # The thread makes it all the same. Who gave up is not held up: it may be the poll.
            self._discarding = asyncio.create_task(_discard(building))
            raise

    async def resume(self, assignment: pb.Assignment) -> None:
        """A stage that came back after its lead had ended the round: nobody will call it for that round any more,
        but the contribution that it had begun may be missing."""
        folder = JobFolder(self._data_dir, assignment.job_id)
        try:
            if await asyncio.to_thread(folder.load_pending) is not None:
                await self.get(assignment)
        except SwarmError as error:
            log.warning("resume_failed", job=assignment.job_name, round=assignment.round, error=str(error))

    # ---- settling ----------------------------------------------------------------------------

    def settle_later(self, member: JobMember, work: Work, ended: Ended) -> None:
        """Contribute and settle a node's round beside its chain, which may end meanwhile."""
        task = asyncio.create_task(self._settle(member, work, ended))
        self._settling.setdefault(member.job_id, {})[task] = work.round
        task.add_done_callback(partial(self._ended, member.job_id))

    async def _settle(self, member: JobMember, work: Work, ended: Ended) -> None:
        try:
            await member.contribute_and_settle(work, ended)
        except Exception as error:
            await abandon(self._link, member.job_id, member.job_id, work, error, blame=self._peer_id)

    def _ended(self, job_id: str, task: asyncio.Task[None]) -> None:
        del self._settling[job_id][task]
        if not self._settling[job_id]:
            del self._settling[job_id]
            self._let_go(job_id)

    async def end_settling(self, job_id: str, round: int) -> None:
        """This round is formed anew, or was discarded: what waits for an earlier forming of it, or for a later
        round, would wait for ever."""
        tasks = [task for task, settled in self._settling.get(job_id, {}).items() if round <= settled]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _settled(self, job_id: str) -> None:
        tasks = self._settling.get(job_id)
        if tasks:
            await asyncio.wait(tasks)

    # ---- ends --------------------------------------------------------------------------------

    def make_room(self, job_id: str) -> None:
        """This job comes first now: others give their memory back, and are restored from disk when they go on."""
        for other in [other for other in self._members if other != job_id]:
            self._leave(other)

    def finished(self, job_id: str) -> None:
        """The job is over: neither its memory nor its folder is needed once its last round is settled."""
        if job_id not in self._over:
            self._over.add(job_id)
            self._leave(job_id)

    def _leave(self, job_id: str) -> None:
        self._leaving.add(job_id)
        self._let_go(job_id)

    def _let_go(self, job_id: str) -> None:
        """Without effect unless the job is to be left, and no round of it settles any more."""
        if job_id not in self._leaving or job_id in self._settling:
            return
        self._leaving.discard(job_id)
        member = self._members.pop(job_id, None)
        if member is not None:
            member.close()
        if job_id in self._over:
            JobFolder(self._data_dir, job_id).remove()

    async def stop(self) -> None:
        """Nothing settles any more; what was begun is finished after a restart."""
        tasks = [task for of_job in self._settling.values() for task in of_job]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _discard(building: asyncio.Future[AdapterStage]) -> None:
    """A stage that nobody waits for any more."""
    with suppress(SwarmError):
        (await building).close()
