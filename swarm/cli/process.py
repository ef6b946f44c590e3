"""Running a command: event loop, signals, and how results and errors are printed.

stdout carries results, stderr logs and errors. A SwarmError ends the command with exit status 1
and two lines (code and cause, fix), and one JSON object on stdout with `--json`. The first Ctrl-C
or SIGTERM cancels the running coroutine, whose clean-up leaves nothing behind and is not cut short
by further ones; the exit status is 130 or 143.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import structlog

from swarm.errors import StorageError, SwarmError
from swarm.logs import configure

T = TypeVar("T")
log = structlog.get_logger()


def run(main: Callable[[], Coroutine[Any, Any, T]], *, role: str, log_level: str, as_json: bool = False) -> T:
    """Run a coroutine to its end, or until a signal."""
    prepare(role, log_level)
    stopped_by: list[signal.Signals] = []

    async def supervised() -> T:
        task = asyncio.ensure_future(main())
        loop = asyncio.get_running_loop()

        def stop(number: signal.Signals) -> None:
            stopped_by.append(number)
            if len(stopped_by) == 1:
                task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop, number)
        return await task

    problem: SwarmError | None = None
    try:
        return _loop_runner()(supervised())
    except asyncio.CancelledError:
        pass
    except SwarmError as error:
        problem = error
    except ExceptionGroup as group:
        problem = _first_known(group)
        if problem is None:
            raise
    if problem is not None and not stopped_by:
        fail(problem, as_json=as_json)
    # The interpreter takes a moment to end; nothing is left that another signal could stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if problem is not None:
        log.warning("stopped_uncleanly", error=str(problem))
    raise SystemExit(128 + (stopped_by[0] if stopped_by else signal.SIGINT))


def prepare(role: str, log_level: str) -> None:
    """What every command sets before anything heavy is imported."""
    configure(log_level, role=role)
    # Idle OpenMP workers that spin steal the cores of other processes. Must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its errors reach us as exceptions


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
    """Put the join string where other processes wait for it: whole or not at all. Raises StorageError."""
    if path is None:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(join + "\n")
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StorageError(
            f"cannot write the join file {path}: {error.strerror}", "choose another --join-file"
        ) from error
