"""Running a command: event loop, signals, and how results and errors are printed.

stdout carries results, stderr logs and errors. A SwarmError ends the command with exit status 1
and three lines (code, cause, fix), or one JSON object with `--json`. Ctrl-C and SIGTERM cancel
the running coroutine, whose clean-up leaves nothing behind, and exit with 130 and 143.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from swarm.errors import SwarmError
from swarm.logs import configure

T = TypeVar("T")


def run(main: Callable[[], Coroutine[Any, Any, T]], *, role: str, log_level: str, as_json: bool = False) -> T:
    """Run a coroutine to its end, or until a signal."""
    configure(log_level, role=role)
    # Idle OpenMP workers that spin steal the cores of other processes. Must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    stopped_by: list[signal.Signals] = []

    async def supervised() -> T:
        task = asyncio.ensure_future(main())
        loop = asyncio.get_running_loop()

        def stop(number: signal.Signals) -> None:
            stopped_by.append(number)
            task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop, number)
        return await task

    try:
        return _loop_runner()(supervised())
    except asyncio.CancelledError:
        raise SystemExit(128 + (stopped_by[0] if stopped_by else signal.SIGINT)) from None
    except SwarmError as error:
        fail(error, as_json=as_json)
    except ExceptionGroup as group:
        known = _first_known(group)
        if known is None:
            raise
        fail(known, as_json=as_json)


def _loop_runner() -> Callable[[Coroutine[Any, Any, T]], T]:
    try:
        import uvloop
    except ImportError:
        return asyncio.run
    return uvloop.run


def _first_known(group: BaseExceptionGroup[BaseException]) -> SwarmError | None:
    """A group is a known error only if everything in it is."""
    found: SwarmError | None = None
    for error in group.exceptions:
        inner = _first_known(error) if isinstance(error, BaseExceptionGroup) else error
        if not isinstance(inner, SwarmError):
            return None
        found = found or inner
    return found


def fail(error: SwarmError, *, as_json: bool = False) -> NoReturn:
    """Print an error and exit with status 1."""
    if as_json:
        print(json.dumps({"error": {"code": error.code, "cause": error.cause, "fix": error.fix}}))
    print(f"error {error.code}: {error.cause}\n  fix: {error.fix}", file=sys.stderr)
    raise SystemExit(1)


def say(text: str) -> None:
    """A line of the command's result, at once."""
    print(text, flush=True)


def write_join_file(path: Path | None, join: str) -> None:
    """Put the join string where other processes wait for it: whole or not at all."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(join + "\n")
    os.replace(temporary, path)
