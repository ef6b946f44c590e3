"""Who is served first among clients that all wait: start-time fair queueing (Goyal et al., 1996).

Every client has a virtual time that advances by the work it was given. Work with the lowest start
time goes first, so a client that asked for much waits behind one that asked for little, and one
that was idle gains no credit from it. Pure but for its own counters.
"""

from __future__ import annotations

_MOST_CLIENTS = 4096


class FairClock:
    """Start times of work, by client."""

    def __init__(self) -> None:
        self._now = 0.0
        self._finish: dict[str, float] = {}

    def start(self, client: str, cost: float) -> float:
        """The rank of a piece of work of `cost` that `client` asks for now; lower goes first."""
        start = max(self._now, self._finish.get(client, 0.0))
        self._finish[client] = start + cost
        if len(self._finish) > _MOST_CLIENTS:
            self._finish = {c: finish for c, finish in self._finish.items() if finish > self._now}
        return start

    def began(self, start: float) -> None:
        """Work of that rank is being done: nobody starts behind it from now on."""
        self._now = max(self._now, start)
