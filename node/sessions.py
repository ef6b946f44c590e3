"""The sessions this node holds: carried by a stream, or parked for a client that may come back.

A session outlives its streams: when a neighbour in its chain dies, the client opens the chain anew
under the same id and finds its KV here. Nobody comes for a parked session: it is freed after
`PARK_S`. Memory is found, in this order, in logs of sent activations, in parked sessions and in the
youngest one, whose client rebuilds it; the oldest is never preempted, so work always gets done. Loop only.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable

import structlog

from node.admission import Admission
from node.kv import SessionCache
from node.memory import Ledger
from node.sentlog import SentLog
from node.serving import NodeModel, ServingSession, ServingView, log_limit
from swarm.compute import Compute, Priority
from swarm.errors import OutOfMemory, Preempted, SessionError
from swarm.ids import Span

PARK_S = 15.0
_DEFAULT_COLUMNS = 256
log = structlog.get_logger()
Tell = Callable[[int, str], Awaitable[None]]


class Carrier:
    """The stream end that carries a session at the moment (a chain's hop)."""

    async def release(self, error: Preempted | None) -> None:
        """Let go of the session: no step of it is running when this returns. `error`: what to tell upstream."""
        raise NotImplementedError


class Sessions:
    """All sessions of one node."""

    def __init__(self, model: NodeModel, ledger: Ledger, compute: Compute) -> None:
        self._model = model
        self._ledger = ledger
        self._compute = compute
        self._sessions: dict[str, ServingSession] = {}
        self._carriers: dict[str, Carrier] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._numbers = itertools.count()
        self._emptied = asyncio.Event()
        self._reclaiming = asyncio.Lock()
        self.admission = Admission(lambda: ledger.room("kv", "resend"))
        self.park_s = PARK_S
        self.opened = 0
        """Sessions so far."""

    def __len__(self) -> int:
        return len(self._sessions)

    def find(self, session_id: str) -> ServingSession | None:
        return self._sessions.get(session_id)

    async def open(
        self,
        carrier: Carrier,
        session_id: str,
        opener: str,
        span: Span,
        adapter_id: bytes,
        files: dict[str, bytes] | None,
        rows: int,
        expected_columns: int,
        deadline_s: float,
        tell: Tell,
    ) -> ServingSession:
        """The session of that id as this node holds it, or a new one once there is room.

        Raises Busy, OutOfMemory, SessionError (the id is another client's), SpanError, UnsupportedModel.
        """
        held = self._sessions.get(session_id)
        if held is not None:
            if held.opener != opener:
                raise SessionError("the session id is taken")
            await self._adopt(session_id, carrier)
            held = self._sessions.get(session_id)
            if held is not None:
                if held.view.span == span and held.adapter_id == adapter_id and not held.broken:
                    held.received = held.sent = 0  # steps of the new chain are counted anew
                    return held
                self.free(session_id)
        size = self._model.kv_bytes(span, rows, expected_columns or _DEFAULT_COLUMNS)
        await self.admission.admit(session_id, opener, size, deadline_s, tell)
        try:
            view = await self._compute.run(Priority.PREFILL, self._view, span, adapter_id, files)
            if session_id in self._sessions:
                raise SessionError("the session was opened twice at once")
            cache = SessionCache(view.view, rows)
        except BaseException:
            self.admission.release(session_id)
            raise
        session = ServingSession(
            session_id, opener, view, adapter_id, cache, SentLog(log_limit(self._ledger)), next(self._numbers)
        )
        view.in_use[adapter_id] = view.in_use.get(adapter_id, 0) + 1
        self.opened += 1
        self._sessions[session_id] = session
        self._carriers[session_id] = carrier
        self._emptied.clear()
        return session

    def _view(self, span: Span, adapter_id: bytes, files: dict[str, bytes] | None) -> ServingView:
        view = self._model.view(span)
        if files is not None:
            view.load(adapter_id, self._model.adapters, files)
        return view

    async def _adopt(self, session_id: str, carrier: Carrier) -> None:
        timer = self._timers.pop(session_id, None)
        if timer is not None:
            timer.cancel()
        before = self._carriers.get(session_id)
        self._carriers[session_id] = carrier
        if before is not None and before is not carrier:
            await before.release(None)

    def park(self, session_id: str, carrier: Carrier) -> None:
        """The stream ended without a word: keep the session for a while. No-op if another carrier has it."""
        session = self._sessions.get(session_id)
        if session is None or self._carriers.get(session_id) is not carrier:
            return
        del self._carriers[session_id]
        if session.broken:
            self.free(session_id)
            return
        loop = asyncio.get_running_loop()
        self._timers[session_id] = loop.call_later(self.park_s, self._expire, session_id)

    def _expire(self, session_id: str) -> None:
        if session_id not in self._carriers:
            log.info("session_expired", session=session_id)
            self.free(session_id)

    def end(self, session_id: str, carrier: Carrier) -> None:
        """The client closed the session. No-op if another carrier has it."""
        if self._carriers.get(session_id) is carrier:
            self.free(session_id)

    def free(self, session_id: str) -> None:
        """Give back everything a session holds."""
        session = self._sessions.pop(session_id, None)
        self._carriers.pop(session_id, None)
        timer = self._timers.pop(session_id, None)
        if timer is not None:
            timer.cancel()
        if session is None:
            return
        in_use = session.view.in_use
        in_use[session.adapter_id] -= 1
        if not in_use[session.adapter_id]:
            del in_use[session.adapter_id]
        # The hop that carried it and its finished tasks refer to each other: the collector may find them late.
        session.cache.drop()
        session.log.clear()
        self._ledger.release(session_id)
        self.admission.release(session_id)
        if not self._sessions:
            self._emptied.set()

    def free_all(self) -> None:
        for session_id in list(self._sessions):
            self.free(session_id)

    async def emptied(self) -> None:
        """Wait until no session is left."""
        if self._sessions:
            await self._emptied.wait()

    async def charge(self, session: ServingSession, columns: int, rows: int) -> None:
        """Charge the KV of a session that is about to hold `columns` columns of `rows` rows.

        Raises Preempted (this session is the youngest and there is no room), OutOfMemory (it is alone
        and too large).
        """
        size = self._model.kv_bytes(session.view.span, rows, columns)
        while True:
            try:
                self._ledger.charge("kv", session.session_id, size)
                return
            except OutOfMemory:
                async with self._reclaiming:
                    if not await self._reclaim(session):
                        raise

    def charge_log(self, session: ServingSession) -> None:
        """Charge what the session's log of sent activations holds; without room, the log goes."""
        try:
            self._ledger.charge("resend", session.session_id, session.log.nbytes)
        except OutOfMemory:
            session.log.clear(session.log.end)
            self._ledger.charge("resend", session.session_id, 0)

    async def _reclaim(self, asking: ServingSession) -> bool:
        """Free what can be done without, or one session's memory. False: there is nothing. Raises Preempted."""
        logged = max(self._sessions.values(), key=lambda s: s.log.nbytes)
        if logged.log.nbytes:
            logged.log.clear(logged.log.end)
            self._ledger.charge("resend", logged.session_id, 0)
            return True
        parked = [s for s in self._sessions.values() if s.session_id not in self._carriers]
        if parked:
            self.free(min(parked, key=lambda s: s.number).session_id)
            return True
        others = [s for s in self._sessions.values() if s is not asking]
        if not others:
            return False
        youngest = max(self._sessions.values(), key=lambda s: s.number)
        error = Preempted("the node's memory for KV caches is used up; older sessions go first")
        if youngest is asking:
            # Freed, not parked: its client has to queue like everybody else.
            self.free(asking.session_id)
            raise error
        carrier = self._carriers[youngest.session_id]
        log.info("preempted", session=youngest.session_id, for_session=asking.session_id)
        await carrier.release(error)
        self.free(youngest.session_id)
        return True
