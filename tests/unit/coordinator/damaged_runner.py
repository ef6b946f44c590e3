"""A round whose held contributions rot before they are aggregated; killed at one durable point of what follows.

Run by test_damaged_contributions as `python damaged_runner.py FOLDER all|some POINT`: dies by SIGKILL there.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path

import structlog
from coordinator_sim import job_spec, submit
from coordinator_swarm import ONE, ONE_PIPELINE, Swarm, opened
from crash_runner import Strike, die

from swarm.ids import Span
from swarm.wire.v1 import coordinator_pb2 as pb

TWO = (("a", Span(0, 4)), ("c", Span(0, 4)))
"""Each alone is a pipeline."""


def payload_of(swarm: Swarm, name: str) -> bytes:
    """What the node's contribution to the open round is stored as."""
    peer = swarm.nodes[name].peer
    found = [p.payload_of(peer) for p in swarm.driver.state.pipelines]
    return next(payload for payload in found if payload is not None)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


async def held(swarm: Swarm, *names: str) -> list[pb.Assignment]:
    """The nodes contribute to the open round; their parts."""
    parts = []
    for name in names:
        parts.append(await swarm.nodes[name].assigned())
        assert (await swarm.nodes[name].train(parts[-1])).verdict == pb.VERDICT_HELD
    return parts


async def rot(swarm: Swarm, folder: Path, which: str) -> None:
    """Round 1 is frozen with a damaged contribution: of the one pipeline there is, or of one of two."""
    spans, schedule = (ONE_PIPELINE, ONE) if which == "all" else (TWO, ONE | {"min_pipelines": 2})
    await swarm.join(*spans)
    await submit(swarm.service, "me", job_spec(schedule=schedule))
    first, last = (name for name, _ in spans)
    await held(swarm, first)
    flip(folder / "blobs" / "whole" / payload_of(swarm, first).hex())
    await held(swarm, last)


async def main(folder: Path, which: str, point: str) -> None:
    async with opened(folder, durable_point=Strike(point, 1, die)) as swarm:
        await rot(swarm, folder, which)
        await asyncio.Event().wait()


if __name__ == "__main__":
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    asyncio.run(asyncio.wait_for(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3]), 60))
