"""Where training stops between layers: before each linear layer's work, forward and backward.

In: the blocks of a training view and what to call there. Out: nothing; no value, order or gradient changes.
Long products stop within as well where that can be done (`swarm.adapters.fused`): whoever is served waits for training
to come to its next stop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from swarm.adapters.lora import features


def between_layers(blocks: nn.ModuleList, stop: Callable[[], None]) -> None:
    """Call `stop` after each linear layer's and block's forward pass and before its backward pass."""

    def after(_: nn.Module, __: Any, output: Any) -> None:
        stop()
        first = output if isinstance(output, torch.Tensor) else output[0]
        if isinstance(first, torch.Tensor) and first.requires_grad:
            first.register_hook(before)  # type: ignore[no-untyped-call]

    def before(_: torch.Tensor) -> None:
        stop()

    for block in blocks:
        for module in block.modules():
            if module is block or features(module) is not None:
                module.register_forward_hook(after)
