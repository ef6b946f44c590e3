"""Whether a family's blocks keep samples apart that share a row, tried on the blocks themselves.

Most take the mask from `transformers`, which reads it off position ids that start again. Blocks that carry a state
along the row (linear attention, state spaces, convolutions), or make a mask of their own, may not. Compute thread only.
"""

from __future__ import annotations

import torch

from swarm.model.shard import View

_FIRST, _SECOND = 7, 5
"""Tokens of the two samples that are tried."""
_MOST = 0.1
"""Of what seeing the sample before changes: rounding in bfloat16 stays below it, seeing half of it does not."""


@torch.inference_mode()
def keeps_apart(view: View, width: int) -> bool:
    """Whether a sample behind another one in a row comes out as it does alone. `width`: of a hidden state."""
    parameter = next(view.model.parameters())
    generator = torch.Generator().manual_seed(0)
    row_1TD = torch.randn((1, _FIRST + _SECOND, width), generator=generator).to(parameter.device, parameter.dtype)
    alone = view.forward(row_1TD[:, _FIRST:])
    positions_1T = torch.cat([torch.arange(_FIRST), torch.arange(_SECOND)]).unsqueeze(0).to(parameter.device)
    packed = view.forward(row_1TD, positions_BT=positions_1T)[:, _FIRST:]
    seeing = view.forward(row_1TD)[:, _FIRST:]
    return _distance(packed, alone) <= _MOST * _distance(seeing, alone)


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).norm())
