"""The libp2p daemon: a child process that never outlives this one and leaves nothing behind.

hivemind's wrapper starts it and talks to it over Unix sockets. Three things are added here. The
wrapper is held on to while it starts, since hivemind forgets a daemon whose start fails or is
cancelled. The daemon is in a session of its own, so that Ctrl-C in a terminal reaches us alone and
we can still say goodbye to the swarm through it; and the kernel kills it when we are killed. Its
sockets lie in a folder of their own, which goes with it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from hivemind.p2p import P2P

from swarm.errors import StorageError

_LAUNCHER = """
import ctypes, os, signal, sys
os.setsid()
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, which an exec keeps
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone already")
os.execv(sys.argv[2], sys.argv[2:])
"""
_MAX_FOLDER_CHARS = 64
"""A Unix socket's path has 107 bytes at most, file names included."""
_END_TIMEOUT_S = 5.0
"""It ends within milliseconds of SIGTERM, unless it is stuck."""


@asynccontextmanager
async def libp2p_daemon(**options: Any) -> AsyncIterator[Any]:
    """Run a daemon with the `options` of hivemind's `P2P.create`; yields the wrapper.

    Raises what `create` raises, and StorageError. However this is left, the daemon has ended and its
    sockets are gone.
    """
    folder = _socket_folder()
    made: list[Any] = []

    class Daemon(P2P):  # type: ignore[misc]  # hivemind is untyped
        _UNIX_SOCKET_PREFIX = f"/unix{folder}/"

        def __init__(self) -> None:
            super().__init__()
            made.append(self)

        @staticmethod
        def _make_process_args(*args: Any, **kwargs: Any) -> list[str]:
            launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid())]
            return launcher + list(P2P._make_process_args(*args, **kwargs))

    try:
        yield await Daemon.create(**options)
    finally:
        try:
            for daemon in made:
                # A second cancellation must not leave the daemon behind.
                await asyncio.shield(_end(daemon))
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _socket_folder() -> str:
    try:
        temporary = tempfile.gettempdir()
        return tempfile.mkdtemp(prefix="swarm-", dir=temporary if len(temporary) <= _MAX_FOLDER_CHARS else "/tmp")
    except OSError as error:
        raise StorageError(f"cannot make a folder for sockets: {error}", "point TMPDIR at a writable folder") from error


async def _end(daemon: Any) -> None:
    try:
        async with asyncio.timeout(_END_TIMEOUT_S):
            await daemon.shutdown()
    except TimeoutError:
        daemon._child.kill()
        await daemon._child.wait()
    if daemon._client is not None:
        # A daemon that died broke the connection to it: that is known, and not worth a traceback.
        control = daemon._client.control
        await asyncio.gather(control._read_task, control._write_task, return_exceptions=True)


def ended(daemon: Any) -> bool:
    """Whether the daemon is gone; what is asked of it then would never be answered."""
    return daemon._child.returncode is not None


async def wait_end(daemon: Any) -> int:
    """Wait until the daemon ends, and return its exit status."""
    return int(await daemon._child.wait())
