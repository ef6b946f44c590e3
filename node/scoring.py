"""The held-out loss of a job's committed parameters, over the lead's own pipeline, forward only.

In: the samples' batches and a way to open the pipeline's chain. Out: the mean cross-entropy over
labelled tokens, and how many there were. Takes no optimizer step, and leases nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

import torch
from torch.nn import functional

from node.batches import on_thread
from node.loss import rows_at_once
from node.stage import AdapterStage
from swarm.compute import Compute, Priority
from swarm.data.batch import Batch
from swarm.model.shard import Head
from swarm.net.chain import Chain, Packed


@dataclass(frozen=True)
class Score:
    loss: float
    tokens: int


class Scorer:
    """Scores batches with the parameters that the stages hold when a chain begins the next round."""

    def __init__(
        self,
        head: Head,
        stage: AdapterStage,
        compute: Compute,
        open_chain: Callable[[], Awaitable[Chain | None]],
    ) -> None:
        """`open_chain` gives a chain whose stages hold the committed parameters; None: this node is all of it."""
        self._head = head
        self._stage = stage
        self._compute = compute
        self._open_chain = open_chain

    async def score(self, batches: Iterable[Batch]) -> Score:
        """Batch by batch; no node keeps anything of one. Raises what making them does, PeerLost and whatever a stage
        reports. `batches` is gone through on a thread."""
        total, tokens = 0.0, 0
        chain = await self._open_chain()
        try:
            coming = iter(batches)
            while (batch := await on_thread(next, coming, None)) is not None:
                total += await self._batch(chain, batch)
                tokens += batch.label_tokens
        finally:
            if chain is not None:
                await chain.close()
        return Score(total / max(1, tokens), tokens)

    async def _batch(self, chain: Chain | None, batch: Batch) -> float:
        """Summed loss."""
        run, stage, head = self._compute.run, self._stage, self._head

        def forward() -> torch.Tensor | Packed:
            output = stage.score(head.embed(batch.input_ids_BT).detach())
            return output if chain is None else chain.pack(output)

        def loss_of(sent: torch.Tensor | Packed) -> float:
            if isinstance(sent, Packed):
                assert chain is not None
                sent = chain.unpack(sent, shape)
            return summed_loss(head, sent, batch.labels_BT, stage.give_way)

        shape = (*batch.input_ids_BT.shape, head.width)
        stage.admit_score(shape)
        try:
            output = await run(Priority.TRAIN, forward)
        finally:
            stage.give_back()
        if chain is not None:
            assert isinstance(output, Packed)
            output = await chain.score_forward(output)
        return await run(Priority.TRAIN, loss_of, output)


def summed_loss(
    head: Head, hidden_BTD: torch.Tensor, labels_BT: torch.Tensor, give_way: Callable[[], None] = lambda: None
) -> float:
    """Cross-entropy summed over the labelled positions, shifted as `transformers` shifts them.

    `give_way` is called after every few positions, and within their products (`Head.logits`).
    """
    total, rows = 0.0, rows_at_once(head.vocabulary, hidden_BTD.device)
    with torch.inference_mode():
        targets_BT = labels_BT[:, 1:].to(hidden_BTD.device)
        counted = targets_BT != -100
        hidden_ND, targets_N = hidden_BTD[:, :-1][counted], targets_BT[counted]
        for hidden_RD, targets_R in zip(torch.split(hidden_ND, rows), torch.split(targets_N, rows), strict=True):
            logits_RV = head.logits(hidden_RD, give_way)
            total += float(functional.cross_entropy(logits_RV.float(), targets_R, reduction="sum"))
            give_way()
    return total
