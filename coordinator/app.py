"""A whole coordinator in one object, without its network: what main.py and the tests start.

In: a data folder, the base model's facts, an identity, bounds and a clock. Out: `service`, ready
to be called. Opening recovers every job from the folder; closing finishes the step under way. A
process that dies instead loses nothing that was acknowledged. A disk that fails an fsync ends it:
`halted` then raises.
"""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import structlog

from coordinator.background import Background
from coordinator.blobs import BlobBounds, Blobs
from coordinator.blobstore import canonical, check_place, note_place, open_store
from coordinator.collector import Collector
from coordinator.disk import Disk, Halt
from coordinator.jobs import Jobs
from coordinator.nodes import Nodes
from coordinator.ports import Clock, CoordinatorSettings, ModelFacts, Signer, SystemClock
from coordinator.service import CoordinatorService
from coordinator.shared import Shared
from coordinator.signal import Signal
from coordinator.storage import Storage

log = structlog.get_logger()


class Coordinator:
    """Use `open`, then `close`."""

    def __init__(self, shared: Shared, nodes: Nodes, jobs: Jobs, halt: Halt, tripped: asyncio.Event) -> None:
        self.service = CoordinatorService(shared, nodes, jobs)
        self.jobs = jobs
        self.nodes = nodes
        self._shared = shared
        self._halt = halt
        self._tripped = tripped
        self._background = Background(
            shared.clock, shared.settings.retry_s, shared.assignments.notify, shared.collector.collect
        )

    @classmethod
    async def open(
        cls,
        data_dir: Path,
        model: ModelFacts,
        identity: Signer,
        settings: CoordinatorSettings | None = None,
        clock: Clock | None = None,
        blobs_at: str = "",
    ) -> Coordinator:
        """`blobs_at`: a folder or URL for complete blobs; empty: the data folder. Raises DataDirLocked, InputError,
        StorageError."""
        settings = settings or CoordinatorSettings()
        clock = clock or SystemClock()
        tripped, loop = asyncio.Event(), asyncio.get_running_loop()
        halt = Halt(lambda: loop.call_soon_threadsafe(tripped.set))
        storage = await asyncio.to_thread(Storage, data_dir, settings.durable_point, halt)
        try:
            disk = Disk(settings.durable_point, halt)
            blobs = await asyncio.to_thread(_open_blobs, data_dir, blobs_at, identity.peer_id, settings, clock, disk)
            shared = Shared(
                storage=storage,
                blobs=blobs,
                collector=Collector(storage, blobs, settings, clock),
                signer=identity,
                clock=clock,
                settings=settings,
                model=model,
                placement_lock=asyncio.Lock(),
                assignments=Signal(),
            )
            nodes = Nodes(
                await asyncio.to_thread(storage.nodes),
                clock.monotonic(),
                silent_s=settings.silent_s,
                recovery_grace_s=settings.recovery_grace_s,
            )
            jobs = Jobs(shared, nodes)
            coordinator = cls(shared, nodes, jobs, halt, tripped)
            await jobs.recover()
        except BaseException:
            await asyncio.to_thread(storage.close)
            raise
        coordinator._watch_nodes()
        shared.collector.start()
        return coordinator

    async def halted(self) -> None:
        """Waits until an fsync fails, for ever if none does. Raises SyncFailed: close, and end the process."""
        await self._tripped.wait()
        self._halt.check()

    async def close(self) -> None:
        """Stop the network side first: calls that come later fail."""
        await self._background.stop()
        await self.jobs.stop()
        await self._shared.collector.stop()
        await asyncio.to_thread(self._shared.storage.close)

    def _watch_nodes(self) -> None:
        """Look at the nodes again when the next of them could have been silent for too long."""
        now_s, settings = self._shared.clock.monotonic(), self._shared.settings
        next_s = self.nodes.next_check_s()
        # Nodes that register later cannot fall silent earlier than this.
        latest_s = now_s + settings.silent_s
        at_s = latest_s if next_s is None else min(max(next_s, now_s), latest_s)
        # A node is lost when it was silent for longer, not for exactly as long.
        self._background.set_alarm(at_s + settings.silent_s / 100, self._check_nodes)

    def _check_nodes(self) -> None:
        silent = self.nodes.silent(self._shared.clock.monotonic())
        for peer in silent:
            self.nodes.drop(peer)
            reason = f"node {peer} was silent for more than {self._shared.settings.silent_s:g} s"
            log.info("node_lost", peer=peer)
            self._background.insist("forgetting a lost node", partial(self._forget, peer))
            self.jobs.node_lost(peer, reason)
        if silent:
            self._shared.assignments.notify()
            self.jobs.nodes_changed()
        self._watch_nodes()

    async def _forget(self, peer: str) -> None:
        if self.nodes.get(peer) is None:
            await asyncio.to_thread(self._delete, peer)

    def _delete(self, peer: str) -> None:
        with self._shared.storage.transaction("node lost"):
            self._shared.storage.delete_node(peer)


def _open_blobs(
    data_dir: Path, place: str, owner: str, settings: CoordinatorSettings, clock: Clock, disk: Disk
) -> Blobs:
    root = data_dir / "blobs"
    place = canonical(place)
    check_place(root, place)
    store = open_store(place, root / "whole", owner, disk)
    note_place(root, place)
    bounds = BlobBounds(settings.max_blob_bytes, settings.max_partials, settings.blob_grace_s)
    return Blobs(root / "partial", store, bounds, clock.monotonic, disk)
