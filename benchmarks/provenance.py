"""Where a number comes from and how far it may be off.

`spread` sums up repeated measurements; `publish` prints a result and writes it down together
with the command, commit, hardware and versions behind it.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import torch

_ROOT = Path(__file__).resolve().parent.parent
_RESULTS = Path(__file__).resolve().parent / "results"
_PACKAGES = ("torch", "transformers", "peft", "hivemind", "uvloop", "numpy", "numba")
_PRODUCT = ("swarm", "node", "coordinator", "benchmarks")
_COMMIT_VARIABLE = "BENCHMARK_COMMIT"
"""Says which commit a copy is of whose history does not."""


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one thing."""

    median: float
    quartiles: tuple[float, float]
    least: float
    most: float
    runs: int


def spread(values: Sequence[float], digits: int = 4) -> Spread:
    """Raises ValueError for fewer than two values: one number says nothing about its spread."""
    if len(values) < 2:
        raise ValueError("a spread needs at least two measurements")
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(
        round(median, digits),
        (round(first, digits), round(third, digits)),
        round(min(values), digits),
        round(max(values), digits),
        len(values),
    )


@dataclass(frozen=True)
class Provenance:
    command: str
    date: str
    commit: str
    """Ends in "+" where a source file of the packages differs from that commit."""
    hardware: str
    load_before: float
    """The 1-minute load average when the run began: other work on the same cores."""
    threads: int
    """Of torch, in every process."""
    versions: dict[str, str]


def provenance(threads: int, card: str = "") -> Provenance:
    """Call before the work starts. `card`: the GPU that it computes on."""
    return Provenance(
        command=f"python -m benchmarks.{Path(sys.argv[0]).stem} {' '.join(sys.argv[1:])}".strip(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=_commit(),
        hardware=f"{card}, {_hardware()}" if card else _hardware(),
        load_before=round(os.getloadavg()[0], 2),
        threads=threads,
        versions={"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
    )


def card_name(device: torch.device) -> str:
    """Of the GPU; empty for a CPU."""
    if device.type == "cpu":
        return ""
    import torch  # not for benchmarks that use none

    return torch.cuda.get_device_name(device)


def publish(question: str, result: Mapping[str, object], origin: Provenance, json_to: str, save: bool) -> None:
    """Write the result under `results/` if `save`; then to `json_to` ("-": stdout) or as a table."""
    whole = {"question": question, **result, **asdict(origin)}
    if save:
        _RESULTS.mkdir(exist_ok=True)
        (_RESULTS / f"{question}.json").write_text(json.dumps(whole, indent=2, default=_plain) + "\n")
    if json_to == "-":
        print(json.dumps(whole, default=_plain), flush=True)
        return
    if json_to:
        Path(json_to).write_text(json.dumps(whole, indent=2, default=_plain) + "\n")
    table = Table(title=question, show_header=False)
    for name, value in whole.items():
        shown = _shown(value) if isinstance(value, Spread) else json.dumps(value, default=_plain)
        table.add_row(name, shown)
    Console().print(table)


def _plain(value: object) -> dict[str, object]:
    if isinstance(value, Spread):
        return asdict(value)
    raise TypeError(f"a result may not hold a {type(value).__name__}")


def _shown(s: Spread) -> str:
    return f"{s.median:g}  (quartiles {s.quartiles[0]:g}-{s.quartiles[1]:g}, {s.least:g}-{s.most:g}, {s.runs} runs)"


def _commit() -> str:
    if told := os.environ.get(_COMMIT_VARIABLE):
        return f"{told} (as told)"
    head = _git("rev-parse", "HEAD")
    return head + ("+" if head and _git("status", "--porcelain", "--", *_PRODUCT) else "") or "unknown"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _hardware() -> str:
    names = [line.partition(":")[2].strip() for line in _cpu_lines() if line.startswith("model name")]
    cores, memory_gib = os.cpu_count() or 0, psutil.virtual_memory().total / 2**30
    return f"{names[0] if names else platform.machine()}, {cores} cores, {memory_gib:.0f} GiB, {platform.platform()}"


def _cpu_lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
