"""What a node does of its own accord: choose a span, load it, tell the swarm about it, and move when that helps.

The swarm's needs are judged by pure functions (`swarm.net.placement`) over records that every node
publishes; this file reads the records, acts, and publishes its own. A node whose volunteer named the
blocks, or that trains, stays where it is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import structlog
import torch

from node.announcing import keep_announced
from node.chains import ChainServer
from node.measure import measure_speed
from node.memory import Ledger
from node.serving import NodeModel, fitting_blocks, span_bytes, workspace_bytes
from swarm.compute import Compute, Priority
from swarm.errors import OutOfMemory, SpanError
from swarm.ids import Span
from swarm.model.checkpoint import Checkpoint
from swarm.model.quantize import SCHEMES, Scheme
from swarm.model.shard import cuts, n_blocks
from swarm.model.speed import measure as measure_schemes
from swarm.model.speed import pick_scheme
from swarm.net.discovery import REFRESH_S, publish_status, snapshot
from swarm.net.p2p import Peer
from swarm.net.ping import measure_many, median_bytes_per_s, worth_measuring
from swarm.net.placement import SETTLE_S, choose_span, consider_move, settle_span
from swarm.net.view import NodeInfo, NodeStatus

_CONSIDER_S = 16.0
_CONFIRM_S = 2.0
"""How often a node thinks about moving, and how often once it has announced a move."""
_MEASURE_S = 1.0
_LOOK_AROUND_S = 60.0
_PROBE_BYTES = 256 * 1024
_SHARE_OF_WEIGHTS = 2 / 3
"""Of the budget; the rest is for caches and training."""
log = structlog.get_logger()


@dataclass(frozen=True)
class Choices:
    """What the volunteer decided, or left to the node."""

    dtype: torch.dtype
    device: torch.device
    scheme: Scheme | None
    """None: the node decides."""
    blocks: str
    """START:END; empty: the node decides."""
    trains: bool
    """A node that trains holds exact weights where they fit, and does not move."""


class Volunteer:
    """One node's place in the swarm."""

    def __init__(self, peer: Peer, checkpoint: Checkpoint, ledger: Ledger, compute: Compute, choices: Choices) -> None:
        self._peer = peer
        self._checkpoint = checkpoint
        self._ledger = ledger
        self._compute = compute
        self._choices = choices
        self._total = n_blocks(checkpoint.config)
        self._server: ChainServer | None = None
        self._served_since_s = time.monotonic()
        self._scheme: Scheme = choices.scheme or "none"
        pinned = bool(choices.blocks) or choices.trains
        self._status = NodeStatus(
            span=Span(0, 1),
            state="choosing",
            dtype=str(choices.dtype).removeprefix("torch."),
            pinned=pinned,
            epoch=int(time.time()),
        )

    async def settle(self) -> Span:
        """The span to hold. Raises SpanError, OutOfMemory."""
        wanted = Span.parse(self._choices.blocks, self._total) if self._choices.blocks else None
        self._scheme = await self._compute.run(Priority.BACKGROUND, self._choose_scheme, wanted)
        if wanted is not None:
            self._status = replace(self._status, span=wanted, quantization=self._scheme)
            return wanted
        capacity = fitting_blocks(self._checkpoint, self._choices.dtype, self._ledger.budget_bytes, self._scheme)
        if capacity < 1:
            raise OutOfMemory(
                f"not one block fits into {self._ledger.budget_bytes >> 20} MiB",
                "raise --vram, or use a narrower --dtype",
            )
        nodes = (await snapshot(self._peer, self._checkpoint.model_hash)).nodes
        span = choose_span(nodes, self._total, capacity)
        if len(span) == self._total and not nodes:
            self._status = replace(self._status, span=span, quantization=self._scheme)
            return span
        # Others may choose at this moment: say it, wait until everybody can have read it, and settle.
        self._status = replace(
            self._status, span=span, quantization=self._scheme, reason="choosing blocks; waiting whether others do"
        )
        await self.publish()
        log.info("choosing", blocks=str(span), settles_in_s=SETTLE_S)
        await asyncio.sleep(SETTLE_S)
        nodes = (await snapshot(self._peer, self._checkpoint.model_hash)).nodes
        with suppress(SpanError):  # nobody took our record: our choice stands
            span = settle_span(self._peer.peer_id, nodes, self._total)
        span = _cut(span, cuts(self._checkpoint.config))
        self._status = replace(self._status, span=span)
        return span

    def _choose_scheme(self, wanted: Span | None) -> Scheme:
        """By memory and measured speed. Compute thread only. Raises OutOfMemory."""
        choices, checkpoint = self._choices, self._checkpoint
        if choices.scheme is not None:
            return choices.scheme
        span = wanted or Span(0, self._total)
        sizes = {scheme: span_bytes(checkpoint, span, choices.dtype, scheme) for scheme in SCHEMES}
        budget = self._ledger.budget_bytes - workspace_bytes(checkpoint.config, choices.dtype)
        if wanted is None:
            budget = int(budget * _SHARE_OF_WEIGHTS)
            # A node need not hold the whole model: what counts is one block.
            sizes = {scheme: size // self._total for scheme, size in sizes.items()}
        if choices.trains and sizes["none"] <= budget:
            return "none"
        if min(sizes.values()) > budget:
            what = f"blocks {wanted} do not fit" if wanted else "not one block fits"
            raise OutOfMemory(
                f"{what} into {self._ledger.budget_bytes >> 20} MiB, whatever the weights are narrowed to",
                "raise --vram, hold fewer blocks (--blocks), or use a narrower --dtype",
            )
        speeds = measure_schemes(choices.device, choices.dtype)
        scheme = pick_scheme(sizes, budget, speeds)
        log.info("scheme", weights=scheme, int8_gain=round(speeds.gain("int8", 1), 2))
        return scheme

    async def load(self, span: Span) -> NodeModel:
        """The span's weights and the view that sessions without an adapter use. Raises OutOfMemory, …"""
        self._status = replace(self._status, span=span, state="joining", reason="loading weights")
        await self.publish()
        choices = self._choices
        log.info(
            "loading", blocks=str(span), of=self._total, device=str(choices.device), dtype=self._status.dtype,
            weights=self._scheme,
        )  # fmt: skip
        model = await self._compute.run(
            Priority.BACKGROUND,
            lambda: NodeModel(self._checkpoint, span, choices.dtype, choices.device, self._ledger, self._scheme),
        )
        view = await self._compute.run(Priority.BACKGROUND, model.view, span)
        speed = await self._compute.run(
            Priority.BACKGROUND, measure_speed, view.view, model.width, choices.dtype, choices.device, _MEASURE_S
        )
        self._status = replace(
            self._status,
            batching="rows" if view.batches else "one",
            decode_s_per_block=speed.decode_s_per_block,
            decode8_s_per_block=speed.decode8_s_per_block,
            prefill_tokens_per_s=speed.prefill_tokens_per_s,
        )
        return model

    def serves(self, server: ChainServer) -> None:
        """From now on the server's sessions are this node's."""
        self._server = server
        self._served_since_s = time.monotonic()
        self._status = replace(self._status, state="serving", reason="")

    def status(self) -> NodeStatus:
        """What the record says now."""
        status = replace(self._status, settled_s=time.monotonic() - self._served_since_s)
        server = self._server
        if server is None:
            return status
        if server.draining and status.state == "serving":
            status = replace(status, state="draining", reason="the node is shutting down")
        room = max(0, self._ledger.room("kv", "resend"))
        used = max(server.sessions.admission.expected_bytes, self._ledger.used_by("kv"))
        return replace(
            status,
            sessions=len(server.sessions),
            queue=server.sessions.admission.waiting,
            kv_total_bytes=room,
            kv_free_bytes=max(0, room - used),
        )

    def token_block_s(self) -> float:
        """Seconds a token of a long chunk and a block take here, as measured; 0 before that."""
        status = self._status
        if status.prefill_tokens_per_s <= 0:
            return 0.0
        return 1.0 / (status.prefill_tokens_per_s * len(status.span))

    async def publish(self) -> bool:
        """Write the record. False if no DHT peer took it."""
        return await publish_status(self._peer, self._checkpoint.model_hash, self.status())

    async def announce(self, first: Callable[[], None]) -> None:
        """Write records until cancelled; `first` is called once others can see this node."""

        def taken() -> None:
            log.info("serving", blocks=str(self._status.span), peer=self._peer.peer_id)
            first()

        await keep_announced(self.publish, taken, REFRESH_S)

    async def look_around(self) -> None:
        """Measure round trips and bandwidth to neighbours now and then, until cancelled."""
        while True:
            nodes = (await snapshot(self._peer, self._checkpoint.model_hash)).nodes
            own = NodeInfo(peer_id=self._peer.peer_id, **vars(self._status))
            distances = await measure_many(self._peer, worth_measuring(own, nodes), probe_bytes=_PROBE_BYTES)
            self._status = replace(
                self._status,
                rtts_s=tuple(sorted((peer_id, one.rtt_s) for peer_id, one in distances.items())),
                link_bytes_per_s=median_bytes_per_s(distances.values()),
            )
            await asyncio.sleep(_LOOK_AROUND_S)

    async def leave(self, drain_s: float) -> None:
        """Say that this node is leaving, and let its sessions go elsewhere."""
        assert self._server is not None
        self._server.draining = True
        await self.publish()
        await self._server.drain(drain_s)

    def report(self) -> None:
        """Log what this node did for others."""
        server = self._server
        assert server is not None
        log.info(
            "served",
            sessions=server.sessions.opened,
            steps=server.batcher.steps,
            batches=server.batcher.batches,
            most_used_bytes=self._ledger.most_used_bytes,
            budget_bytes=self._ledger.budget_bytes,
        )

    async def rebalance(self, drain_s: float) -> None:
        """Move to another span whenever the swarm gains by it, until cancelled."""
        if self._status.pinned:
            return
        announced_at: float | None = None
        while True:
            await asyncio.sleep(_CONSIDER_S if announced_at is None else _CONFIRM_S)
            nodes = (await snapshot(self._peer, self._checkpoint.model_hash)).nodes
            since_s = None if announced_at is None else time.monotonic() - announced_at
            decision = consider_move(self._peer.peer_id, nodes, self._total, since_s)
            if decision.kind == "announce":
                log.info("move_announced", to=str(decision.span), reason=decision.reason)
                self._status = replace(self._status, next_span=decision.span)
                announced_at = time.monotonic()
                await self.publish()
            elif decision.kind == "withdraw":
                log.info("move_withdrawn", reason=decision.reason)
                self._status = replace(self._status, next_span=None)
                announced_at = None
                await self.publish()
            elif decision.kind == "go" and decision.span is not None:
                announced_at = None
                await self._move(decision.span, decision.reason, drain_s)

    async def _move(self, span: Span, reason: str, drain_s: float) -> None:
        server = self._server
        assert server is not None
        span = _cut(span, cuts(self._checkpoint.config))
        log.info("moving", from_=str(self._status.span), to=str(span), reason=reason)
        self._status = replace(self._status, state="draining", reason=f"moving to blocks {span}")
        await self.publish()
        await server.drain(drain_s)
        await server.drop_model()
        self._status = replace(self._status, epoch=self._status.epoch + 1)
        server.use(await self.load(span))
        self._status = replace(self._status, next_span=None)
        self.serves(server)
        await self.publish()
        log.info("moved", blocks=str(span))


def _cut(span: Span, places: Sequence[int]) -> Span:
    """The span, made smaller until it starts and ends where this family may be cut. Raises SpanError."""
    within = [place for place in places if span.start <= place <= span.end]
    if len(within) < 2:
        raise SpanError(
            f"blocks {span} hold no part that this family can be cut into (cuts: {', '.join(map(str, places))})",
            "give the node more memory (--vram), or name a span with --blocks",
        )
    return Span(within[0], within[-1])
