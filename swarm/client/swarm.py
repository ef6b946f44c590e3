"""A client of one swarm: where its nodes are, which way to go, and the head.

`SwarmClient` holds the head and the tokenizer; the blocks are elsewhere. Inference needs no
coordinator: nodes and adapters are found in the DHT. What is typed here is seen by every node
of the chain (hidden states can be inverted to tokens).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import structlog
import torch

from swarm.client.avoid import AVOID_FILE, AvoidList
from swarm.client.heads import BatchedHead
from swarm.client.session import Session
from swarm.errors import AdapterNotFound, BlocksMissing, InputError, SwarmError
from swarm.identity import Identity
from swarm.metrics import Traffic
from swarm.model.checkpoint import Checkpoint
from swarm.model.shard import Head, context_length, n_blocks
from swarm.net.chain import Chain, SessionTerms
from swarm.net.discovery import snapshot
from swarm.net.health import Health
from swarm.net.join import JoinInfo
from swarm.net.p2p import Peer, PeerSettings
from swarm.net.peer_source import open_or_fetch
from swarm.net.routing import RouteTerms, find_replacement, find_route
from swarm.net.view import AdapterInfo, Hop, NodeInfo, SwarmView
from swarm.wire.v1 import chain_pb2 as pb

_FRESH_S = 3.0
"""A view of the swarm is looked up again after so long, in the background while sessions are open."""
_STEP_TIMEOUT_S = 600.0
_MOST_MEASURED = 8
_MEASURE_S = 5.0
log = structlog.get_logger()


class SwarmClient:
    """A client of one swarm. Use as an async context manager."""

    def __init__(
        self,
        join: JoinInfo,
        checkpoint: Checkpoint,
        identity_path: Path,
        *,
        dtype: torch.dtype = torch.float32,
        encoding: str = "bfloat16",
        admission_s: float = 60.0,
        exact: bool = False,
        peer: Peer | None = None,
    ) -> None:
        """encoding: how activations cross the links ("float32" for exact results of fp32 nodes).
        admission_s: how long a session waits for room on a node that is full.
        exact: use only nodes whose weights are not quantized. peer: a running one, which stays its
        owner's; None: one of its own, named by the key at `identity_path`. Raises ModelMismatch if the
        checkpoint's tokenizer is not the swarm's."""
        if join.tokenizer_hash:
            checkpoint.check_tokenizer(join.tokenizer_hash, "the swarm")
        self._join = join
        self.checkpoint = checkpoint
        self._identity_path = identity_path
        self._dtype = dtype
        self._encoding = encoding
        self._stack = AsyncExitStack()
        self._view: SwarmView | None = None
        self._viewed_s = 0.0
        self._looking = asyncio.Lock()
        self._measuring: set[asyncio.Task[None]] = set()
        self.admission_s = admission_s
        self._exact = exact
        self._given = peer
        self.avoid = AvoidList(identity_path.with_name(AVOID_FILE))
        self.traffic = Traffic()
        self.n_blocks = n_blocks(checkpoint.config)
        self.context_length = context_length(checkpoint.config)

    async def __aenter__(self) -> SwarmClient:
        self._peer = self._given or await start_client_peer(self._join, self._identity_path)
        if self._given is None:
            self._stack.push_async_callback(self._peer.stop)
        self.health = Health(self._peer)
        self._stack.push_async_callback(self.health.close)
        looking = asyncio.create_task(self._keep_looking())
        self._stack.push_async_callback(_cancelled, looking)
        self._stack.push_async_callback(self._stop_measuring)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _stop_measuring(self) -> None:
        for task in self._measuring:
            task.cancel()
        await asyncio.gather(*self._measuring, return_exceptions=True)

    @property
    def head(self) -> Head:
        """Embedding, norm and LM head, loaded on first use."""
        if not hasattr(self, "_head"):
            self._head = Head(self.checkpoint, self._dtype, torch.device("cpu"))
            self._head.use_few_rows()
        return self._head

    @property
    def heads(self) -> BatchedHead:
        """The head as sessions share it."""
        if not hasattr(self, "_heads"):
            self._heads = BatchedHead(self.head)
            self._stack.callback(self._heads.close)
        return self._heads

    @property
    def tokenizer(self) -> Any:
        if not hasattr(self, "_tokenizer"):
            self._tokenizer = self.checkpoint.tokenizer()
        return self._tokenizer

    def embed(self, ids_BT: torch.Tensor, positions_BT: torch.Tensor) -> torch.Tensor:
        """Token ids and position ids [B, T] to hidden states [B, T, D]."""
        return self.head.embed(ids_BT, positions_BT)

    async def view(self) -> SwarmView:
        """What the DHT says now."""
        await self.refresh()
        assert self._view is not None
        return self._view

    async def refresh(self) -> None:
        """Look the swarm up again."""
        async with self._looking:
            view = await snapshot(self._peer, self.checkpoint.model_hash)
            self._view, self._viewed_s = view, time.monotonic()
        strangers = [node for node in view.nodes if node.peer_id not in self.health.rtts_s][:_MOST_MEASURED]
        self._measuring |= {asyncio.create_task(self._measure(node)) for node in strangers}
        self._measuring -= {task for task in self._measuring if task.done()}

    async def _measure(self, node: NodeInfo) -> None:
        """Learn a node's round trip, for routing."""
        await self.health.ask(Hop(node.peer_id, node.span, node.addrs), "", _MEASURE_S)

    async def _recent_view(self) -> SwarmView:
        if self._view is None or time.monotonic() - self._viewed_s > 2 * _FRESH_S:
            await self.refresh()
        assert self._view is not None
        return self._view

    async def _keep_looking(self) -> None:
        """A node's end must not make a session wait for a lookup."""
        while True:
            await asyncio.sleep(_FRESH_S)
            if self._view is not None:
                with suppress(SwarmError):
                    await self.refresh()

    async def find_hops(self, present: Sequence[Hop], lost: Collection[str]) -> tuple[Hop, ...]:
        """A chain over all blocks without the nodes in `lost` and those avoided at the moment.

        present: the chain so far, whose surviving hops hold KV. Raises BlocksMissing.
        """
        view = await self._recent_view()
        avoided = self.avoid.current()
        try:
            return self._choose(view, present, {*lost, *avoided})
        except BlocksMissing:
            view = await self.view()
        try:
            return self._choose(view, present, {*lost, *avoided})
        except BlocksMissing as error:
            if not avoided:
                raise
            reasons = "; ".join(f"{peer[-6:]} is avoided: {reason}" for peer, (reason, _) in avoided.items())
            raise BlocksMissing(f"{error.cause} ({reasons})", error.fix) from error

    def _choose(self, view: SwarmView, present: Sequence[Hop], avoid: set[str]) -> tuple[Hop, ...]:
        if not view.nodes:
            raise BlocksMissing(f"no node serves {self.checkpoint.name} yet: blocks 0-{self.n_blocks - 1} are missing")
        terms = RouteTerms(rtts_s=self.health.rtts_s, prefer_exact=self._exact)
        if not present:
            return find_route(view.nodes, self.n_blocks, terms, avoid=avoid).hops
        lost = {hop.peer_id for hop in present} & avoid
        return find_replacement(view.nodes, self.n_blocks, present, lost, terms, avoid=avoid).route.hops

    async def find_adapter(self, name: str) -> AdapterInfo | None:
        """The announced adapter of that name; None for the empty name. Raises AdapterNotFound."""
        if not name:
            return None
        view = await self.view()
        found = view.adapter(name)
        if found is None:
            names = ", ".join(sorted({a.name for a in view.adapters})) or "none"
            raise AdapterNotFound(f"no node announces an adapter '{name}' (announced: {names})")
        return found

    async def open_chain(
        self,
        hops: Sequence[Hop],
        mode: pb.Mode.ValueType,
        adapter: AdapterInfo | None,
        terms: SessionTerms | None = None,
    ) -> Chain:
        """Open a chain over these hops, in this client's encoding and dtype."""
        return await Chain.open(
            self._peer,
            hops,
            mode,
            self.checkpoint.model_hash,
            adapter=adapter,
            encoding=self._encoding,
            dtype=self._dtype,
            timeout_s=_STEP_TIMEOUT_S,
            terms=terms,
            count=self._count,
        )

    def _count(self, size: int) -> None:
        self.traffic.activation_bytes += size

    async def session(
        self,
        adapter: str = "",
        via: Sequence[Hop] = (),
        batch: int = 1,
        expected_tokens: int = 0,
        waiting: Callable[[int, str], None] | None = None,
    ) -> Session:
        """A session with a KV cache on every node of a chain (`via`, or the best). Close it after use.

        expected_tokens: columns it will probably reach, which nodes admit it by. waiting: called with
        (position, reason) while a node has no room.
        """
        if batch < 1:
            raise InputError("a session has at least one row")
        found = await self.find_adapter(adapter)
        return Session(self, adapter=found, via=via, batch=batch, expected_tokens=expected_tokens, waiting=waiting)

    async def scorer(self, adapter: str = "", via: Sequence[Hop] = ()) -> Scorer:
        """An open chain (`via`, or the best) for many stateless passes. Close it after use."""
        found = await self.find_adapter(adapter)
        hops = via or await self.find_hops((), ())
        return Scorer(self, await self.open_chain(hops, pb.MODE_STATELESS, found))

    async def gradient_chain(self, adapter: str = "", via: Sequence[Hop] = ()) -> Chain:
        """An open chain whose `backward` returns the gradient of what `forward` was given. Close it after use."""
        found = await self.find_adapter(adapter)
        return await self.open_chain(via or await self.find_hops((), ()), pb.MODE_GRAD, found)

    def encode_prompt(self, prompt: str, *, chat: bool = True) -> list[int]:
        """Token ids of a prompt, as a chat turn where the tokenizer has a template."""
        if not prompt:
            raise InputError("the prompt is empty")
        if chat and self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return list(self.tokenizer(prompt)["input_ids"])

    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end a text."""
        ids = {self.tokenizer.eos_token_id, self.checkpoint.config.eos_token_id}
        flat = {
            i for entry in ids if entry is not None for i in (entry if isinstance(entry, (list, tuple)) else [entry])
        }
        return frozenset(flat)


async def start_client_peer(join: JoinInfo, identity_path: Path) -> Peer:
    """A peer that dials only. Raises JoinError, IdentityError, …"""
    identity = Identity.load_or_create(identity_path)
    return await Peer.start(identity, join.bootstrap, PeerSettings(client_only=True))


@asynccontextmanager
async def open_client(
    join: JoinInfo, identity_path: Path, model: str = "", **settings: Any
) -> AsyncIterator[SwarmClient]:
    """A client whose head and tokenizer come from this machine (`model`, or where the join string says), from
    the hub, or from the swarm's own nodes. settings: of `SwarmClient`. Raises ModelNotFound, ModelMismatch, …"""
    peer = await start_client_peer(join, identity_path)
    try:
        checkpoint = await open_or_fetch(peer, join, model, seal_hash=join.seal_hash)
        async with SwarmClient(join, checkpoint, identity_path, peer=peer, **settings) as client:
            yield client
    finally:
        await peer.stop()


class Scorer:
    """Stateless forward passes over one open chain."""

    def __init__(self, client: SwarmClient, chain: Chain) -> None:
        self._client = client
        self._chain = chain

    async def hidden(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, D] after the last block, of right-padded token ids [B, T]."""
        positions = torch.arange(ids_BT.shape[1]).expand(ids_BT.shape)
        with torch.inference_mode():
            embedded = self._client.embed(ids_BT, positions)
        _, hidden = await self._chain.forward(embedded)
        return hidden

    async def close(self) -> None:
        await self._chain.close()


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
