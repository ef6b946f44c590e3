"""Contributions that are wrong, over real sockets: a typed receipt says why, and nothing is applied.

P2 (TRUST.md, 22, 24, 25, 28, 30, 32, 34): refused within 100 ms beyond the transfer (median of 20), no row
changes but the line of the job's log that tells of it, and the next honest call works.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from coordinator_sim import F32, SimNode, identity, job_spec, submit, upload
from coordinator_swarm import ONE, ONE_PIPELINE, Swarm
from remote_service import served

from swarm.compress import FrameContext, encode
from swarm.compress.frame import CHECKSUM_BYTES, HEADER, seal
from swarm.config import CodecSettings
from swarm.errors import FrameTooLarge, JobNotFound, ProtocolError
from swarm.ids import sha256
from swarm.wire.v1 import coordinator_pb2 as pb

RESEARCHER = identity("researcher").peer_id
DENSE = CodecSettings(kind="dense")
MOST_S = 0.1


@pytest.fixture
async def swarm(tmp_path: Path) -> AsyncIterator[Swarm]:
    async with served(tmp_path, ("a", "b", "z", "researcher")) as swarm:
        yield swarm


class Honest:
    """A lead that is ready to contribute to round 1 of one job; a second job exists beside it."""

    def __init__(self, swarm: Swarm, folder: Path, node: SimNode, part: pb.Assignment, lease: int, other: str) -> None:
        self.swarm, self.node, self.part, self.lease, self.other_job = swarm, node, part, lease, other
        self._database = folder / "coordinator.db"

    @classmethod
    async def ready(cls, swarm: Swarm, folder: Path) -> Honest:
        node, _ = await swarm.join(*ONE_PIPELINE)
        await submit(swarm.service, RESEARCHER, job_spec(schedule=ONE))
        part = await node.assigned()
        other = (await submit(swarm.service, RESEARCHER, job_spec(name="prose", schedule=ONE))).job_id
        await node.catch_up(part)
        request = pb.LeaseRequest(job_id=part.job_id, round=1, generation=part.generation, pipeline_id=0)
        lease = await swarm.service.lease(node.peer, request)
        node.leased[1, part.generation] = [(r.start, r.end) for r in lease.ranges]
        return cls(swarm, folder, node, part, lease.lease_id, other)

    def rows(self) -> dict[str, list[tuple[object, ...]]]:
        """Every table but the job's log, as another process reads it."""
        database = sqlite3.connect(f"file:{self._database}?mode=ro", uri=True)
        names = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        found = {name: database.execute(f"SELECT * FROM {name}").fetchall() for name in names if name != "event"}
        database.close()
        return found

    def columns(self, table: str) -> list[str]:
        database = sqlite3.connect(f"file:{self._database}?mode=ro", uri=True)
        found = [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
        database.close()
        return found

    async def send(self, frame: bytes, **changes: object) -> pb.Receipt:
        """Upload and contribute; the receipt's signature is checked."""
        digest = await upload(self.swarm.service, self.node.peer, frame)
        return await self.node.contribute(self.part, digest, len(frame), self.lease, **changes)

    async def refused(self, frame: bytes, reason: str, **changes: object) -> None:
        digest = await upload(self.swarm.service, self.node.peer, frame)
        before, took_s = self.rows(), []
        for _ in range(20):
            began = time.perf_counter()
            receipt = await self.node.contribute(self.part, digest, len(frame), self.lease, **changes)
            took_s.append(time.perf_counter() - began)
            assert receipt.verdict == pb.VERDICT_REJECTED, receipt
            assert reason in receipt.reason
        assert median(took_s) < MOST_S
        assert self.rows() == before
        await self.goes_on()

    async def goes_on(self) -> None:
        """The honest contribution is held, and with its mate's the round commits."""
        assert (await self.send(self.node.frame(self.part))).verdict == pb.VERDICT_HELD
        await self.swarm.one("b")
        await self.node.settle(self.part)
        assert self.node.receipts[1].verdict == pb.VERDICT_ACCEPTED


@pytest.fixture
async def honest(swarm: Swarm, tmp_path: Path) -> Honest:
    return await Honest.ready(swarm, tmp_path)


def context(honest: Honest, **changes: object) -> FrameContext:
    usual: dict[str, object] = {"job_id": honest.part.job_id, "round": 1, "base_hash": honest.node.hashes[0]}
    return FrameContext(**(usual | changes))  # type: ignore[arg-type]


def other_job(honest: Honest) -> bytes:
    return encode(honest.node.delta(honest.part), DENSE, context(honest, job_id=honest.other_job))


def other_round(honest: Honest) -> bytes:
    return encode(honest.node.delta(honest.part), DENSE, context(honest, round=2))


def other_base(honest: Honest) -> bytes:
    return encode(honest.node.delta(honest.part), DENSE, context(honest, base_hash=sha256(b"other parameters")))


def reshaped(change: Callable[[dict[str, F32]], dict[str, F32]]) -> Callable[[Honest], bytes]:
    return lambda honest: encode(change(honest.node.delta(honest.part)), DENSE, context(honest))


def transposed(delta: dict[str, F32]) -> dict[str, F32]:
    return delta | {"0/q.lora_A": np.ascontiguousarray(delta["0/q.lora_A"].T)}


def flat(delta: dict[str, F32]) -> dict[str, F32]:
    return delta | {"0/q.lora_A": delta["0/q.lora_A"].reshape(-1)}


def a_tensor_less(delta: dict[str, F32]) -> dict[str, F32]:
    return {key: value for key, value in delta.items() if key != "0/q.lora_A"}


def a_tensor_more(delta: dict[str, F32]) -> dict[str, F32]:
    return delta | {"3/q.lora_A": delta["0/q.lora_A"]}


def dense_body(change: Callable[[F32], bytes]) -> Callable[[Honest], bytes]:
    """A dense frame whose values were replaced, with a checksum that fits."""

    def make(honest: Honest) -> bytes:
        frame = encode(honest.node.delta(honest.part), DENSE, context(honest))
        values = np.frombuffer(frame[HEADER.size : -CHECKSUM_BYTES], "<f4").copy()
        return seal(frame[: HEADER.size] + change(values))

    return make


def with_value(value: float) -> Callable[[F32], bytes]:
    def change(values: F32) -> bytes:
        values[3] = value
        return values.tobytes()

    return change


def coarse(value: float) -> Callable[[Honest], bytes]:
    """A frame with a codec of its sender's choice: a bit a value."""

    def make(honest: Honest) -> bytes:
        delta = {key: np.full_like(part, value) for key, part in honest.node.delta(honest.part).items()}
        return encode(delta, CodecSettings(bits=1, density=1.0), context(honest))

    return make


def truncated(honest: Honest) -> bytes:
    return honest.node.frame(honest.part)[:-5]


def doubled(honest: Honest) -> bytes:
    return 2 * honest.node.frame(honest.part)


def not_a_frame(honest: Honest) -> bytes:
    return b"\x80\x04\x95 this would be a pickle, which nobody here ever loads"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (other_job, "belongs to another job"),
        (other_round, "belongs to round 2, not to round 1"),
        (other_base, "starts from parameters"),
        (reshaped(transposed), "other shapes"),
        (reshaped(flat), "other shapes"),
        (reshaped(a_tensor_less), "tensors where"),
        (reshaped(a_tensor_more), "tensors where"),
        (dense_body(lambda values: values.astype(np.float16).tobytes()), "bytes of values, expected are"),
        (dense_body(lambda values: values.astype(np.float64).tobytes()), "bytes of values, expected are"),
        (dense_body(with_value(float("nan"))), "1 values that are not finite"),
        (dense_body(with_value(float("-inf"))), "1 values that are not finite"),
        (
            dense_body(with_value(3e38)),
            "'0/q.lora_A' holds a value of magnitude 3e+38; more than 1.84467e+19 is refused",
        ),
        (dense_body(with_value(-1.9e19)), "'0/q.lora_A' holds a value of magnitude 1.9e+19"),
        (coarse(3e38), "holds a value of magnitude"),
        (truncated, "does not match its checksum"),
        (doubled, "does not match its checksum"),
        (not_a_frame, "not a codec frame"),
    ],
    ids=[
        *("job", "round", "base", "transposed", "flat", "less", "more", "float16", "float64", "nan", "inf"),
        *("huge", "large", "coarse"),
        *("truncated", "doubled", "pickle"),
    ],
)
async def test_a_payload_that_is_not_the_expected_one(
    honest: Honest, make: Callable[[Honest], bytes], reason: str
) -> None:
    await honest.refused(make(honest), reason)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"round": 2}, "round 2 is not open"),
        ({"round": 1 << 31}, "round 2147483648 is not open"),
        ({"generation": 7}, "not in pipeline 0, generation 7"),
        ({"pipeline_id": 3}, "not in pipeline 3"),
        ({"payload_size": 1 << 33}, "a payload of 8589934592 bytes; its blocks need"),
        ({"payload_size": 1}, "bytes, not 1"),
        ({"payload_sha256": sha256(b"never uploaded")}, "not uploaded"),
        ({"inner_steps": 300}, "300 inner steps instead of 3"),
        ({"tokens": 1 << 40}, "tokens; a round has"),
        ({"skipped_steps": 3}, "3 of 3 inner steps were skipped"),
    ],
    ids=["future", "far", "generation", "pipeline", "oversized", "size", "absent", "steps", "tokens", "skipped"],
)
async def test_a_request_that_is_wrong(honest: Honest, changes: dict[str, object], reason: str) -> None:
    await honest.refused(honest.node.frame(honest.part), reason, **changes)


async def test_skipped_steps_are_kept_and_told(honest: Honest) -> None:
    assert (await honest.send(honest.node.frame(honest.part), skipped_steps=2)).verdict == pb.VERDICT_HELD
    reply = await honest.swarm.service.job_log(RESEARCHER, pb.JobLogRequest(job="poems", wait_s=5))
    assert "held, 3 inner steps (2 skipped)" in [line.text for line in reply.lines]
    at = honest.columns("contribution").index("skipped_steps")
    assert [row[at] for row in honest.rows()["contribution"]] == [2]


async def test_another_job(honest: Honest) -> None:
    """A job that the node is not in answers by receipt, one that is not there by an error."""
    frame, before = honest.node.frame(honest.part), honest.rows()
    with pytest.raises(JobNotFound, match="no job 'nobodys'"):
        await honest.send(frame, job_id="nobodys")
    receipt = await honest.send(frame, job_id=honest.other_job)
    assert (receipt.verdict, receipt.job_id) == (pb.VERDICT_REJECTED, honest.other_job)
    assert "not in pipeline 0" in receipt.reason
    assert honest.rows() == before
    await honest.goes_on()


async def test_a_stale_round(honest: Honest) -> None:
    """24: after the commit the same payload gets its receipt again, another one is late."""
    frame = honest.node.frame(honest.part)
    await honest.goes_on()
    await honest.swarm.until(lambda: honest.swarm.driver.state.round == 2)
    before = honest.rows()
    assert (await honest.send(frame)).verdict == pb.VERDICT_ACCEPTED
    late = await honest.send(encode(honest.node.delta(honest.part), DENSE, context(honest)))
    assert (late.verdict, late.reason) == (pb.VERDICT_LATE, "round 1 froze without it; round 2 is open")
    assert honest.rows() == before


async def test_a_duplicate_and_a_conflict(honest: Honest) -> None:
    """22 and 25: a hundred at once are one row and one receipt; another payload is refused and told."""
    frame = honest.node.frame(honest.part)
    first = await honest.send(frame)
    before = honest.rows()
    again = await asyncio.gather(*(honest.send(frame) for _ in range(100)))
    assert {receipt.SerializeToString() for receipt in again} == {first.SerializeToString()}
    other = await honest.send(encode(honest.node.delta(honest.part), DENSE, context(honest)))
    assert (other.verdict, other.reason) == (
        pb.VERDICT_REJECTED,
        "another contribution to round 1 is already stored",
    )
    assert honest.rows() == before
    log = await honest.swarm.service.job_log(RESEARCHER, pb.JobLogRequest(job="poems", wait_s=5))
    assert [line.peer_id for line in log.lines if line.kind == "contribution_conflict"] == [honest.node.peer]
    await honest.swarm.one("b")
    await honest.node.settle(honest.part)
    assert honest.node.receipts[1].verdict == pb.VERDICT_ACCEPTED


async def test_a_stranger(honest: Honest) -> None:
    frame = honest.node.frame(honest.part)
    stranger = SimNode(honest.swarm.service, "z", ONE_PIPELINE[0][1])
    before = honest.rows()
    digest = await upload(honest.swarm.service, stranger.peer, frame)
    receipt = await stranger.contribute(honest.part, digest, len(frame), honest.lease)
    assert (receipt.verdict, receipt.peer_id) == (pb.VERDICT_REJECTED, stranger.peer)
    assert honest.rows() == before
    await honest.goes_on()


async def test_an_oversized_payload_is_not_read(tmp_path: Path) -> None:
    """Uploads end at the cap; what is within it but more than the blocks need is refused without being loaded."""
    cap = 8 << 20
    async with served(tmp_path, ("a", "b", "researcher"), max_blob_bytes=cap) as swarm:
        honest = await Honest.ready(swarm, tmp_path)
        put, peer = swarm.service.put_piece, honest.node.peer
        with pytest.raises(FrameTooLarge, match=f"over the cap of {cap}"):
            await put(peer, pb.PutPieceRequest(sha256=sha256(b"huge"), size=cap + 1))
        with pytest.raises(FrameTooLarge, match="a piece of"):
            await put(peer, pb.PutPieceRequest(sha256=sha256(b"huge"), size=cap, data=bytes((4 << 20) + 1)))
        with pytest.raises(ProtocolError, match="ends at byte 6 of a blob of 5"):
            await put(peer, pb.PutPieceRequest(sha256=sha256(b"short"), size=5, data=b"longer"))
        frame = bytes(cap)
        digest = await upload(swarm.service, peer, frame, pieces=4)
        before = honest.rows()
        tracemalloc.start()
        receipt = await honest.node.contribute(honest.part, digest, len(frame), honest.lease)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert receipt.verdict == pb.VERDICT_REJECTED
        assert f"a payload of {cap} bytes; its blocks need" in receipt.reason
        assert peak < cap / 4
        # The same, said to be small: its true size is looked up, not its content.
        small = await honest.node.contribute(honest.part, digest, 100, honest.lease)
        assert f"the payload has {cap} bytes, not 100" in small.reason
        assert honest.rows() == before
        await honest.goes_on()
