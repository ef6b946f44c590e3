"""The processes of a measurement: a swarm of real nodes, and sides that answer one round at a time.

A *side* is a child that prints one JSON line when it is ready and then answers each JSON line on its
stdin with one on its stdout; it ends at the end of its stdin. `Side` is the parent's end, `answer`
the child's. Everything is ended when the `ExitStack` they were started on closes.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil

_STOP_TIMEOUT_S = 20.0
_SOCKET = re.compile(r"pid=(\d+),fd=\d+.*?\n.*?bytes_sent:(\d+)")

Json = dict[str, Any]
"""One line between a side and its parent."""


class Side:
    """One child process. Its log is `<logs>/<name>.log`."""

    def __init__(
        self, stack: ExitStack, name: str, arguments: Sequence[str], logs: Path, environment: dict[str, str]
    ) -> None:
        """Starts without waiting; `hear` its first line to know that it is ready."""
        self.name = name
        logs.mkdir(parents=True, exist_ok=True)
        self._log = logs / f"{name}.log"
        with self._log.open("wb") as log:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **environment},
                # Ctrl-C reaches the parent alone, which then ends its children in order.
                start_new_session=True,
            )
        self.ready: Json = {}
        """What the child said first."""
        stack.callback(self.stop)

    @property
    def pid(self) -> int:
        return self._popen.pid

    def wait(self) -> None:
        """Until the child has ended."""
        self._popen.wait()

    def hear(self) -> Json:
        """The child's next line. Raises RuntimeError with the end of its log if it ended instead."""
        assert self._popen.stdout is not None
        line = self._popen.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended:\n{self._log.read_text(errors='replace')[-4000:]}")
        message = dict(json.loads(line))
        self.ready = self.ready or message
        return message

    def send(self, request: Json) -> None:
        """Ask without waiting; `hear` the answer."""
        assert self._popen.stdin is not None
        self._popen.stdin.write(json.dumps(request) + "\n")
        self._popen.stdin.flush()

    def ask(self, request: Json) -> Json:
        self.send(request)
        return self.hear()

    def family(self) -> list[psutil.Process]:
        """The child and its own children, such as its libp2p daemon."""
        own = psutil.Process(self._popen.pid)
        return [own, *own.children(recursive=True)]

    def logged(self, event: str) -> Json:
        """The fields of the last such event in the child's log."""
        return next(reversed(self.all_logged(event)), {})

    def all_logged(self, event: str) -> list[Json]:
        """The fields of every such event in the child's log so far, in order."""
        found: list[Json] = []
        for line in self._log.read_text(errors="replace").splitlines():
            with suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict) and entry.get("event") == event:
                    found.append(entry)
        return found

    def check(self) -> None:
        """Raises RuntimeError with the end of its log if the child has ended."""
        if self._popen.poll() is not None:
            raise RuntimeError(f"{self.name} ended:\n{self._log.read_text(errors='replace')[-4000:]}")

    def stop(self) -> None:
        """End the child and wait for it. Safe to call twice."""
        if self._popen.poll() is not None:
            return
        assert self._popen.stdin is not None
        self._popen.stdin.close()
        self._popen.send_signal(signal.SIGCONT)
        self._popen.send_signal(signal.SIGTERM)
        try:
            self._popen.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()


def start_swarm(
    stack: ExitStack, root: Path, model: Path, spans: Sequence[str], threads: int, options: Sequence[str] = ()
) -> tuple[str, list[Side]]:
    """`swarm bootstrap start` and one `swarm node start` a span; returns the join string and the nodes."""
    bootstrap = _start(stack, root, "bootstrap", "bootstrap", "start", "--model", str(model), "--port", "0")
    join = str(bootstrap.hear()["join"])
    nodes = [
        start_node(stack, root, f"node-{number}-{span.replace(':', '-')}", join, span, threads, options)
        for number, span in enumerate(spans)
    ]
    for node in nodes:
        node.hear()
    return join, nodes


def start_coordinator(stack: ExitStack, root: Path, join: str) -> str:
    """`swarm coordinator start`; returns the join string that names it."""
    coordinator = _start(stack, root, "coordinator", "coordinator", "start", "--join", join, "--port", "0")
    return str(coordinator.hear()["join"])


def start_node(
    stack: ExitStack,
    root: Path,
    name: str,
    join: str,
    span: str,
    threads: int,
    options: Sequence[str] = (),
    data: str = "",
) -> Side:
    """A node that is not waited for: `hear` its first line. Later `options` win.

    `data` names its data folder, for a node that comes back under another log; empty: as `name`.
    """
    usual = ("--join", join, "--blocks", span, "--threads", str(threads))
    dtype = () if "--dtype" in options else ("--dtype", "float32")
    return _start(stack, root, name, "node", "start", *usual, *dtype, *options, data=data)


def _start(stack: ExitStack, root: Path, name: str, *command: str, data: str = "") -> Side:
    folder = str(root / (data or name))
    return Side(stack, name, ["swarm.cli", *command, "--json", "--data-dir", folder], root, {})


def run_command(*command: str) -> Json:
    """A `swarm` command to its end, and what it printed with `--json`. Raises RuntimeError."""
    done = subprocess.run([sys.executable, "-m", "swarm.cli", *command, "--json"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"swarm {' '.join(command)} failed:\n{done.stdout}{done.stderr}"[-4000:])
    return dict(json.loads(done.stdout))


async def answer(handle: Callable[[Json], Awaitable[Json]], **ready: object) -> None:
    """The child's end: say that it is ready, then answer until stdin ends."""
    print(json.dumps({"event": "ready", **ready}), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(await handle(json.loads(line))), flush=True)


def cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    """User and system time so far. (The kernel counts in steps of 10 ms.)"""
    times = [process.cpu_times() for process in processes]
    return sum(t.user + t.system for t in times)


def sent_bytes(processes: Sequence[psutil.Process]) -> int | None:
    """Bytes their open TCP sockets have sent so far, as the kernel counts them; None without `ss`."""
    try:
        listing = subprocess.run(["ss", "-tinpH"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    pids = {process.pid for process in processes}
    return sum(int(size) for pid, size in _SOCKET.findall(listing) if int(pid) in pids)
