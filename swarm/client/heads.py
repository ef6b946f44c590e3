"""One LM head for all sessions of a process: hidden states that wait are turned into logits together.

Reading the head's weights costs the same for one row as for eight, so whatever is ready when the
thread is free makes one batch. The event loop never computes.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import torch

from swarm.compute import Compute, Priority
from swarm.model.shard import Head


class BatchedHead:
    """Logits of many sessions. `close` ends its thread."""

    def __init__(self, head: Head) -> None:
        self.head = head
        self._compute = Compute()
        self._lock = threading.Lock()
        self._ready: list[tuple[torch.Tensor, asyncio.Future[torch.Tensor]]] = []

    async def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., D] after the last block to logits [..., V]."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[torch.Tensor] = loop.create_future()
        with self._lock:
            self._ready.append((hidden, answer))
            first = len(self._ready) == 1
        if first:
            self._compute.post(Priority.DECODE, lambda: self._batch(loop))
        return await answer

    def _batch(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            ready, self._ready = self._ready, []
        try:
            with torch.inference_mode():
                if len(ready) == 1:
                    results = [self.head.logits(ready[0][0])]
                else:
                    rows_ND = torch.cat([hidden.reshape(-1, hidden.shape[-1]) for hidden, _ in ready])
                    parts = torch.split(self.head.logits(rows_ND), [h.numel() // h.shape[-1] for h, _ in ready])
                    results = [p.reshape(*h.shape[:-1], -1) for p, (h, _) in zip(parts, ready, strict=True)]
        except Exception as error:
            loop.call_soon_threadsafe(_fail, ready, error)
            return
        loop.call_soon_threadsafe(_deliver, ready, results)

    def close(self) -> None:
        self._compute.stop()


_Ready = Sequence[tuple[torch.Tensor, "asyncio.Future[torch.Tensor]"]]


def _deliver(ready: _Ready, results: Sequence[torch.Tensor]) -> None:
    for (_, answer), result in zip(ready, results, strict=True):
        if not answer.done():
            answer.set_result(result)


def _fail(ready: _Ready, error: Exception) -> None:
    for _, answer in ready:
        if not answer.done():
            answer.set_exception(error)
