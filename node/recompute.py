"""Recomputing a block's activations in backward instead of keeping them (Chen et al., 2016), when memory is short.

In: a view's base model. Out: the same model, whose blocks keep only their input while the switch is on. Gradients
are the same bits: the block runs a second time on the same values. About a third more compute, so a stage uses
it only for what does not fit otherwise, and says why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


class RecomputeSwitch:
    """Whether the blocks it was installed in keep their activations. Compute thread only."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        self.on = False
        for block in blocks:
            block.forward = self._wrap(block.forward)

    def _wrap(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not self.on:
                return forward(*args, **kwargs)
            # Nothing is drawn at random in a frozen block with adapters, so no generator's state is kept.
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return run


def kept_bytes(tokens: int, hidden: int, inner: int, blocks: int, itemsize: int) -> int:
    """What autograd keeps of so many blocks: about ten tensors of the hidden and four of the inner width each."""
    return tokens * (10 * hidden + 4 * inner) * itemsize * blocks


def recomputed_bytes(tokens: int, hidden: int, inner: int, blocks: int, itemsize: int) -> int:
    """The same while recomputing: each block's input, and all of one block."""
    return tokens * hidden * itemsize * blocks + kept_bytes(tokens, hidden, inner, 1, itemsize)
