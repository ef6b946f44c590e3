"""The outer optimizer: SGD with (Nesterov) momentum on averaged pseudo-gradients, in float32 numpy.

In: the mean over the pipelines of delta = start-of-round parameters − parameters now, keyed by
parameter; momentum of the rounds before. Out: what to add to the reference parameters, and the
new momentum. The arithmetic and its order are those of `torch.optim.SGD` with dampening 0, so
lr = 1 and momentum = 0 is plain averaging of the pipelines' parameters (DiLoCo, Douillard et
al., 2023). Never touches keys it is given no gradient for: those keep their momentum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swarm.config import OuterSettings

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class OuterStep:
    """`update` is to be added to the parameters; `momentum` replaces the old one."""

    update: dict[str, F32]
    momentum: dict[str, F32]


def outer_step(gradient: Mapping[str, F32], momentum: Mapping[str, F32], settings: OuterSettings) -> OuterStep:
    """One step. A key without momentum takes its first one, as torch does: momentum = gradient."""
    rate, decay = np.float32(settings.lr), np.float32(settings.momentum)
    update: dict[str, F32] = {}
    kept = dict(momentum)
    for key, value in gradient.items():
        direction = value
        if settings.momentum > 0:
            previous = momentum.get(key)
            buffer = value.copy() if previous is None else previous * decay + value
            kept[key] = buffer
            direction = value + buffer * decay if settings.nesterov else buffer
        update[key] = -rate * direction
    return OuterStep(update, kept)
