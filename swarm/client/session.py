"""Prompting a swarm: find a chain, keep a session on it, generate and score.

`SwarmClient` holds the head and the tokenizer; the blocks are elsewhere. Inference needs no
coordinator: nodes and adapters are found in the DHT. What is typed here is seen by every node
of the chain (hidden states can be inverted to tokens).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from swarm.client.sampling import Sampler, Sampling
from swarm.errors import AdapterNotFound, BlocksMissing, ContextTooLong, InputError
from swarm.identity import Identity
from swarm.metrics import Traffic
from swarm.model.checkpoint import Checkpoint
from swarm.model.shard import Head, context_length, n_blocks
from swarm.net.chain import Chain
from swarm.net.discovery import snapshot
from swarm.net.join import JoinInfo
from swarm.net.p2p import Peer, PeerSettings
from swarm.net.routing import find_chain
from swarm.net.view import AdapterInfo, Hop, SwarmView
from swarm.wire.v1 import chain_pb2 as pb


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
    ) -> None:
        """encoding: how activations cross the links ("float32" for exact results of fp32 nodes)."""
        self._join = join
        self._checkpoint = checkpoint
        self._identity_path = identity_path
        self._dtype = dtype
        self._encoding = encoding
        self._stack = AsyncExitStack()
        self.traffic = Traffic()
        self.n_blocks = n_blocks(checkpoint.config)
        self.context_length = context_length(checkpoint.config)

    async def __aenter__(self) -> SwarmClient:
        identity = Identity.load_or_create(self._identity_path)
        self._peer = await Peer.start(identity, self._join.bootstrap, PeerSettings(client_only=True))
        self._stack.push_async_callback(self._peer.stop)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    @property
    def head(self) -> Head:
        """Embedding, norm and LM head, loaded on first use."""
        if not hasattr(self, "_head"):
            self._head = Head(self._checkpoint, self._dtype, torch.device("cpu"))
        return self._head

    @property
    def tokenizer(self) -> Any:
        if not hasattr(self, "_tokenizer"):
            self._tokenizer = self._checkpoint.tokenizer()
        return self._tokenizer

    async def view(self) -> SwarmView:
        """What the DHT says now."""
        return await snapshot(self._peer, self._checkpoint.model_hash)

    async def route(self, adapter: str = "") -> tuple[tuple[Hop, ...], AdapterInfo | None]:
        """A chain over all blocks, and the adapter's files. Raises BlocksMissing, AdapterNotFound."""
        view = await self.view()
        if not view.nodes:
            raise BlocksMissing(f"no node serves {self._checkpoint.name} yet: blocks 0-{self.n_blocks - 1} are missing")
        hops = find_chain(view.nodes, self.n_blocks)
        if not adapter:
            return hops, None
        found = view.adapter(adapter)
        if found is None:
            names = ", ".join(sorted({a.name for a in view.adapters})) or "none"
            raise AdapterNotFound(f"no node announces an adapter '{adapter}' (announced: {names})")
        return hops, found

    async def _open(self, mode: pb.Mode.ValueType, adapter: str, via: Sequence[Hop] = ()) -> Chain:
        hops, found = await self.route(adapter)
        return await Chain.open(
            self._peer,
            via or hops,
            mode,
            self._checkpoint.model_hash,
            adapter=found,
            encoding=self._encoding,
            dtype=self._dtype,
            count=self._count,
        )

    def _count(self, size: int) -> None:
        self.traffic.activation_bytes += size

    async def session(self, adapter: str = "", via: Sequence[Hop] = ()) -> Session:
        """Open a session with a KV cache on every node of a chain (`via`, or the best). Close it after use."""
        return Session(self, await self._open(pb.MODE_CACHED, adapter, via))

    async def scorer(self, adapter: str = "", via: Sequence[Hop] = ()) -> Scorer:
        """An open chain (`via`, or the best) for many stateless passes. Close it after use."""
        return Scorer(self, await self._open(pb.MODE_STATELESS, adapter, via))

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
        ids = {self.tokenizer.eos_token_id, self._checkpoint.config.eos_token_id}
        flat = {
            i for entry in ids if entry is not None for i in (entry if isinstance(entry, (list, tuple)) else [entry])
        }
        return frozenset(flat)


class Session:
    """Token positions and KV cache on a chain."""

    def __init__(self, client: SwarmClient, chain: Chain) -> None:
        self._client = client
        self._chain = chain
        self._length = 0

    @property
    def hops(self) -> Sequence[Hop]:
        return self._chain.hops

    async def step(self, ids: Sequence[int]) -> torch.Tensor:
        """Append tokens; logits [V] after the last of them. Raises ContextTooLong, PeerLost, …"""
        if self._length + len(ids) > self._client.context_length:
            raise ContextTooLong(
                f"{self._length + len(ids)} tokens are more than the model's context of {self._client.context_length}"
            )
        # Inference mode belongs to the thread: held over an await it would leak into other tasks.
        with torch.inference_mode():
            hidden = self._client.head.embed(torch.tensor([list(ids)]))
        _, output = await self._chain.forward(hidden, self._length)
        self._length += len(ids)
        with torch.inference_mode():
            return self._client.head.logits(output[:, -1:])[0, 0]

    async def generate(
        self, prompt_ids: Sequence[int], max_new_tokens: int, sampling: Sampling, stop: frozenset[int] = frozenset()
    ) -> AsyncIterator[int]:
        """Yield new tokens one by one; the stop token itself is not yielded."""
        if self._length + len(prompt_ids) + max_new_tokens > self._client.context_length:
            raise ContextTooLong(
                f"{self._length + len(prompt_ids)} prompt and {max_new_tokens} new tokens are more than"
                f" the model's context of {self._client.context_length}"
            )
        sampler = Sampler(sampling)
        logits = await self.step(prompt_ids)
        for produced in range(1, max_new_tokens + 1):
            token = sampler.pick(logits)
            if token in stop:
                return
            yield token
            if produced < max_new_tokens:
                logits = await self.step([token])

    async def close(self) -> None:
        await self._chain.close()


class Scorer:
    """Stateless forward passes over one open chain."""

    def __init__(self, client: SwarmClient, chain: Chain) -> None:
        self._client = client
        self._chain = chain

    async def hidden(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, D] after the last block, of right-padded token ids [B, T]."""
        with torch.inference_mode():
            embedded = self._client.head.embed(ids_BT)
        _, hidden = await self._chain.forward(embedded)
        return hidden

    async def close(self) -> None:
        await self._chain.close()
