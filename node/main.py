"""Start and stop a volunteer's node: the composition of its parts, in order, and their end in reverse.

`run_node` returns when it is cancelled (Ctrl-C, SIGTERM) or fails; either way no child process,
port, socket or lock of it is left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch

from node.adapters import AdapterStore
from node.chains import ChainServer
from node.link import Link
from node.memory import Ledger, default_budget
from node.serving import NodeModel, fitting_blocks
from node.worker import Worker
from swarm.compute import Compute, Priority
from swarm.datadir import DataDir
from swarm.errors import DeviceError, InputError, OutOfMemory
from swarm.identity import Identity
from swarm.ids import Span
from swarm.metrics import Traffic
from swarm.model.checkpoint import open_for
from swarm.model.shard import n_blocks
from swarm.net.discovery import REFRESH_S, publish_span, snapshot, withdraw_span
from swarm.net.health import serve_health
from swarm.net.join import JoinInfo
from swarm.net.p2p import Peer, PeerSettings
from swarm.net.routing import choose_span

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DRAIN_S = 10.0
"""How long a node that was told to stop waits for its sessions to move elsewhere."""
log = structlog.get_logger()


@dataclass(frozen=True)
class NodeSettings:
    """What a volunteer chooses; the defaults suit a machine that was never looked at."""

    join: JoinInfo
    data_dir: Path
    model: str = ""
    """Where this node finds the weights, if not where the join string says."""
    device: str = "auto"
    dtype: str = "auto"
    memory_bytes: int | None = None
    """Budget of the ledger; None: most of what is free."""
    blocks: str = ""
    """START:END; empty: the span the swarm needs most, of as many blocks as fit."""
    peer: PeerSettings = PeerSettings()


def pick_device(name: str) -> torch.device:
    """Raises DeviceError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"'{name}' is not a device such as cuda:0 or cpu") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise DeviceError(f"this machine has no {name}", "choose --device cpu, or install a CUDA driver")
    if device.type not in ("cuda", "cpu"):
        raise DeviceError(f"devices of type {device.type} are not supported", "choose --device cuda or cpu")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Raises InputError."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise InputError(f"'{name}' is not a dtype", f"choose --dtype from {', '.join(DTYPES)}")
    return DTYPES[name]


async def run_node(settings: NodeSettings, ready: Callable[[Span, str], None]) -> None:
    """Serve until cancelled. `ready(span, peer id)` is called once others can reach this node.

    Raises any SwarmError of starting up or of libp2p; nothing is left running then.
    """
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    join = settings.join
    checkpoint = await asyncio.to_thread(open_for, join.model, join.revision, join.model_hash, settings.model)
    total = n_blocks(checkpoint.config)
    ledger = Ledger(default_budget(device) if settings.memory_bytes is None else settings.memory_bytes)
    wanted = Span.parse(settings.blocks, total) if settings.blocks else None
    capacity = fitting_blocks(checkpoint, dtype, ledger.budget_bytes)
    if wanted is None and capacity < 1:
        raise OutOfMemory(
            f"not one block fits into {ledger.budget_bytes >> 20} MiB", "raise --vram, or use a narrower --dtype"
        )
    traffic = Traffic()
    async with AsyncExitStack() as stack:
        data_dir = stack.enter_context(DataDir(settings.data_dir))
        identity = Identity.load_or_create(data_dir.path / "identity.key")
        peer = await Peer.start(identity, settings.join.bootstrap, settings.peer)
        stack.push_async_callback(peer.stop)
        span = wanted or choose_span((await snapshot(peer, checkpoint.model_hash)).nodes, total, capacity)
        compute = Compute()
        stack.callback(compute.stop)
        log.info("loading", blocks=str(span), of=total, device=str(device), dtype=str(dtype))
        model = await compute.run(Priority.BACKGROUND, NodeModel, checkpoint, span, dtype, device, ledger)
        # The view that sessions without an adapter use, so that the first prompt does not wait for it.
        await compute.run(Priority.BACKGROUND, model.view, span)
        adapters = AdapterStore(data_dir.path, peer, checkpoint.model_hash)
        await adapters.start()
        worker = None
        if settings.join.coordinator:
            link = Link(settings.join, identity, traffic)
            stack.push_async_callback(link.close)
            worker = Worker(peer, compute, model, ledger, link, adapters, traffic, data_dir.path)

        def count(size: int) -> None:
            traffic.activation_bytes += size

        server = ChainServer(peer, compute, model, ledger, adapters, worker, count)
        await server.start()
        await serve_health(peer, server.health)

        async def announce() -> None:
            name = str(dtype).removeprefix("torch.")
            first = True
            while True:
                stored = await publish_span(
                    peer, checkpoint.model_hash, span, dtype=name, sessions=len(server.sessions)
                )
                await adapters.announce()
                if not stored:
                    log.warning("not_announced", reason="no DHT peer took the record; trying again")
                elif first:
                    first = False
                    stack.push_async_callback(server.drain, DRAIN_S)
                    stack.push_async_callback(withdraw_span, peer, checkpoint.model_hash, span, name)
                    log.info("serving", blocks=str(span), peer=peer.peer_id)
                    ready(span, peer.peer_id)
                await asyncio.sleep(REFRESH_S if stored else 1.0)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(announce())
            tasks.create_task(peer.lost())
            if worker is not None:
                tasks.create_task(worker.run())
