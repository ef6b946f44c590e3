"""Adapters of finished jobs reach a node's store beside its polls, whatever fails on the way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from node.adapters import AdapterStore
from node.finished import FinishedAdapters
from swarm.identity import Identity
from swarm.net.p2p import Peer, PeerSettings
from swarm.net.view import AdapterInfo, FileInfo
from swarm.wire.v1 import coordinator_pb2 as pb
from tests.unit.node.jobs import Node, job, node_with_coordinator

ONE_ROUND = {"rounds": 1, "inner_steps": 2, "batch_size": 2, "max_length": 16, "min_pipelines": 1}


@dataclass
class Holder:
    node: Node
    store: AdapterStore
    finished: FinishedAdapters

    async def finish_job(self, seed: int) -> pb.FinishedAdapter:
        """A job of one round, always of the same name; its adapter differs by seed."""
        job_id = await self.node.submit(job(schedule=ONE_ROUND | {"seed": seed}))
        await self.node.train(await self.node.assigned(job_id, 1))
        while True:
            for adapter in (await self.node.poll()).adapters:
                if adapter.job_id == job_id:
                    return adapter

    async def holds(self, adapter: pb.FinishedAdapter) -> None:
        async with asyncio.timeout(20):
            await self.finished.settled()
        assert self.store.holds(info_of(adapter))


def info_of(adapter: pb.FinishedAdapter) -> AdapterInfo:
    files = tuple(FileInfo(file.name, file.sha256, file.size) for file in adapter.files)
    return AdapterInfo(adapter.name, adapter.job_id, adapter.round, files, ())


@asynccontextmanager
async def holding(tiny: Path, folder: Path) -> AsyncIterator[Holder]:
    peer = await Peer.start(Identity.load_or_create(folder / "peer.key"), (), PeerSettings())
    try:
        async with node_with_coordinator(tiny, folder) as node:
            store = AdapterStore(folder / "node", peer, node.model.checkpoint.model_hash)
            await store.start()
            finished = FinishedAdapters(node.link, store, again_s=0.05)
            yield Holder(node, store, finished)
            await finished.stop()
    finally:
        await peer.stop()


async def test_an_adapter_that_cannot_be_kept_is_fetched_again(tiny: Path, tmp_path: Path) -> None:
    async with holding(tiny, tmp_path) as holder:
        adapter = await holder.finish_job(0)
        (tmp_path / "node" / "adapters").write_text("in the way")
        holder.finished.name([adapter])
        # The poll goes on; once the way is free the adapter comes without being named again.
        await holder.node.link.call(lambda client: client.list_jobs())
        assert not holder.store.holds(info_of(adapter))
        (tmp_path / "node" / "adapters").unlink()
        await holder.holds(adapter)


async def test_a_later_job_of_the_same_name_and_length_replaces_the_adapter(tiny: Path, tmp_path: Path) -> None:
    async with holding(tiny, tmp_path) as holder:
        first = await holder.finish_job(0)
        holder.finished.name([first])
        await holder.holds(first)
        # The coordinator is set up anew: what it names has the name and the rounds of what the node holds.
        second = pb.FinishedAdapter()
        second.CopyFrom(first)
        second.job_id = "another"
        assert not holder.store.holds(info_of(second))
        holder.finished.name([second])
        await holder.holds(second)


async def test_what_a_killed_node_left_half_written_is_removed(tiny: Path, tmp_path: Path) -> None:
    left = tmp_path / "node" / "adapters" / ".new-killed"
    left.mkdir(parents=True)
    (left / "adapter_model.safetensors").write_bytes(b"half")
    async with holding(tiny, tmp_path):
        assert not left.exists()
