"""Start and stop a volunteer's node: the composition of its parts, in order, and their end in reverse.

`run_node` returns when it is cancelled (Ctrl-C, SIGTERM) or fails; either way no child process,
port, socket or lock of it is left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog
import torch

from node.adapters import AdapterStore
from node.chains import ChainServer
from node.link import Link
from node.memory import Ledger, default_budget, use_one_arena
from node.volunteer import Choices, Volunteer
from node.worker import Worker
from swarm.adapters.registry import read_adapter
from swarm.baton import TRAINING_SHARE
from swarm.compute import Compute
from swarm.datadir import DataDir
from swarm.errors import DeviceError, InputError
from swarm.identity import Identity
from swarm.ids import Span
from swarm.metrics import Traffic
from swarm.model.quantize import SCHEMES, Scheme
from swarm.net.health import serve_health
from swarm.net.join import JoinInfo
from swarm.net.p2p import Peer, PeerSettings
from swarm.net.peer_source import open_or_fetch
from swarm.net.ping import serve_pings
from swarm.net.weights import serve_weights

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
    quantize: str = "auto"
    """none, int8 or int4 weights; auto: by memory and measured speed, or none if the dtype was chosen."""
    memory_bytes: int | None = None
    """Budget of the ledger; None: most of what is free."""
    blocks: str = ""
    """START:END; empty: the span the swarm needs most, of as many blocks as fit."""
    adapters: tuple[tuple[str, str], ...] = ()
    """(name, folder or hub id) of adapters to announce and serve."""
    training_share: float = TRAINING_SHARE
    """Of the computing time, what training keeps while this node serves too; in [0, 1)."""
    trains: bool = True
    """Whether the node takes part in the coordinator's jobs, if there is one."""
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


def pick_dtype(name: str, device: torch.device, trains: bool = False) -> torch.dtype:
    """Raises InputError."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise InputError(f"'{name}' is not a dtype", f"choose --dtype from {', '.join(DTYPES)}")
    if trains and DTYPES[name] == torch.float16:
        raise InputError(
            "a node that trains cannot hold its blocks in float16: gradients are rounded to zero in it",
            "choose --dtype bfloat16 or float32, or serve prompts only with --no-train",
        )
    return DTYPES[name]


def pick_scheme(quantize: str, dtype: str) -> Scheme | None:
    """The scheme that was asked for; None: the node decides. Raises InputError."""
    if quantize == "auto":
        return None if dtype == "auto" else "none"
    if quantize not in SCHEMES:
        raise InputError(f"--quantize cannot be '{quantize}'", f"choose it from auto, {', '.join(SCHEMES)}")
    return quantize


async def run_node(settings: NodeSettings, ready: Callable[[Span, str], None]) -> None:
    """Serve until cancelled. `ready(span, peer id)` is called once others can reach this node.

    Raises any SwarmError of starting up or of libp2p; nothing is left running then.
    """
    use_one_arena()
    device = pick_device(settings.device)
    trains = settings.trains and bool(settings.join.coordinator)
    choices = Choices(
        pick_dtype(settings.dtype, device, trains),
        device,
        pick_scheme(settings.quantize, settings.dtype),
        settings.blocks,
        trains,
    )
    ledger = Ledger(default_budget(device) if settings.memory_bytes is None else settings.memory_bytes)
    offered = {name: await asyncio.to_thread(read_adapter, source) for name, source in settings.adapters}
    traffic = Traffic()
    async with AsyncExitStack() as stack:
        data_dir = stack.enter_context(DataDir(settings.data_dir))
        identity = Identity.load_or_create(data_dir.path / "identity.key")
        peer = await Peer.start(identity, settings.join.bootstrap, settings.peer)
        stack.push_async_callback(peer.stop)
        checkpoint = await open_or_fetch(peer, settings.join, settings.model, seal_hash=settings.join.seal_hash)
        # A GPU is only asked to compute: what it still has to do stands before whoever is served next.
        settle = partial(torch.cuda.synchronize, device) if device.type == "cuda" else None
        compute = Compute(settings.training_share, settle)
        stack.callback(compute.stop)
        volunteer = Volunteer(peer, checkpoint, ledger, compute, choices)
        span = await volunteer.settle()
        model = await volunteer.load(span)
        await serve_weights(peer, checkpoint)
        adapters = AdapterStore(data_dir.path, peer, checkpoint.model_hash)
        await adapters.start()
        for name, files in offered.items():
            adapters.offer(name, files)
        worker = None
        if trains:
            link = Link(settings.join, identity, traffic)
            stack.push_async_callback(link.close)
            worker = Worker(
                *(peer, compute, model, ledger, link, adapters, traffic, data_dir.path), volunteer.token_block_s
            )

        def count(size: int) -> None:
            traffic.activation_bytes += size

        server = ChainServer(peer, compute, model, ledger, adapters, worker, count)
        del model  # the server's alone: a node that moves gives the old weights' memory back
        await server.start()
        await serve_health(peer, server.health)
        await serve_pings(peer)
        volunteer.serves(server)
        stack.callback(volunteer.report)
        stack.push_async_callback(volunteer.leave, DRAIN_S)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(volunteer.announce(lambda: ready(volunteer.status().span, peer.peer_id)))
            tasks.create_task(adapters.keep_announcing())
            tasks.create_task(volunteer.look_around())
            tasks.create_task(volunteer.rebalance(DRAIN_S))
            tasks.create_task(peer.lost())
            if worker is not None:
                tasks.create_task(worker.run())
