"""Gradients through the swarm's blocks, which stay frozen: what prompt tuning on a client needs.

In: hidden states that require a gradient. Out: the last block's output, as a node of torch's own
graph; its backward pass sends the output's gradient along the chain and gets the input's. Each
forward pass holds a chain of its own until its backward pass has run or its graph is dropped, so that
nodes never keep what nobody will ask for. A node that leaves in between is replaced: the forward pass is
run again, then the backward pass. Nothing on a node is trained.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch

from swarm.client.loop import ClientLoop
from swarm.errors import NetworkError, SessionError
from swarm.net.chain import Chain, StepExtras
from swarm.wire.masks import pack_mask

_ATTEMPTS = 3
"""Of one backward or forward pass, each over a chain that was just opened."""
_IDLE_CHAINS = 4
"""Kept open for the next pass; as many forward passes may be pending at once without dialling again."""


@dataclass(frozen=True)
class Step:
    """One forward pass."""

    hidden_BTD: torch.Tensor
    mask_BT: torch.Tensor | None
    positions_BT: torch.Tensor | None

    async def run(self, chain: Chain) -> tuple[int, torch.Tensor]:
        mask = b"" if self.mask_BT is None else pack_mask(self.mask_BT)
        positions = () if self.positions_BT is None else tuple(self.positions_BT.flatten().tolist())
        return await chain.forward(self.hidden_BTD, 0, StepExtras(mask=mask, position_ids=positions))


class GradientChains:
    """Open chains in gradient mode, one a pending forward pass. Safe to use from several threads."""

    def __init__(self, loop: ClientLoop, adapter: str = "") -> None:
        self._loop = loop
        self._adapter = adapter
        self._idle: list[Chain] = []
        self._lock = threading.Lock()

    def forward(self, step: Step) -> tuple[Chain, int, torch.Tensor]:
        """The chain that holds the graph, the step's number on it, and the output [B, T, D]."""
        failure: NetworkError | None = None
        for _ in range(_ATTEMPTS):
            chain = self._take()
            try:
                seq, output_BTD = self._loop.call(partial(step.run, chain))
            except NetworkError as error:
                # What was opened before the node left has probably lost it too.
                for other in [chain, *self._empty()]:
                    self.drop(other)
                failure = error
            except BaseException:
                self.drop(chain)
                raise
            else:
                return chain, seq, output_BTD
        assert failure is not None
        raise failure

    def backward(self, chain: Chain, seq: int, step: Step, grad_BTD: torch.Tensor) -> torch.Tensor:
        """The input's gradient [B, T, D]. `step`: the forward pass, to run it again if a node left."""
        failure: NetworkError | None = None
        for attempt in range(_ATTEMPTS):
            if attempt:
                chain, seq, _ = self.forward(step)
            try:
                found = self._loop.call(partial(chain.backward, seq, grad_BTD))
            except NetworkError as error:
                self.drop(chain)
                failure = error
            except BaseException:
                self.drop(chain)
                raise
            else:
                self._give(chain)
                return found
        assert failure is not None
        raise failure

    def close(self) -> None:
        """Close the chains that wait for the next pass."""
        for chain in self._empty():
            self.drop(chain)

    def _empty(self) -> list[Chain]:
        with self._lock:
            idle, self._idle = self._idle, []
        return idle

    def _take(self) -> Chain:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return self._loop.call(lambda: self._loop.client.gradient_chain(self._adapter))

    def _give(self, chain: Chain) -> None:
        with self._lock:
            if len(self._idle) < _IDLE_CHAINS:
                self._idle.append(chain)
                return
        self.drop(chain)

    def drop(self, chain: Chain) -> None:
        """Close a chain some time: the nodes free what they hold for it. Never blocks."""
        self._loop.spawn(chain.close)


class _Pending:
    """A forward pass whose backward pass has not run. Dropped with its graph, it closes its chain."""

    def __init__(self, chains: GradientChains, chain: Chain, seq: int) -> None:
        self.chain = chain
        self.seq = seq
        self.finalizer = weakref.finalize(self, chains.drop, chain)
        self.finalizer.atexit = False


class _RemoteBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_BTD: torch.Tensor,
        chains: GradientChains,
        mask_BT: torch.Tensor | None,
        positions_BT: torch.Tensor | None,
    ) -> torch.Tensor:
        chain, seq, output_BTD = chains.forward(Step(hidden_BTD.detach().cpu(), mask_BT, positions_BT))
        ctx.save_for_backward(hidden_BTD)
        ctx.chains, ctx.padding = chains, (mask_BT, positions_BT)
        ctx.pending = _Pending(chains, chain, seq)
        return output_BTD.to(hidden_BTD.device)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BTD: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (hidden_BTD,) = ctx.saved_tensors
        pending: _Pending | None = ctx.pending
        if pending is None:
            raise SessionError("the nodes freed this graph after its backward pass", "run the forward pass again")
        ctx.pending = None
        pending.finalizer.detach()
        step = Step(hidden_BTD.detach().cpu(), *ctx.padding)
        grad = ctx.chains.backward(pending.chain, pending.seq, step, grad_BTD.cpu())
        return grad.to(hidden_BTD.device), None, None, None


def remote_blocks(
    hidden_BTD: torch.Tensor,
    chains: GradientChains,
    mask_BT: torch.Tensor | None = None,
    positions_BT: torch.Tensor | None = None,
) -> torch.Tensor:
    """Hidden states through all blocks of the swarm, differentiable once. Raises NetworkError, ServeError."""
    output = _RemoteBlocks.apply(hidden_BTD, chains, mask_BT, positions_BT)  # type: ignore[no-untyped-call]
    return cast(torch.Tensor, output)
