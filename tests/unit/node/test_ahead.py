"""Inner steps ahead of their round: who may go on from them, and what makes them void."""

from __future__ import annotations

import asyncio

import pytest

from node.ahead import Ahead
from node.lead import Tally
from swarm.errors import PeerLost
from swarm.wire.v1 import common_pb2
from swarm.wire.v1 import coordinator_pb2 as pb


def assignment(round: int, hops: str = "a0-2 b2-4", lineage: int = 0, job: str = "job") -> pb.Assignment:
    parts = [(word[0], *map(int, word[1:].split("-"))) for word in hops.split()]
    return pb.Assignment(
        job_id=job,
        round=round,
        lineage=lineage,
        pipeline_id=round,
        hops=[common_pb2.Hop(peer_id=p, span=common_pb2.Span(start=s, end=e)) for p, s, e in parts],
    )


async def done() -> Tally:
    return Tally(losses=[1.0])


@pytest.mark.parametrize(
    ("following", "leads"),
    [
        (assignment(3), True),
        (assignment(2), False),
        (assignment(4), False),
        (assignment(3, lineage=1), False),
        (assignment(3, job="other"), False),
        (assignment(3, "a0-2 c2-4"), False),
        (assignment(3, "b2-4 a0-2"), False),
        (assignment(3, "a0-3 b3-4"), False),
    ],
    ids=["next", "same", "later", "rewound", "other-job", "other-node", "other-order", "other-cut"],
)
async def test_only_the_next_round_of_the_same_nodes_goes_on(following: pb.Assignment, leads: bool) -> None:
    ahead = Ahead(assignment(2), 7, None, done())
    assert ahead.leads_to(following) is leads
    assert await ahead.finished() == Tally(losses=[1.0])


async def test_a_step_that_fails_makes_all_of_them_void() -> None:
    async def fail() -> Tally:
        raise PeerLost("the next node is gone")

    assert await Ahead(assignment(2), 7, None, fail()).finished() is None


async def test_whoever_waits_may_be_cancelled_and_ask_again() -> None:
    go = asyncio.Event()

    async def wait() -> Tally:
        await go.wait()
        return Tally(skipped=1)

    ahead = Ahead(assignment(2), 7, None, wait())
    waiting = asyncio.create_task(ahead.finished())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    go.set()
    assert await ahead.finished() == Tally(skipped=1)


async def test_what_is_dropped_trains_no_further() -> None:
    ended = asyncio.Event()

    async def train() -> Tally:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError("not reached")

    ahead = Ahead(assignment(2), 7, None, train())
    await asyncio.sleep(0)
    await ahead.drop()
    assert ended.is_set()
