"""One LM head for all sessions of a process: hidden states that wait are turned into logits together.

Reading the head's weights costs the same for one row as for eight, so whatever is ready when the
thread is free makes one batch. The event loop never computes.
"""

from __future__ import annotations

import asyncio
import time

import torch

from swarm.compute import Compute, Priority
from swarm.gather import Gatherer
from swarm.model.shard import Head

_MOST = 64
_Waiting = tuple[torch.Tensor, "asyncio.Future[torch.Tensor]"]


class BatchedHead:
    """Logits of many sessions. `close` ends its thread."""

    def __init__(self, head: Head) -> None:
        self.head = head
        self._compute = Compute()
        self._gatherer: Gatherer[_Waiting] | None = None

    async def logits(self, hidden: torch.Tensor, source: str = "") -> torch.Tensor:
        """Hidden states [..., D] after the last block to logits [..., V]. source: the session they are of."""
        loop = asyncio.get_running_loop()
        if self._gatherer is None:
            self._gatherer = Gatherer(lambda: self._compute.post(Priority.DECODE, lambda: self._batch(loop)), _MOST)
        answer: asyncio.Future[torch.Tensor] = loop.create_future()
        self._gatherer.add((hidden, answer), source)
        return await answer

    def _batch(self, loop: asyncio.AbstractEventLoop) -> None:
        assert self._gatherer is not None
        ready, began_s = self._gatherer.take(), time.perf_counter()
        results: list[torch.Tensor] | Exception
        try:
            with torch.inference_mode():
                if len(ready) == 1:
                    results = [self.head.logits(ready[0][0])]
                else:
                    rows_ND = torch.cat([hidden.reshape(-1, hidden.shape[-1]) for hidden, _ in ready])
                    parts = torch.split(self.head.logits(rows_ND), [h.numel() // h.shape[-1] for h, _ in ready])
                    results = [p.reshape(*h.shape[:-1], -1) for p, (h, _) in zip(parts, ready, strict=True)]
        except Exception as error:
            results = error
        loop.call_soon_threadsafe(self._deliver, ready, results, time.perf_counter() - began_s)

    def _deliver(self, ready: list[_Waiting], results: list[torch.Tensor] | Exception, took_s: float) -> None:
        for index, (_, answer) in enumerate(ready):
            if answer.done():
                continue
            if isinstance(results, Exception):
                answer.set_exception(results)
            else:
                answer.set_result(results[index])
        assert self._gatherer is not None
        self._gatherer.finished(took_s)

    def close(self) -> None:
        self._compute.stop()
