"""A TCP proxy that gives loopback the delay and the rate of a long link, and can break it.

In: a target address, a `Shape` (one-way delay, bytes a second), and orders at run time. Out: a port to
dial instead of the target, and counts of what passed. Both directions have the shape; the connections
of one link share its rate, as those of one access line do. A byte is delivered when it has queued for
its turn on the line, been serialized at the line's rate and travelled for the delay; a new connection
reaches the target one round trip after it was made. Memory is bounded: a sender is read no faster than
the line takes its bytes. Not modelled: loss, jitter, TCP's slow start.

    freeze / thaw     nothing is delivered, connections stay (a stall); then what was held travels again
    cut / restore     connections are reset and new ones are too (a partition)

A `Link` runs in the caller's loop, whose timers may fire up to 1 ms late; `benchmarks.links` runs links
in a process of their own.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, cast

_PIECE_BYTES = 1500
_PIECE_S = 0.004
"""A line sends in pieces of this size or duration, whichever is more. One arrives with its last bit, so coarser
pieces bring no message earlier; finer ones cost CPU time that what is measured on the same cores goes without."""
_QUEUE_BYTES = 256 * 1024
"""What one connection may have waiting in front of the line, each way."""
_UNLIMITED_HELD_BYTES = 8 * 1024 * 1024
_MAX_CONNECTIONS = 256
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER that makes closing a socket reset its connection."""

Order = Literal["freeze", "thaw", "cut", "restore"]


@dataclass(frozen=True)
class Shape:
    """What a link does to bytes, each way."""

    delay_s: float = 0.0
    """One way."""
    rate_bytes_s: float | None = None
    """None: as fast as the machine."""

    def __post_init__(self) -> None:
        if self.delay_s < 0 or (self.rate_bytes_s is not None and self.rate_bytes_s <= 0):
            raise ValueError("a link needs a delay of 0 or more and a rate above 0")

    @property
    def piece_bytes(self) -> int:
        return max(_PIECE_BYTES, int((self.rate_bytes_s or 0) * _PIECE_S))

    @property
    def held_bytes(self) -> int:
        """What one connection may have on the way in one direction: twice what fills the line, and a queue."""
        if self.rate_bytes_s is None:
            return _UNLIMITED_HELD_BYTES
        return _QUEUE_BYTES + int(2 * self.rate_bytes_s * self.delay_s)


@dataclass(frozen=True)
class Counts:
    up_bytes: int
    """Delivered to the target."""
    down_bytes: int
    """Delivered to those who dialled."""
    connections: int
    """Ever made to the target."""
    open: int
    most_held_bytes: int
    """The most that one connection ever had on the way in one direction."""


class Lane:
    """One direction of a link: when bytes leave it. Pure; the clock is the caller's."""

    def __init__(self) -> None:
        self._free_at_s = 0.0
        self.delivered_bytes = 0

    def admit(self, now_s: float, size_bytes: int, shape: Shape) -> float:
        """When the last bit of a piece that is ready at `now_s` has been put on the line."""
        if shape.rate_bytes_s is None:
            return now_s
        self._free_at_s = max(now_s, self._free_at_s) + size_bytes / shape.rate_bytes_s
        return self._free_at_s

    def clear(self) -> None:
        self._free_at_s = 0.0


class _Pipe:
    """One direction of one connection: pieces between the socket they came from and the one they go to."""

    def __init__(self, link: Link, lane: Lane, ended: Callable[[bool], None]) -> None:
        """ended: told once the end has been handed over, and whether it was a reset."""
        self._link = link
        self._lane = lane
        self._on_end = ended
        self._loop = asyncio.get_running_loop()
        # When each left the sender, and what: b"" is the end of the stream, None its reset.
        self._pieces: deque[tuple[float, bytes | None]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self.held_bytes = 0
        self.source: asyncio.Transport | None = None
        self.sink: asyncio.Transport | None = None
        self.sink_full = False
        self.ended = False

    def put(self, data: bytes | None) -> None:
        size, length = self._link.shape.piece_bytes, len(data or b"")
        for start in range(0, length, size) if data else (0,):
            self._admit(data[start : start + size] if data else data)
        self.held_bytes += length
        self._link.most_held_bytes = max(self._link.most_held_bytes, self.held_bytes)
        if self.held_bytes >= self._link.shape.held_bytes and self.source is not None:
            self.source.pause_reading()
        self.deliver()

    def _admit(self, piece: bytes | None) -> None:
        left_s = self._lane.admit(self._loop.time(), len(piece or b""), self._link.shape)
        self._pieces.append((left_s, piece))

    def send_again(self) -> None:
        """Put all that is held on the line anew."""
        held = [piece for _, piece in self._pieces]
        self._pieces.clear()
        for piece in held:
            self._admit(piece)

    def deliver(self) -> None:
        """Hand over what has arrived; come back for the rest."""
        self.stop()
        while self._pieces and self.sink is not None and not self.sink_full and not self._link.frozen:
            due_s = self._pieces[0][0] + self._link.shape.delay_s
            if due_s > self._loop.time():
                self._timer = self._loop.call_at(due_s, self.deliver)
                break
            self._hand_over(self.sink, self._pieces.popleft()[1])
        source = self.source
        if self.held_bytes <= self._link.shape.held_bytes // 2 and source is not None and not source.is_closing():
            source.resume_reading()

    def _hand_over(self, sink: asyncio.Transport, piece: bytes | None) -> None:
        if piece:
            self.held_bytes -= len(piece)
            self._lane.delivered_bytes += len(piece)
            sink.write(piece)
            return
        self.ended = True
        if piece is not None and not sink.is_closing():
            sink.write_eof()
        self._on_end(piece is None)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _End(asyncio.Protocol):
    """One socket of a connection: it fills the pipe that leaves it and takes from the one that reaches it."""

    def __init__(self, leaving: _Pipe, reaching: _Pipe, made: Callable[[], None], lost: Callable[[], None]) -> None:
        self._leaving, self._reaching, self._made, self._lost = leaving, reaching, made, lost
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = self._leaving.source = self._reaching.sink = cast(asyncio.Transport, transport)
        self._made()
        self._reaching.deliver()

    def data_received(self, data: bytes) -> None:
        self._leaving.put(data)

    def eof_received(self) -> bool:
        self._leaving.put(b"")
        return True  # the other direction goes on

    def pause_writing(self) -> None:
        self._reaching.sink_full = True

    def resume_writing(self) -> None:
        self._reaching.sink_full = False
        self._reaching.deliver()

    def connection_lost(self, error: Exception | None) -> None:
        self._reaching.stop()
        self._leaving.source = self._reaching.sink = None
        if error is None:
            return
        if self._leaving.sink is None:
            self._lost()
        else:
            self._leaving.put(None)


class _Connection:
    """Somebody who dialled, the target, and a pipe each way."""

    def __init__(self, link: Link, up: Lane, down: Lane) -> None:
        self._link = link
        self.pipes = (_Pipe(link, up, self._ended), _Pipe(link, down, self._ended))
        self.dialler = _End(self.pipes[0], self.pipes[1], self._made, self.drop)
        self.target = _End(self.pipes[1], self.pipes[0], lambda: None, self.drop)
        self.dial: asyncio.Task[None] | None = None

    def _made(self) -> None:
        assert self.dialler.transport is not None
        if not self._link.admit(self):
            _reset(self.dialler.transport)
            return
        self.dialler.transport.pause_reading()  # until the target is there
        self.dial = asyncio.get_running_loop().create_task(self._dial())

    async def _dial(self) -> None:
        # The kernel made the dialler's connection in no time; a long link takes a round trip.
        await asyncio.sleep(2 * self._link.shape.delay_s)
        await self._link.thawed.wait()
        try:
            await asyncio.get_running_loop().create_connection(lambda: self.target, *self._link.target)
        except OSError:
            self.drop()
            return
        if self.dialler.transport is not None and not self.dialler.transport.is_closing():
            self.dialler.transport.resume_reading()

    def _ended(self, reset: bool) -> None:
        """Close once both directions have ended; what is buffered in the sockets still goes out."""
        if reset:
            self.drop()
        elif all(pipe.ended for pipe in self.pipes):
            self._link.release(self)
            for end in (self.dialler, self.target):
                if end.transport is not None:
                    end.transport.close()

    def drop(self) -> None:
        """Reset both sockets now."""
        self._link.release(self)
        if self.dial is not None:
            self.dial.cancel()
        for end in (self.dialler, self.target):
            if end.transport is not None:
                _reset(end.transport)
        for pipe in self.pipes:
            pipe.ended = True
            pipe.stop()


class Link:
    """A shaped way to `target`. Use as an async context manager."""

    def __init__(self, target: tuple[str, int], shape: Shape | None = None, *, port: int = 0) -> None:
        self.target = target
        self.shape = shape or Shape()
        self.thawed = asyncio.Event()
        self.thawed.set()
        self.idle = asyncio.Event()
        self.idle.set()
        self.most_held_bytes = 0
        self._port = port
        self._up, self._down = Lane(), Lane()
        self._open: set[_Connection] = set()
        self._made = 0
        self._is_cut = False

    async def __aenter__(self) -> Link:
        def accepted() -> _End:
            return _Connection(self, self._up, self._down).dialler

        self._server = await asyncio.get_running_loop().create_server(accepted, "127.0.0.1", self._port)
        self._port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        dials = [connection.dial for connection in self._open if connection.dial is not None]
        self.cut()
        await asyncio.gather(*dials, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def port(self) -> int:
        """Where to dial, on 127.0.0.1."""
        return self._port

    @property
    def frozen(self) -> bool:
        return not self.thawed.is_set()

    @property
    def counts(self) -> Counts:
        up, down = self._up.delivered_bytes, self._down.delivered_bytes
        return Counts(up, down, self._made, len(self._open), self.most_held_bytes)

    def admit(self, connection: _Connection) -> bool:
        """Whether a new connection may live."""
        if self._is_cut or len(self._open) >= _MAX_CONNECTIONS:
            return False
        self._open.add(connection)
        self.idle.clear()
        self._made += 1
        return True

    def release(self, connection: _Connection) -> None:
        self._open.discard(connection)
        if not self._open:
            self.idle.set()

    def reshape(self, shape: Shape) -> None:
        """What is travelling takes the new delay too; what waits for the line keeps its turn."""
        self.shape = shape
        for connection in self._open:
            for pipe in connection.pipes:
                pipe.deliver()

    def order(self, order: Order) -> None:
        {"freeze": self.freeze, "thaw": self.thaw, "cut": self.cut, "restore": self.restore}[order]()

    def freeze(self) -> None:
        self.thawed.clear()

    def thaw(self) -> None:
        self._up.clear()
        self._down.clear()
        self.thawed.set()
        for connection in tuple(self._open):
            for pipe in connection.pipes:
                pipe.send_again()
                pipe.deliver()

    def cut(self) -> None:
        self._is_cut = True
        for connection in tuple(self._open):
            connection.drop()

    def restore(self) -> None:
        self._is_cut = False


def _reset(transport: asyncio.Transport) -> None:
    """Close a socket so that the other side reads a broken connection, not an end."""
    connected = transport.get_extra_info("socket")
    if connected is not None and not transport.is_closing():
        with suppress(OSError):
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    transport.abort()
