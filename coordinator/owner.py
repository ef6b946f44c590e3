"""What a job's owner may do with it: pause, stop, resume, rewind, change settings.

In: the verified caller. Out: the event for the job's state machine, once it is known to be the
owner's and to fit; a typed error otherwise. The owner is who submitted the job, and the
coordinator itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from coordinator.changes import changed_spec, rules_of
from coordinator.driver import JobDriver
from coordinator.round_events import Change, Pause, Resume, Rewind, Stop
from coordinator.round_model import JobState, OrderKind, Settings
from coordinator.scoring import best_of
from coordinator.shared import Shared
from swarm.config import job_from_json
from swarm.errors import JobConflict, NotJobOwner


class Owner:
    """One caller and one job. Raises NotJobOwner if it is not theirs."""

    def __init__(self, driver: JobDriver, shared: Shared, caller: str) -> None:
        if caller not in (driver.job.submitter, shared.signer.peer_id):
            raise NotJobOwner(f"job {driver.job.name} was submitted by {driver.job.submitter}, not by {caller}")
        self._driver = driver
        self._shared = shared

    async def pause(self) -> None:
        """Close the open round, then rest. Raises JobConflict: it rests already, or has ended."""
        self._refuse_in(JobState.PAUSED, JobState.FINISHED)
        await self._driver.decide(Pause("paused by its owner"))

    async def stop(self) -> None:
        """Close the open round, then end for good. Raises JobConflict: it has ended."""
        self._refuse_in(JobState.FINISHED)
        state = self._driver.state
        await self._driver.decide(Stop(f"stopped by its owner in round {state.round} of {state.rules.rounds}"))

    async def resume(self, round: int | None) -> None:
        """Go on, from the end of `round` if it is given. A pause that is only ordered is called off.

        Raises JobConflict: not paused, or that round is not kept; CorruptData, StorageError: what is
        kept of it is damaged.
        """
        driver, state = self._driver, self._driver.state
        called_off = state.order is not None and state.order.kind is OrderKind.PAUSE and round is None
        if state.job is not JobState.PAUSED and not called_off:
            raise JobConflict(f"job {driver.job.name} is {state.job}, not paused", "`swarm job pause` comes first")
        if round is None or round == state.committed:
            await driver.decide(Resume())
            return
        # Read whole: better to learn of a damaged file before the later rounds are gone.
        await asyncio.to_thread(self._shared.blobs.read, driver.outcome_of(round).state_blob)
        storage, job_id = self._shared.storage, driver.job.job_id
        generations = await asyncio.to_thread(storage.generations_after, job_id, round)
        recent_s = await asyncio.to_thread(storage.recent_times, job_id, round)
        scores = await asyncio.to_thread(storage.scores, job_id, round)
        # Of a better one that is no longer kept there is no adapter to end with.
        kept = driver.kept_rounds
        best = best_of((score for score in scores if score[0] in kept), state.rules.min_delta)
        await driver.decide(Rewind(round, generations, recent_s, best))

    async def change(self, values: Mapping[str, str]) -> None:
        """New settings, from the next forming of pipelines on. Raises JobConflict, ConfigError."""
        self._refuse_in(JobState.FINISHED)
        driver, state = self._driver, self._driver.state
        spec = job_from_json(state.next.spec_json) if state.next is not None else driver.spec
        changed, text = changed_spec(spec, values, state.round)
        rules = rules_of(changed, self._shared.settings.fruitless_generations)
        await driver.decide(Change(Settings(rules, changed.model_dump_json(), text)))

    def _refuse_in(self, *states: JobState) -> None:
        driver = self._driver
        if driver.state.job in states:
            why = f": {driver.reason}" if driver.reason else ""
            raise JobConflict(f"job {driver.job.name} is {driver.state.job} already{why}", "see `swarm job status`")
