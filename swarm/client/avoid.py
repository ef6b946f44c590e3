"""Nodes that this client leaves alone for a while, and why. Kept in the client's folder for `swarm status`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

AVOID_FILE = "avoided.json"
"""Beside the client's identity."""
_MOST = 256


class AvoidList:
    """Peer id → until when, and the reason. A file that cannot be read or written only costs memory of it."""

    def __init__(self, path: Path | None, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock
        self._entries: dict[str, tuple[float, str]] = {}
        if path is not None:
            with suppress(OSError, ValueError, TypeError, KeyError):
                for peer_id, entry in json.loads(path.read_text()).items():
                    self._entries[str(peer_id)] = (float(entry["until"]), str(entry["reason"]))

    def add(self, peer_id: str, reason: str, seconds: float) -> None:
        """Avoid a node for so long, or longer if it is avoided already."""
        until = self._clock() + seconds
        if peer_id not in self._entries or self._entries[peer_id][0] < until:
            self._entries[peer_id] = (until, reason)
        self._write()

    def current(self) -> dict[str, tuple[str, float]]:
        """Avoided now: peer id → (reason, seconds left)."""
        now = self._clock()
        return {peer: (reason, until - now) for peer, (until, reason) in self._entries.items() if until > now}

    def _write(self) -> None:
        now = self._clock()
        live = sorted(((u, p, r) for p, (u, r) in self._entries.items() if u > now), reverse=True)[:_MOST]
        self._entries = {peer: (until, reason) for until, peer, reason in live}
        if self.path is None:
            return
        content = json.dumps({p: {"until": u, "reason": r} for p, (u, r) in self._entries.items()})
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with suppress(OSError):
            temporary.write_text(content)
            os.replace(temporary, self.path)
