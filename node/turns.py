"""When a stage of a pipeline may run ahead: one forward, one backward (1F1B), and further where memory has room.

After PipeDream-Flush (Narayanan et al., 2019 and 2021): a stage runs as many forward passes as there
are stages from it to the loss, itself included, then one backward and one forward pass in turn. So it
keeps no more graphs than that, whatever the number of microbatches.

Over links that take time this leaves every stage waiting for what is under way. Where memory has room a stage runs up
to twice as many forward passes ahead, so that there is work on the link and at the stage at once ("eager" 1F1B,
Zhuang et al., 2022; docs/experiments.md).

The lead computes the loss, so a chain of S nodes has S + 1 stages: the nodes' blocks and, last, the
head on the lead. Node k (the lead is 0) keeps S + 1 - k graphs, twice that at most. A node alone waits for nobody: one
graph.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """How many graphs a stage keeps at once."""

    least: int
    """However short memory is."""
    most: int


def window(nodes: int, index: int) -> Window:
    """Of node `index` of a chain of so many nodes."""
    if not 0 <= index < nodes:
        raise ValueError(f"a chain of {nodes} nodes has no node {index}")
    if nodes == 1:
        return Window(1, 1)
    return Window(nodes + 1 - index, 2 * (nodes + 1 - index))


_LEAST_TOKENS = {"cpu": 256, "cuda": 4096}
"""Of a microbatch where no other node waits: products of fewer rows cost more a row (docs/experiments.md; for a GPU by
calculation)."""


def auto_microbatches(nodes: int, samples: int, tokens: int, device_type: str) -> int:
    """Microbatches of a batch unless the job says how many.

    In a pipeline more of them leave fewer gaps. On a node alone they are as small as costs nothing: they are sorted by
    length, so there is less padding, activations take less memory, and who is served waits for shorter pieces."""
    most = 2 * nodes if nodes > 1 else max(1, tokens // _LEAST_TOKENS[device_type])
    return min(samples, most)


@dataclass(frozen=True)
class Turns:
    """How far a stage is within one optimizer step. Each pass goes through its microbatches in order."""

    window: Window
    forwards: int = 0
    backwards: int = 0

    @property
    def held(self) -> int:
        return self.forwards - self.backwards

    def may_forward(self, fits: Callable[[], bool]) -> bool:
        """`fits`: whether memory has room for one more graph; asked beyond the least window only."""
        return self.held < self.window.least or (self.held < self.window.most and fits())

    def forward(self) -> Turns:
        """After one more forward pass. Raises ValueError if it is not its turn."""
        if self.held >= self.window.most:
            raise ValueError(f"{self.held} microbatches wait for their gradients already")
        return Turns(self.window, self.forwards + 1, self.backwards)

    def backward(self) -> Turns:
        if self.held < 1:
            raise ValueError("no microbatch waits for a gradient")
        return Turns(self.window, self.forwards, self.backwards + 1)


class Room:
    """Where a stage waits for its turn. Of one event loop."""

    def __init__(self, window: Window) -> None:
        self._turns = Turns(window)
        self._changed = asyncio.Condition()

    @property
    def held(self) -> int:
        return self._turns.held

    async def forward(self, fits: Callable[[], bool]) -> None:
        """Wait until one more graph may be kept. `fits` as in `Turns.may_forward`."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._turns.may_forward(fits))
            self._turns = self._turns.forward()

    async def backward(self) -> None:
        """A graph is gone. Raises ValueError if there was none."""
        async with self._changed:
            self._turns = self._turns.backward()
            self._changed.notify_all()
