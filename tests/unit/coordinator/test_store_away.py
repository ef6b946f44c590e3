"""A blob store behind a URL that goes away at any moment of a job: said clearly, and waited out by nodes and job."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from coordinator_sim import ManualClock, identity, model_facts
from crash_runner import Case
from fsspec.implementations.memory import MemoryFileSystem
from patience import RETRY_S, finish

from coordinator.app import Coordinator
from coordinator.ports import CoordinatorSettings
from swarm.errors import BlobStoreAway

TRIALS = 16


class Away(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A store in memory whose network ends at one call, until somebody who waits for it has been told."""

    protocol = "away"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    calls: ClassVar[list[str]] = []
    at: ClassVar[int] = 0
    reports: ClassVar[list[str]] = []

    @classmethod
    def begin(cls, at: int) -> None:
        """A new store that goes away at call `at`; 0: never."""
        cls.store.clear()
        cls.calls.clear()
        cls.reports.clear()
        cls.at = at

    @classmethod
    def reported(cls, what: str) -> None:
        cls.reports.append(what)
        cls.at = 0

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if 0 < self.at <= len(self.calls):
            raise RuntimeError("EndpointConnectionError: no route to the bucket")

    def info(self, path: str, **options: Any) -> Any:
        self._called("info")
        return super().info(path, **options)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        self._called("pipe_file")
        super().pipe_file(path, value, mode)

    def put_file(self, local: str, path: str, **options: Any) -> None:
        self._called("put_file")
        super().pipe_file(path, Path(local).read_bytes())

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        self._called("cat_file")
        return bytes(super().cat_file(path, start, end))

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        self._called("ls")
        return super().ls(path, detail)

    def rm_file(self, path: str) -> None:
        self._called("rm_file")
        super().rm_file(path)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    fsspec.register_implementation("away", Away, clobber=True)
    yield
    Away.begin(0)


async def job(folder: Path, case: Case, at: int) -> tuple[list[str], str]:
    """Hashes of all rounds of a job whose store goes away, and the job's reason at the end."""
    Away.begin(0)
    clock = ManualClock()
    settings = CoordinatorSettings(silent_s=6000.0, recovery_grace_s=6000.0, retry_s=RETRY_S)
    coordinator = await Coordinator.open(folder, model_facts(), identity(), settings, clock, "away://bucket")
    Away.calls.clear()
    Away.at = at

    try:
        status = await finish(coordinator, clock, case, BlobStoreAway, Away.reported)
    finally:
        await coordinator.close()
    return [entry.params_hash.hex() for entry in status.history], status.reason


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["rounds", "scored", "overlap"])
def test_a_store_that_goes_away_costs_nothing(tmp_path: Path, kind: str, seed: int) -> None:
    def run(at: int) -> tuple[list[str], str]:
        return asyncio.run(asyncio.wait_for(job(tmp_path / str(at), case, at), 60))

    case, chance = Case(kind, seed), random.Random(seed)
    free = run(0)
    assert Away.reports == []
    calls = list(Away.calls)
    firsts = [calls.index(call) + 1 for call in sorted(set(calls))]
    for at in sorted({*firsts, *(chance.randint(1, len(calls)) for _ in range(TRIALS))}):
        assert run(at) == free, f"away from call {at} on, {calls[at - 1]}"
        assert all("SW705" in report and "nothing is lost" in report for report in Away.reports)
        # Collecting what nobody needs is all that may fail unseen.
        assert Away.reports or set(calls[at - 1 :]) <= {"ls", "rm_file"}, f"away from call {at} on, {calls[at - 1]}"
