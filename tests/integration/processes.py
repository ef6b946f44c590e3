"""Real `swarm` processes for tests: start, wait for an event, kill, and check that nothing is left."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

START_TIMEOUT_S = 90.0
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


class Process:
    """One child process: its stdout lines (JSON events), its log (stderr as JSON lines) and its end."""

    def __init__(
        self, name: str, command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.log = folder / f"{name}.log"
        self._log_lines = 0
        with self.log.open("ab") as stderr:
            self.popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, **ENVIRONMENT, **(environment or {})},
                start_new_session=True,
            )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self._lines.put(line)
        self._lines.put("")

    def event(self, timeout_s: float = START_TIMEOUT_S) -> dict[str, Any]:
        """The next JSON line on stdout; fails with the log if the process ends or stays silent."""
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise AssertionError(f"{self.name} said nothing for {timeout_s} s:\n{self.log_tail()}") from None
        if not line:
            raise AssertionError(f"{self.name} ended ({self.popen.wait()}):\n{self.log_tail()}")
        return dict(json.loads(line))

    def log_events(self) -> list[dict[str, Any]]:
        """All complete JSON lines of the log so far."""
        events = []
        for line in self.log.read_text(errors="replace").splitlines():
            try:
                events.append(json.loads(line))
            except ValueError:
                continue
        return [event for event in events if isinstance(event, dict)]

    def wait_log(self, event: str, timeout_s: float = 120.0, **fields: Any) -> dict[str, Any]:
        """Wait until the log holds such an event. (The log file is the only channel; it is watched.)"""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for entry in self.log_events():
                if entry.get("event") == event and all(entry.get(k) == v for k, v in fields.items()):
                    return entry
            if self.popen.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"{self.name}: no '{event}' {fields} in the log:\n{self.log_tail()}")

    def log_tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.popen.pid).children(recursive=True)

    def kill(self) -> None:
        self.popen.send_signal(signal.SIGKILL)
        self.popen.wait()

    def stop(self, number: signal.Signals = signal.SIGTERM, timeout_s: float = 30.0) -> int:
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        return self.popen.wait(timeout=timeout_s)


class Swarm:
    """A set of processes with their data folders under one root."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root = root
        self.model = model
        self.processes: list[Process] = []
        self.join = ""

    def start(self, name: str, *arguments: str) -> Process:
        return self.start_command(name, [sys.executable, "-m", "swarm.cli", *arguments, "--json"])

    def start_command(self, name: str, command: Sequence[str]) -> Process:
        process = Process(name, command, self.root / "logs")
        self.processes.append(process)
        return process

    def bootstrap(self) -> Process:
        process = self.start(
            "bootstrap",
            *("bootstrap", "start", "--model", str(self.model), "--port", "0"),
            *("--data-dir", str(self.root / "bootstrap")),
        )
        self.join = process.event()["join"]
        return process

    def coordinator(self, port: int = 0) -> Process:
        process = self.start(
            "coordinator",
            *("coordinator", "start", "--join", self.join, "--port", str(port)),
            *("--data-dir", str(self.root / "coordinator")),
        )
        self.join = process.event()["join"]
        return process

    def node(self, name: str, blocks: str, *more: str) -> Process:
        """Starts without waiting; call `.event()` for its `ready`."""
        return self.start(
            name,
            # An explicit dtype: weights are not quantized, whatever this machine is fastest at.
            *("node", "start", "--join", self.join, "--blocks", blocks, "--threads", "1", "--dtype", "float32"),
            *("--data-dir", str(self.root / name)),
            *more,
        )

    def run(self, *arguments: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        """A command that ends by itself."""
        return run_swarm(*arguments, "--join", self.join, "--data-dir", str(self.root / "client"), timeout_s=timeout_s)

    def run_json(self, *arguments: str, timeout_s: float = 120.0) -> Any:
        result = self.run(*arguments, "--json", timeout_s=timeout_s)
        assert result.returncode == 0, result.stderr + result.stdout
        return json.loads(result.stdout)

    def close(self) -> None:
        for process in reversed(self.processes):
            if process.popen.poll() is None:
                process.popen.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.popen.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                raise AssertionError(f"{process.name} did not end on SIGTERM:\n{process.log_tail()}") from None


def run_swarm(*arguments: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "swarm.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, **ENVIRONMENT},
        check=False,
    )


@contextmanager
def swarm_of(root: Path, model: Path, nodes: dict[str, str], *, coordinator: bool = False) -> Iterator[Swarm]:
    """A running swarm: `nodes` maps names to spans. Everything is ended afterwards."""
    swarm = Swarm(root, model)
    try:
        swarm.bootstrap()
        if coordinator:
            swarm.coordinator()
        started = [swarm.node(name, blocks) for name, blocks in nodes.items()]
        for process in started:
            process.event()
        yield swarm
    finally:
        swarm.close()
