"""Fills the disk under a coordinator before each write of a round, and frees it once that was reported.

Run by test_full_disk as `unshare -Urm python full_disk_runner.py FOLDER SEED`: in a mount namespace of its own,
whose FOLDER/disk is a file system of 12 MiB. Up to two pages stay free, so that some writes are cut in the middle.
Nodes do what `node.link` does, they try again; the coordinator's own steps are tried again by themselves.
Prints one JSON line for the fault-free run and one a filled point.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import structlog
from coordinator_sim import ManualClock, identity, model_facts
from crash_runner import FIRST, LAST, Case, Strike, in_child, load_codec
from patience import RETRY_S, finish

from coordinator.app import Coordinator
from coordinator.ports import CoordinatorSettings
from swarm.errors import DiskFull

_PAGE = 4096


class Disk:
    """The small file system, and what was said about it while it was full."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self._ballast = folder / "ballast"
        self._spare = chance.randint(0, 2) * _PAGE
        self.reports: list[str] = []

    def fill(self) -> None:
        with open(self._ballast, "wb", buffering=0) as file:
            for size in (1 << 16, _PAGE):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue
            file.truncate(max(0, file.tell() - self._spare))

    def reported(self, reason: str) -> None:
        """Whoever owns the disk reads it and makes room."""
        self.reports.append(reason)
        self._ballast.unlink(missing_ok=True)


async def life(folder: Path, case: Case, disk: Disk, point: Strike) -> dict[str, Any]:
    clock = ManualClock()
    settings = CoordinatorSettings(durable_point=point, silent_s=6000.0, recovery_grace_s=6000.0, retry_s=RETRY_S)
    coordinator = await Coordinator.open(folder, model_facts(), identity(), settings, clock)

    try:
        status = await finish(coordinator, clock, case, DiskFull, disk.reported)
    finally:
        await coordinator.close()
    return {
        "hashes": [entry.params_hash.hex() for entry in status.history],
        "reason": status.reason,
        "names": point.names,
        "reports": disk.reports,
        "left_over": [path.name for path in (folder / "blobs").rglob("*.tmp")],
    }


def run(root: Path, case: Case, at: int) -> dict[str, Any]:
    disk = Disk(root / "disk", random.Random(case.seed * 1000 + at))
    data = root / "disk" / f"data-{at}"

    def work() -> None:
        result = asyncio.run(asyncio.wait_for(life(data, case, disk, Strike(at, 1, disk.fill)), 60))
        (root / "result.json").write_text(json.dumps(result))

    status = in_child(work)
    subprocess.run(["rm", "-rf", str(data)], check=True)
    return {"status": status} | json.loads((root / "result.json").read_text())


def main(root: Path, seed: int) -> None:
    load_codec()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    (root / "disk").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(root / "disk")], check=True)
    case = Case("rounds", seed)
    free = run(root, case, 0)
    print(json.dumps(free), flush=True)
    names = free["names"]
    for at in range(names.index(FIRST) + 1, names.index(LAST) + 1):
        # An fsync and a rename need no room; the write before them did.
        if names[at - 1].startswith("before") and names[at - 1].split()[-1] not in ("fsync", "rename"):
            os.truncate(root / "result.json", 0)
            print(json.dumps({"at": at, "name": names[at - 1]} | run(root, case, at)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
