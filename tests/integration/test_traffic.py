"""Bytes that are reported are bytes on the socket: a counting TCP proxy between a client and its coordinator."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.convergence_run import socket_bytes
from coordinator.app import Coordinator
from coordinator.ports import ModelFacts
from swarm.adapters.registry import ModelAdapters
from swarm.client.coordinator import CoordinatorClient
from swarm.compress import FrameContext, encode
from swarm.config import CodecSettings, LoraMethod
from swarm.errors import JobNotFound
from swarm.identity import Identity
from swarm.metrics import Traffic
from swarm.model.checkpoint import Checkpoint
from swarm.wire.rpc import COORDINATOR_SERVICE, RpcServer
from swarm.wire.tls import ServerTls
from swarm.wire.v1 import common_pb2
from swarm.wire.v1 import coordinator_pb2 as pb


class CountingProxy:
    """Forwards TCP connections to one port and counts the bytes of each direction."""

    def __init__(self, port: int) -> None:
        self._target = port
        self.up = 0
        self.down = 0

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        await asyncio.gather(self._pump(reader, far_writer, "up"), self._pump(far_reader, writer, "down"))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                setattr(self, way, getattr(self, way) + len(data))
                writer.write(data)
                await writer.drain()
        writer.close()

    async def stop(self) -> None:
        self._server.close()


@pytest.mark.parametrize(("density", "bits"), [(0.015625, 1), (0.125, 4), (1.0, 8)])
async def test_contribution_and_downlink_bytes_are_those_of_the_socket(
    density: float, bits: int, smollm2: Path, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(str(smollm2))
    adapters = ModelAdapters(checkpoint)
    draw = np.random.default_rng(0)
    delta: dict[str, NDArray[np.float32]] = {
        key: draw.normal(size=shape).astype(np.float32) for key, shape in adapters.shapes(LoraMethod()).items()
    }
    payload = encode(delta, CodecSettings(density=density, bits=bits), FrameContext("job", 1, bytes(32)))
    identity = Identity.generate()
    facts = ModelFacts("smollm2", "local", checkpoint.model_hash, 30, adapters)
    coordinator = await Coordinator.open(tmp_path / "data", facts, identity)
    tls = ServerTls.load_or_create(tmp_path)
    server = RpcServer(COORDINATOR_SERVICE, coordinator.service, tls)
    proxy = CountingProxy(await server.start("127.0.0.1", 0))
    traffic = Traffic()
    client = await CoordinatorClient.connect(
        f"127.0.0.1:{await proxy.start()}", tls.fingerprint, Identity.generate(), traffic
    )
    await client.list_jobs()  # handshakes are behind us
    before = proxy.up
    digest = await client.put_blob(payload, contribution=True)
    with pytest.raises(JobNotFound):  # as much is sent for a job that is there
        await client.contribute(_contribution(digest, len(payload)))
    sent = proxy.up - before
    assert len(payload) < traffic.contribution_bytes <= sent <= socket_bytes(len(payload))
    before, counted = proxy.down, traffic.downlink_bytes
    assert await client.get_blob(digest, len(payload)) == payload
    received, reported = proxy.down - before, traffic.downlink_bytes - counted
    assert len(payload) < reported <= received <= socket_bytes(len(payload))
    await client.close()
    await server.stop(0)
    await coordinator.close()
    await proxy.stop()


def _contribution(digest: bytes, size: int) -> pb.ContributeRequest:
    return pb.ContributeRequest(
        job_id="0" * 16,
        round=100,
        generation=3,
        pipeline_id=2,
        payload_sha256=digest,
        payload_size=size,
        inner_steps=20,
        tokens=5120,
        lease_id=1000,
        label_tokens=5000,
        loss=3.6,
        span=common_pb2.Span(start=0, end=30),
    )
