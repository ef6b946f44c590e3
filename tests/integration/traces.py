"""What processes leave behind: looked for by a mark in their environment and a folder for their sockets."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil

from tests.integration.processes import ENVIRONMENT


class Traces:
    """Start processes with `environment`; use as a context manager, which ends whatever is left."""

    def __init__(self) -> None:
        self._mark = uuid.uuid4().hex
        # Right under /tmp: a Unix socket's path has 107 bytes at most.
        self.folder = Path(tempfile.mkdtemp(prefix="left-", dir="/tmp"))

    @property
    def environment(self) -> dict[str, str]:
        return {"SWARM_TEST_MARK": self._mark, "TMPDIR": str(self.folder)}

    def processes(self) -> list[psutil.Process]:
        """All that were started with this environment, and their children, that still run."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("SWARM_TEST_MARK") == self._mark:
                    found.append(process)
            except psutil.Error:
                continue  # ended meanwhile, or is not ours
        return found

    def ports(self) -> set[int]:
        """TCP ports that they listen on."""
        return {
            connection.laddr.port
            for process in self.processes()
            for connection in process.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        }

    def assert_no_process(self, ports: Collection[int] = ()) -> None:
        """None of them runs, and `ports` can be listened on again."""
        running = [process.cmdline() for process in self.processes()]
        assert not running, f"still running: {running}"
        for port in ports:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", port))

    def assert_none(self, ports: Collection[int] = ()) -> None:
        """As `assert_no_process`, and their sockets and temporary files are gone too."""
        self.assert_no_process(ports)
        # torch makes its compile cache there when it is imported; it is empty and all processes share it.
        files = [path for path in self.folder.rglob("*") if not path.name.startswith("torchinductor_")]
        assert not files, f"still there: {files}"

    def __enter__(self) -> Traces:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes():
            process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class Answer:
    """How a command ended."""

    status: int
    stdout: str
    stderr: str
    seconds: float
    ended: float
    """Unix time."""

    @property
    def waited_s(self) -> float:
        """Since it began to join the swarm; 0 if it never did."""
        for line in self.stderr.splitlines():
            event = json.loads(line) if line.startswith("{") else {}
            if event.get("event") == "joining":
                return self.ended - datetime.fromisoformat(event["timestamp"]).timestamp()
        return 0.0


def ask(arguments: list[str], environment: Mapping[str, str] | None = None, timeout_s: float = 60.0) -> Answer:
    """Run a command to its end, and check that nothing of it is left."""
    with Traces() as traces:
        began = time.time()
        finished = subprocess.run(
            [sys.executable, "-m", "swarm.cli", *arguments],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env={**os.environ, **ENVIRONMENT, **traces.environment, **(environment or {})},
            check=False,
        )
        ended = time.time()
        traces.assert_none()
        return Answer(finished.returncode, finished.stdout, finished.stderr, ended - began, ended)
