"""The head of a node that leads: embedding, LM head and tokenizer, loaded when they are first asked for.

Both its weights and the logits of a step are charged to the ledger before any memory is taken: a node without room
for them answers so, and names what to change. Who calls it says when it is no longer needed: `rest` keeps the weights
for the next round, `give_up` keeps nothing.
"""

from __future__ import annotations

import asyncio
from typing import Any

import torch

from node.loss import logits_bytes
from node.memory import Ledger
from node.serving import NodeModel
from swarm.compute import Compute, Priority
from swarm.errors import OutOfMemory
from swarm.model.shard import Head, head_bytes

_OWNER = "head"
_FIX = (
    "hold fewer blocks (--blocks; a node that chooses them itself leaves a third of its memory to head, caches and"
    " training), use a narrower --dtype, or give the node more memory (--vram)"
)


class LeadHead:
    """One node's head for all the jobs it leads. Of one event loop."""

    def __init__(self, model: NodeModel, ledger: Ledger, compute: Compute) -> None:
        self._model = model
        self._ledger = ledger
        self._compute = compute
        self._loading = asyncio.Lock()
        self._loaded: tuple[Head, Any] | None = None

    async def get(self, precision: str = "auto") -> tuple[Head, Any]:
        """The head and the tokenizer, with the logits of a step charged until `rest`. Raises OutOfMemory.

        precision: the job's."""
        async with self._loading:  # a round and a score may ask at once
            checkpoint, shard = self._model.checkpoint, self._model.shard
            vocabulary = int(checkpoint.config.vocab_size)
            logits = logits_bytes(vocabulary, shard.device)
            if precision == "bfloat16" and shard.dtype != torch.bfloat16:
                # Autocast multiplies by a copy of the LM head.
                logits += vocabulary * int(checkpoint.config.hidden_size) * torch.bfloat16.itemsize
            self._charge(await asyncio.to_thread(head_bytes, checkpoint, shard.dtype), logits)
            if self._loaded is None:
                try:
                    head = await self._compute.run(Priority.BACKGROUND, Head, checkpoint, shard.dtype, shard.device)
                    self._loaded = head, await asyncio.to_thread(checkpoint.tokenizer)
                except BaseException:
                    self._ledger.release(_OWNER)
                    raise
            return self._loaded

    def _charge(self, weights: int, logits: int) -> None:
        try:
            self._ledger.charge("weights", _OWNER, weights)
            self._ledger.charge("activations", _OWNER, logits)
        except OutOfMemory as error:
            if self._loaded is None:
                self._ledger.release(_OWNER)
            raise OutOfMemory(
                f"this node cannot lead a pipeline: beside its blocks {self._model.span}, embedding and LM head"
                f" ({weights >> 20} MiB) and the logits of a step ({logits >> 20} MiB) do not fit: {error.cause}",
                _FIX,
            ) from error

    def rest(self) -> None:
        """No job is led at the moment: nothing computes logits."""
        self._ledger.charge("activations", _OWNER, 0)

    def give_up(self) -> None:
        """Give the weights' memory back too; `get` loads them anew."""
        self._loaded = None
        self._ledger.release(_OWNER)
