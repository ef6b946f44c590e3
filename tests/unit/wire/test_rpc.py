from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from swarm.errors import (
    ClockError,
    CoordinatorLost,
    JobNotFound,
    PinError,
    PortInUse,
    SignatureError,
    SwarmError,
)
from swarm.identity import Identity
from swarm.wire import rpc
from swarm.wire.rpc import COORDINATOR_SERVICE, Channel, RpcServer
from swarm.wire.tls import ServerTls
from swarm.wire.v1 import coordinator_pb2 as pb

METHOD = "/swarm.v1.Coordinator/GetJob"


class Answers:
    """Every method of the service; GetJob tells who called."""

    def __getattr__(self, name: str) -> object:
        async def answer(caller: str, request: pb.GetJobRequest) -> pb.JobStatus:
            if request.job == "missing":
                raise JobNotFound("there is no job 'missing'")
            if request.job == "bug":
                raise ZeroDivisionError("secret detail")
            return pb.JobStatus(job_id=caller, name=request.job)

        return answer


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[tuple[str, ServerTls]]:
    tls = ServerTls.load_or_create(tmp_path)
    server = RpcServer(COORDINATOR_SERVICE, Answers(), tls)
    port = await server.start("127.0.0.1", 0)
    yield f"127.0.0.1:{port}", tls
    await server.stop(0)


async def test_the_server_learns_who_called(served: tuple[str, ServerTls]) -> None:
    address, tls = served
    identity = Identity.generate()
    channel = await Channel.connect(address, tls.fingerprint, identity)
    counted: list[int] = []
    reply = await channel.call(METHOD, pb.GetJobRequest(job="x"), pb.JobStatus, 5, sent=counted.append)
    assert (reply.job_id, reply.name) == (identity.peer_id, "x")
    assert counted == [5 + len(pb.GetJobRequest(job="x").SerializeToString())]
    await channel.close()


async def test_errors_arrive_as_themselves_and_bugs_without_detail(served: tuple[str, ServerTls]) -> None:
    address, tls = served
    channel = await Channel.connect(address, tls.fingerprint, Identity.generate())
    with pytest.raises(JobNotFound, match="no job 'missing'"):
        await channel.call(METHOD, pb.GetJobRequest(job="missing"), pb.JobStatus, 5)
    with pytest.raises(SwarmError) as caught:
        await channel.call(METHOD, pb.GetJobRequest(job="bug"), pb.JobStatus, 5)
    assert "secret" not in str(caught.value)
    await channel.close()


async def test_another_tls_key_is_refused(served: tuple[str, ServerTls]) -> None:
    with pytest.raises(PinError):
        await Channel.connect(served[0], bytes(32), Identity.generate())


async def test_nobody_there() -> None:
    with pytest.raises(CoordinatorLost):
        await Channel.connect("127.0.0.1:1", bytes(32), Identity.generate())


async def test_a_port_is_not_shared(served: tuple[str, ServerTls]) -> None:
    host, _, port = served[0].rpartition(":")
    with pytest.raises(PortInUse):
        await RpcServer(COORDINATOR_SERVICE, Answers(), served[1]).start(host, int(port))


def gate_call(identity: Identity, fingerprint: bytes, body: bytes, sent: float) -> dict[str, str]:
    stamp, nonce = f"{sent:.3f}", "ab" * 16
    signature = identity.sign(rpc._signed_text(METHOD, stamp, nonce, fingerprint, body))
    return {
        "swarm-peer": identity.peer_id,
        "swarm-time": stamp,
        "swarm-nonce": nonce,
        "swarm-signature": signature.hex(),
    }


def test_replays_other_bodies_methods_servers_and_clocks_are_refused() -> None:
    identity, now, here = Identity.generate(), time.time(), bytes(32)
    good = gate_call(identity, here, b"body", now)
    gate = rpc._Gate(here)
    assert gate.caller(good, METHOD, b"body", now) == identity.peer_id
    with pytest.raises(SignatureError, match="replay"):
        gate.caller(good, METHOD, b"body", now + 1)
    with pytest.raises(SignatureError):
        rpc._Gate(here).caller(good, METHOD, b"other", now)
    with pytest.raises(SignatureError):
        rpc._Gate(here).caller(good, METHOD + "x", b"body", now)
    with pytest.raises(SignatureError):
        rpc._Gate(bytes([1]) * 32).caller(good, METHOD, b"body", now)
    with pytest.raises(SignatureError):
        rpc._Gate(here).caller({**good, "swarm-peer": Identity.generate().peer_id}, METHOD, b"body", now)
    with pytest.raises(SignatureError, match="not signed"):
        rpc._Gate(here).caller({}, METHOD, b"body", now)
    for skew in (61, -61, float("nan")):
        with pytest.raises(ClockError):
            rpc._Gate(here).caller(gate_call(identity, here, b"body", now + skew), METHOD, b"body", now)
