"""Nodes that die while a round is synchronized (TRUST.md, 7 and 8), and checkpoints that decay (13)."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from coordinator_sim import SimNode, TinyAdapters, download, job_spec, submit
from coordinator_swarm import ONE, ONE_PIPELINE, Swarm, opened

from coordinator.aggregate import average, initial_round, outer_round, pipeline_weights
from coordinator.round_model import Standing
from coordinator.service import CoordinatorService
from swarm.client.coordinator import PIECE_BYTES
from swarm.compress import FrameContext, decode
from swarm.config import job_from_json
from swarm.ids import HEAD, Span, block_of, sha256
from swarm.wire.rpc import COORDINATOR_SERVICE, RpcServer
from swarm.wire.tls import ServerTls
from swarm.wire.v1 import coordinator_pb2 as pb

pytestmark = pytest.mark.faults

DEADLINE_S = 100.0
ROOT = Path(__file__).parents[3]
UPLOADER = Path(__file__).parent / "uploading_node.py"


def replayed(folder: Path) -> bytes:
    """The parameters after round 1, from the job's initial ones and what was accepted, without a coordinator."""
    database = sqlite3.connect(folder / "coordinator.db")
    job_id, spec_json = database.execute("SELECT job_id, spec_json FROM job").fetchone()
    rows = database.execute(
        "SELECT peer, pipeline_id, payload, lead, label_tokens, span_start, span_end FROM contribution"
        f" JOIN member USING (job_id, round, pipeline_id, peer) WHERE round = 1 AND verdict = {pb.VERDICT_ACCEPTED}"
        " ORDER BY peer"
    ).fetchall()
    database.close()
    spec = job_from_json(spec_json)
    start = initial_round(TinyAdapters().initial(spec.method, spec.schedule.seed))
    context, shapes = FrameContext(job_id, 1, start.params_hash), TinyAdapters().shapes(spec.method)
    sent = []
    for peer, _, payload, lead, _, first, end in rows:
        own = {
            key: shape
            for key, shape in shapes.items()
            if (lead if block_of(key) == HEAD else first <= int(block_of(key)) < end)
        }
        sent.append((peer, decode((folder / "blobs" / "whole" / payload.hex()).read_bytes(), own, context)))
    by_pipeline = pipeline_weights({row[1]: row[4] for row in rows if row[3]})
    weights = {row[0]: by_pipeline[row[1]] for row in rows}
    mean = average(sent, len(by_pipeline), spec.uplink, weights)
    return outer_round(start.state, mean, spec, job_id, 1).params_hash


@pytest.mark.parametrize("dies", ["before it uploads", "in the middle of its upload", "before it contributes", "after"])
async def test_a_node_that_dies_during_outer_sync(tmp_path: Path, dies: str, seed: int) -> None:
    """7: the round closes by its deadline, with every pipeline that is whole. A seed varies how many pipelines there
    are, how they are cut and who dies."""
    chance = random.Random(f"{seed} {dies}")
    cuts = [chance.randint(1, 3) for _ in range(chance.randint(2, 4))]
    spans = [(f"{side}{n}-{seed}", span) for n, cut in enumerate(cuts) for side, span in halves(cut)]
    async with opened(tmp_path, silent_s=1000.0) as swarm:
        nodes = await swarm.join(*spans)
        schedule = ONE | {"min_pipelines": len(cuts), "seed": seed, "round_deadline_s": DEADLINE_S}
        await submit(swarm.service, "me", job_spec(schedule=schedule))
        victim = chance.choice(nodes)
        part = await victim.assigned()
        began_s = swarm.clock.now_s
        async with asyncio.TaskGroup() as group:
            for node in nodes:
                if node is not victim:
                    group.create_task(swarm.one(node.name))
            await until_dead(swarm.service, victim, part, dies, chance)
            whole = len(cuts) - (dies != "after")
            await swarm.until(lambda: standing(swarm, Standing.WHOLE) == whole and others_held(swarm, victim.peer))
            swarm.clock.advance(DEADLINE_S)
        assert swarm.clock.now_s - began_s <= DEADLINE_S
        accepted = {node.peer for node in nodes if node is not victim and verdict(node) == pb.VERDICT_ACCEPTED}
        mates = {hop.peer_id for hop in part.hops}
        assert accepted == {node.peer for node in nodes} - (mates if dies != "after" else {victim.peer})
        assert {verdict(node) for node in nodes if node.peer not in accepted | {victim.peer}} <= {pb.VERDICT_LATE}
        await swarm.until(lambda: swarm.driver.committed_round == 1)
        committed = swarm.driver.published[1].params_hash
    assert replayed(tmp_path) == committed


def halves(cut: int) -> tuple[tuple[str, Span], tuple[str, Span]]:
    return ("front", Span(0, cut)), ("back", Span(cut, 4))


def verdict(node: SimNode) -> int:
    return node.receipts[1].verdict


def standing(swarm: Swarm, wanted: Standing) -> int:
    return len(swarm.driver.state.with_standing(wanted))


def others_held(swarm: Swarm, victim: str) -> bool:
    """Everybody but the victim has contributed, or the round is over."""
    return all(
        member.peer == victim or pipeline.payload_of(member.peer) is not None
        for pipeline in swarm.driver.state.pipelines
        for member in pipeline.members
    )


async def until_dead(
    service: CoordinatorService, node: SimNode, part: pb.Assignment, dies: str, chance: random.Random
) -> None:
    """What the node still does before it is gone."""
    await node.catch_up(part)
    if dies == "after":
        assert (await node.train(part)).verdict in (pb.VERDICT_HELD, pb.VERDICT_ACCEPTED)
    if dies in ("before it uploads", "after"):
        return
    frame = node.frame(part, node.delta(part))
    sent = chance.randrange(1, len(frame)) if dies == "in the middle of its upload" else len(frame)
    request = pb.PutPieceRequest(sha256=sha256(frame), size=len(frame), data=frame[:sent])
    await service.put_piece(node.peer, request)


class Listening:
    """The real service, which ends the uploader at one piece and counts what arrives."""

    def __init__(self, service: CoordinatorService, at: int, when: str) -> None:
        self._service, self._at, self._when = service, at, when
        self._pieces = 0
        self.received_bytes = 0
        self.uploader: asyncio.subprocess.Process | None = None

    def __getattr__(self, name: str) -> object:
        return getattr(self._service, name)

    async def put_piece(self, caller: str, request: pb.PutPieceRequest) -> pb.PutPieceReply:
        self.received_bytes += len(request.data)
        self._pieces += len(request.data) > 0
        strikes = self.uploader is not None and self._pieces == self._at and len(request.data) > 0
        if strikes and self._when == "before it is stored":
            self._kill()
            return pb.PutPieceReply()  # to nobody
        reply = await self._service.put_piece(caller, request)
        if strikes:
            self._kill()
        return reply

    def _kill(self) -> None:
        assert self.uploader is not None
        self.uploader.send_signal(signal.SIGKILL)
        self.uploader = None


@asynccontextmanager
async def listening(folder: Path, at: int, when: str) -> AsyncIterator[tuple[Listening, list[str]]]:
    """The counting service behind a socket, and how to reach it."""
    tls = ServerTls.load_or_create(folder)
    async with opened(folder) as swarm:
        counting = Listening(swarm.service, at, when)
        server = RpcServer(COORDINATOR_SERVICE, counting, tls)
        port = await server.start("127.0.0.1", 0)
        try:
            yield counting, [f"127.0.0.1:{port}", tls.fingerprint.hex()]
        finally:
            await server.stop(0)


@pytest.mark.parametrize("when", ["before it is stored", "before it is answered"])
async def test_a_node_killed_in_the_middle_of_an_upload(tmp_path: Path, when: str, seed: int) -> None:
    """8: what it has to send again is at most one piece. A seed varies content, size and the piece."""
    chance = random.Random(f"{seed} {when}")
    size = chance.randint(2 * PIECE_BYTES, 6 * PIECE_BYTES)
    at = chance.randint(1, -(-size // PIECE_BYTES))
    content = random.Random(seed).randbytes(size)
    async with listening(tmp_path, at, when) as (counting, where):
        command = [sys.executable, str(UPLOADER), *where, str(tmp_path / "node.key"), str(seed), str(size)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        first = counting.uploader = await asyncio.create_subprocess_exec(*command, env=environment)
        assert await first.wait() == -signal.SIGKILL
        again = await asyncio.create_subprocess_exec(*command, env=environment)
        assert await again.wait() == 0
        assert size <= counting.received_bytes <= size + PIECE_BYTES
    assert (tmp_path / "blobs" / "whole" / sha256(content).hex()).read_bytes() == content


async def test_an_outer_state_with_a_flipped_bit(tmp_path: Path, seed: int) -> None:
    """13: noticed before it is used, and made again from the round before. A seed varies the bit, the round, and
    whether the coordinator starts again in between."""
    chance = random.Random(seed)
    after = chance.randint(1, 2)
    finals = []
    for damage in (False, True):
        folder = tmp_path / str(damage)
        schedule = ONE | {"seed": seed}
        async with opened(folder) as swarm:
            await swarm.join(*ONE_PIPELINE)
            await submit(swarm.service, "me", job_spec(schedule=schedule))
            for number in range(1, after + 1):
                await swarm.round("a", "b")
                await swarm.until(lambda number=number: swarm.driver.state.round == number + 1)
            path = folder / "blobs" / "whole" / swarm.driver.published[after].state_blob.hex()
            whole = path.read_bytes()
            if damage:
                bit = chance.randrange(8 * len(whole))
                path.write_bytes(whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :])
            if seed % 2 == 0:
                finals.append(await last_round(swarm, after + 1))
        if seed % 2:
            async with opened(folder) as swarm:
                await swarm.join(*ONE_PIPELINE)
                finals.append(await last_round(swarm, after + 1))
        assert path.read_bytes() == whole
    assert finals[0] == finals[1]


@pytest.mark.parametrize("kind", ["snapshot", "update", "adapter", "state"])
async def test_a_published_file_with_a_flipped_bit(tmp_path: Path, kind: str, seed: int) -> None:
    """13: found when a node asks for it, made again, and sent. A seed varies the bit, the round, and whether the
    coordinator starts again before or the file is looked at again after ten minutes."""
    chance = random.Random(f"{seed} {kind}")
    async with opened(tmp_path) as swarm:
        await swarm.join(*ONE_PIPELINE)
        await submit(swarm.service, "me", job_spec(schedule=ONE | {"seed": seed}))
        number = chance.randint(1, 3)
        for _ in range(number):
            await swarm.round("a", "b")
        await swarm.until(lambda: swarm.driver.committed_round == number)
        outcome = swarm.driver.published[number]
        digest = {
            "snapshot": outcome.snapshot_blob,
            "update": outcome.update_blob,
            "adapter": outcome.files[-1].sha256,
            "state": outcome.state_blob,
        }[kind]
        path = tmp_path / "blobs" / "whole" / digest.hex()
        whole = path.read_bytes()
        bit = chance.randrange(8 * len(whole))
        path.write_bytes(whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :])
        if seed % 2 == 0:
            swarm.clock.advance(601.0)
            assert await download(swarm.service, "me", digest, len(whole)) == whole
    if seed % 2:
        async with opened(tmp_path) as swarm:
            assert await download(swarm.service, "me", digest, len(whole)) == whole
    assert path.read_bytes() == whole


async def last_round(swarm: Swarm, number: int) -> bytes:
    await swarm.round("a", "b")
    await swarm.until(lambda: swarm.driver.committed_round == number)
    return swarm.driver.published[number].params_hash
