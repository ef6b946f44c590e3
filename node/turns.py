"""The order of a stage's work in a pipeline: one forward, one backward (1F1B). Pure.

After PipeDream-Flush (Narayanan et al., 2019 and 2021): a stage runs as many forward passes as there
are stages from it to the loss, itself included, then one backward and one forward pass in turn. So it
keeps no more graphs than that, whatever the number of microbatches.

The lead computes the loss, so a chain of S nodes has S + 1 stages: the nodes' blocks and, last, the
head on the lead. Node k (the lead is 0) keeps at most S + 1 - k graphs. A node alone waits for nobody: one graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Pass = Literal["forward", "backward"]


def window(nodes: int, index: int) -> int:
    """Graphs that node `index` of a chain of so many nodes keeps at once."""
    if not 0 <= index < nodes:
        raise ValueError(f"a chain of {nodes} nodes has no node {index}")
    return 1 if nodes == 1 else nodes + 1 - index


def auto_microbatches(nodes: int, batch_size: int) -> int:
    """Microbatches of a batch unless the job says how many. More of them leave fewer gaps, but a product of
    few rows costs more a row (docs/experiments.md)."""
    return 1 if nodes == 1 else min(batch_size, 2 * nodes)


@dataclass(frozen=True)
class Turns:
    """How far a stage is within one optimizer step. Each pass goes through its microbatches in order."""

    window: int
    forwards: int = 0
    backwards: int = 0

    @property
    def held(self) -> int:
        return self.forwards - self.backwards

    def may_forward(self) -> bool:
        return self.held < self.window

    def forward(self) -> Turns:
        """After one more forward pass. Raises ValueError if it is not its turn."""
        if not self.may_forward():
            raise ValueError(f"{self.held} microbatches wait for their gradients already")
        return Turns(self.window, self.forwards + 1, self.backwards)

    def backward(self) -> Turns:
        if self.held < 1:
            raise ValueError("no microbatch waits for a gradient")
        return Turns(self.window, self.forwards, self.backwards + 1)


def order(microbatches: int, window: int) -> list[tuple[Pass, int]]:
    """What a stage runs when nothing keeps it waiting: every pass with its microbatch, in order."""
    turns, found = Turns(window), list[tuple[Pass, int]]()
    while turns.backwards < microbatches:
        if turns.forwards < microbatches and turns.may_forward():
            found.append(("forward", turns.forwards))
            turns = turns.forward()
        else:
            found.append(("backward", turns.backwards))
            turns = turns.backward()
    return found
