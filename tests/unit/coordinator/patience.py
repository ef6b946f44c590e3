"""A job through a trouble that is over once somebody was told of it: nodes and coordinator that try again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from coordinator_sim import ManualClock, finish_job
from crash_runner import Case

from coordinator.app import Coordinator
from swarm.errors import SwarmError
from swarm.wire.v1 import coordinator_pb2 as pb

RETRY_S = 5.0
Reported = Callable[[str], None]


class Patient:
    """The service as nodes see it through their link (`node.link`): `trouble` is reported, and the call made again."""

    def __init__(self, service: Any, trouble: type[SwarmError], reported: Reported) -> None:
        self._service, self._trouble, self._reported = service, trouble, reported

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        async def call(*arguments: Any) -> Any:
            while True:
                try:
                    return await getattr(self._service, name)(*arguments)
                except self._trouble as error:
                    self._reported(str(error))

        return call


async def finish(
    coordinator: Coordinator, clock: ManualClock, case: Case, trouble: type[SwarmError], reported: Reported
) -> pb.JobStatus:
    """The job's end. Its owner reads the job's reason; time passes until the coordinator tries again."""

    async def watch() -> None:
        while True:
            ticket = coordinator._shared.assignments.ticket()
            for driver in coordinator.jobs.all():
                if trouble.code in driver.reason:
                    reported(driver.reason)
                    await clock.sleep_over(RETRY_S)
            await ticket.wait()

    async with asyncio.TaskGroup() as group:
        watching = group.create_task(watch())
        service: Any = Patient(coordinator.service, trouble, reported)
        status = await finish_job(service, case.spec, lambda _: None, None, "", "", case.spans)
        watching.cancel()
    return status
