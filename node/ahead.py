"""The next round's first inner steps, which a lead has done while its round was being closed.

In: the assignment of the round that ended, the lease of the next one's samples, and the chain, which stays
open. Out: a tally, once the steps are done, if the next round's assignment is of the same nodes and
its lease has the same id; otherwise they are void. A step that fails makes all of them void: the
next round then starts anew, as it would without them. Never contributes anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import structlog

from node.lead import Tally
from swarm.net.chain import Chain
from swarm.wire.v1 import coordinator_pb2 as pb

log = structlog.get_logger()


class Ahead:
    """Trains until its steps are done or it is dropped. Create on the loop."""

    def __init__(
        self,
        assignment: pb.Assignment,
        lease_id: int,
        chain: Chain | None,
        steps: Coroutine[Any, Any, Tally],
        leave: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`leave` is called once the work is void: what a step left half done in the stage goes."""
        self.lease_id = lease_id
        self.chain = chain
        self._leave = leave
        self._assignment = assignment
        self._task = asyncio.create_task(self._train(steps))

    async def _train(self, steps: Coroutine[Any, Any, Tally]) -> Tally | None:
        try:
            return await steps
        except Exception as error:  # void, whatever went wrong: the round is trained from its start
            log.warning("ahead_failed", job=self._assignment.job_name, round=self._assignment.round, error=str(error))
            return None

    def leads_to(self, new: pb.Assignment) -> bool:
        """Whether it is the next round of the same nodes, and the history is the same."""
        return leads_to(self._assignment, new)

    async def finished(self) -> Tally | None:
        """What the steps came to; None if they failed or the chain broke. May be cancelled and asked again."""
        await asyncio.wait([self._task])
        return self._task.result() if self.chain is None or self.chain.failure is None else None

    async def drop(self) -> None:
        """Its work is void."""
        self._task.cancel()
        try:
            await asyncio.gather(self._task, return_exceptions=True)
        finally:  # who drops it may be cancelled, and nobody else knows the chain
            if self.chain is not None:
                await self.chain.close()
            if self._leave is not None:
                await self._leave()


def leads_to(old: pb.Assignment, new: pb.Assignment) -> bool:
    """Whether `new` is the next round of the same nodes, and the history is the same."""
    return (new.job_id, new.round, new.lineage) == (old.job_id, old.round + 1, old.lineage) and same_nodes(old, new)


def same_nodes(one: pb.Assignment, other: pb.Assignment) -> bool:
    """Whether two pipelines are of the same nodes and blocks, in the same order."""
    parts = [[(hop.peer_id, hop.span.start, hop.span.end) for hop in assignment.hops] for assignment in (one, other)]
    return parts[0] == parts[1]
