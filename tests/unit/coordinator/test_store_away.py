"""A blob store behind a URL that goes away at any moment of a job: said clearly, and waited out by nodes and job."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from coordinator_sim import ManualClock, finish_job, identity, model_facts
from crash_runner import Case
from fsspec.implementations.memory import MemoryFileSystem

from coordinator.app import Coordinator
from coordinator.ports import CoordinatorSettings
from swarm.errors import BlobStoreAway

TRIALS = 16
_RETRY_S = 5.0


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


class Patient:
    """The service as nodes see it through their link."""

    def __init__(self, service: Any) -> None:
        self._service = service

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        async def call(*arguments: Any) -> Any:
            while True:
                try:
                    return await getattr(self._service, name)(*arguments)
                except BlobStoreAway as error:
                    Away.reported(str(error))

        return call


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    fsspec.register_implementation("away", Away, clobber=True)
    yield
    Away.begin(0)


async def job(folder: Path, case: Case, at: int) -> tuple[list[str], str]:
    """Hashes of all rounds of a job whose store goes away, and the job's reason at the end."""
    Away.begin(0)
    clock = ManualClock()
    settings = CoordinatorSettings(silent_s=6000.0, recovery_grace_s=6000.0, retry_s=_RETRY_S)
    coordinator = await Coordinator.open(folder, model_facts(), identity(), settings, clock, "away://bucket")
    Away.calls.clear()
    Away.at = at

    async def watch() -> None:
        """The owner looks at the job's reason; time passes until the coordinator tries again."""
        while True:
            ticket = coordinator._shared.assignments.ticket()
            for driver in coordinator.jobs.all():
                if BlobStoreAway.code in driver.reason:
                    Away.reported(driver.reason)
                    await clock.sleep_over(_RETRY_S)
            await ticket.wait()

    try:
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(watch())
            service: Any = Patient(coordinator.service)
            status = await finish_job(service, case.spec, lambda _: None, None, "", "", case.spans)
            watching.cancel()
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
