"""However a process ends, nothing of it is left, and it starts again at once as the same one."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import typer.main

from swarm.cli.main import app
from swarm.identity import Identity
from swarm.net.join import parse_join
from tests.integration.processes import Process, Swarm, swarm_of
from tests.integration.traces import Traces

HELP_CPU_S = 2.0
GONE_TIMEOUT_S = 10.0


@pytest.fixture(scope="module")
def serving(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    """A swarm that can be joined and prompted."""
    with swarm_of(tmp_path_factory.mktemp("lifecycle"), smollm2, {"whole": "0:30"}) as swarm:
        yield swarm


# --- the long-running processes, ended in every way and started again


def ctrl_c(process: Process, traces: Traces) -> None:
    """As a terminal sends it: to all of the process group; twice, as impatient people do."""
    os.killpg(process.popen.pid, signal.SIGINT)
    os.killpg(process.popen.pid, signal.SIGINT)
    assert process.popen.wait(timeout=30) == 130
    traces.assert_none()


def kill(process: Process, traces: Traces) -> None:
    """Its daemon, which is nobody's child then, ends too; a pidfd tells when all of its files are closed."""
    daemons = [os.pidfd_open(child.pid) for child in process.children()]
    process.kill()
    for daemon in daemons:
        assert select.select([daemon], [], [], GONE_TIMEOUT_S)[0]
        os.close(daemon)


def kill_daemon(process: Process, traces: Traces) -> None:
    """The libp2p daemon dies alone; a process that nobody can reach any more ends too, and says why."""
    for child in process.children():
        child.kill()
    error = process.event(timeout_s=30)["error"]
    assert (error["code"], "libp2p daemon" in error["cause"]) == ("SW300", True)
    assert process.popen.wait(timeout=30) == 1
    traces.assert_none()


def terminate(process: Process, traces: Traces) -> None:
    """As service managers send it: to every process at once, the daemon included."""
    for running in traces.processes():
        with suppress(psutil.NoSuchProcess):  # the first one ends the others
            running.terminate()
    assert process.popen.wait(timeout=30) == 143
    traces.assert_none()


ENDINGS: dict[str, list[Callable[[Process, Traces], None]]] = {
    "bootstrap": [ctrl_c, kill_daemon, terminate],
    "coordinator": [ctrl_c, terminate],
    "node": [ctrl_c, kill, kill_daemon, terminate],
}
DAEMONS = {"bootstrap": 1, "coordinator": 0, "node": 1}


def free_port() -> int:
    """A port below those that the kernel hands out, so that it stays free between a stop and the next start."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def arguments_of(role: str, serving: Swarm) -> list[str]:
    match role:
        case "bootstrap":
            return ["bootstrap", "start", "--model", str(serving.model)]
        case "coordinator":
            return ["coordinator", "start", "--join", serving.join]
        case _:
            return ["node", "start", "--join", serving.join, "--blocks", "0:2", "--threads", "1"]


def start(name: str, arguments: list[str], folder: Path, traces: Traces) -> Process:
    command = [sys.executable, "-m", "swarm.cli", *arguments, "--json"]
    return Process(name, command, folder, traces.environment)


def secrets_of(data: Path) -> dict[str, bytes]:
    """The key files, which nobody else may read."""
    paths = [path for path in (data / "identity.key", data / "tls.pem") if path.exists()]
    assert {path.stat().st_mode & 0o777 for path in paths} == {0o600}
    return {path.name: path.read_bytes() for path in paths}


def live(role: str, serving: Swarm) -> int:
    """Start a role and end it, once for each way of ending; returns how often it lived."""
    data, port = serving.root / f"{role}-lives", free_port()
    arguments = [*arguments_of(role, serving), "--port", str(port), "--data-dir", str(data)]
    seen = []
    for ending in ENDINGS[role]:
        with Traces() as traces:
            process = start(f"{role}-{ending.__name__}", arguments, serving.root / "logs", traces)
            # The same port, peer id and join string each time: the lock, the port and the keys were left in order.
            seen.append((process.event(), secrets_of(data)))
            assert port in traces.ports()
            assert len(process.children()) == DAEMONS[role]
            ending(process, traces)
            traces.assert_no_process({port})
            assert "Traceback" not in process.log.read_text()
    assert all(life == seen[0] for life in seen)
    return len(seen)


@pytest.fixture(scope="module")
def lives(serving: Swarm) -> Iterator[dict[str, Future[int]]]:
    """The roles live side by side, which uses both cores."""
    with ThreadPoolExecutor() as pool:
        yield {role: pool.submit(live, role, serving) for role in ENDINGS}


@pytest.mark.parametrize("role", ENDINGS)
def test_nothing_is_left_and_it_starts_again(role: str, lives: dict[str, Future[int]]) -> None:
    assert lives[role].result() == len(ENDINGS[role])


# --- signals in the middle of something


def test_sigterm_while_weights_are_loaded(serving: Swarm) -> None:
    arguments = ["node", "start", "--join", serving.join, "--data-dir", str(serving.root / "loading")]
    with Traces() as traces:
        process = start("loading", arguments, serving.root / "logs", traces)
        process.wait_log("loading")
        assert process.stop(signal.SIGTERM) == 143
        traces.assert_none()
    events = [event["event"] for event in process.log_events()]
    assert (events[0], events[-1]) == ("joining", "loading")
    assert "Traceback" not in process.log.read_text()


@pytest.mark.parametrize(
    ("command", "number", "status"),
    [(("node", "start"), signal.SIGTERM, 143), (("status",), signal.SIGINT, 130)],
    ids=["node-sigterm", "status-sigint"],
)
def test_signal_while_joining(command: tuple[str, ...], number: signal.Signals, status: int, serving: Swarm) -> None:
    with Traces() as traces, socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        silent.settimeout(90)
        address = f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}/p2p/{Identity.generate().peer_id}"
        join = replace(parse_join(serving.join), bootstrap=(address,)).encode()
        arguments = [*command, "--join", join, "--data-dir", str(serving.root / "joining")]
        process = start(f"joining-{command[0]}-{status}", arguments, serving.root / "logs", traces)
        connection, _ = silent.accept()
        with connection:
            assert process.stop(number) == status
        traces.assert_none()
    assert "Traceback" not in process.log.read_text()


def test_ctrl_c_while_generating(serving: Swarm) -> None:
    with Traces() as traces:
        # Not --json: the text is printed as it comes.
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "swarm.cli", "generate", "Tell me a very long story."),
                *("--join", serving.join, "--data-dir", str(serving.root / "client"), "--max-new-tokens", "4000"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **traces.environment},
            start_new_session=True,
        )
        assert process.stdout is not None
        assert process.stdout.read(1)
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
        assert (process.returncode, stderr) == (130, b"")
        traces.assert_none()
    assert all(process.popen.poll() is None for process in serving.processes)


# --- help


def command_paths() -> list[tuple[str, ...]]:
    """Every command and group, as words."""
    found: list[tuple[str, ...]] = []

    def walk(command: object, path: tuple[str, ...]) -> None:
        found.append(path)
        for name, sub in getattr(command, "commands", {}).items():
            walk(sub, (*path, name))

    walk(typer.main.get_command(app), ())
    return found


@pytest.mark.parametrize("path", command_paths(), ids=lambda path: " ".join(path) or "swarm")
def test_help_is_fast_and_imports_no_torch(path: tuple[str, ...]) -> None:
    code = (
        "import json, sys, time\n"
        "from swarm.cli.main import run\n"
        "try:\n    run()\n"
        "except SystemExit as end:\n"
        "    heavy = {'torch', 'transformers', 'hivemind', 'grpc'} & set(sys.modules)\n"
        "    print(json.dumps([end.code, sorted(heavy), time.process_time()]), file=sys.stderr)\n"
    )
    finished = subprocess.run([sys.executable, "-c", code, *path, "--help"], capture_output=True, text=True, check=True)
    assert "Usage" in finished.stdout
    status, heavy, cpu_s = json.loads(finished.stderr)
    assert (status, heavy) == (0, [])
    assert cpu_s < HELP_CPU_S
