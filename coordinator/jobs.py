"""All jobs of one coordinator: taking them in, finding them, sharing the nodes among them.

In: specifications, and the nodes that are there. Out: one running driver a job. A node is in at
most one pipeline; an older job chooses first whenever nodes become free. Unreferenced blobs are
removed after each committed round.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Iterable
from dataclasses import replace

import structlog

from coordinator.changes import rules_of
from coordinator.driver import JobDriver
from coordinator.ledger import JobLedger, Stored
from coordinator.nodes import Nodes
from coordinator.past import PastRounds
from coordinator.placement import Member, Placement, Traits, form_pipelines
from coordinator.records import JobRecord, Outcome
from coordinator.remakes import Remakes
from coordinator.results import JobResults
from coordinator.round_model import JobState, RoundsState
from coordinator.rounds import begin
from coordinator.shared import Shared
from swarm.config import JobSpec, job_from_json
from swarm.errors import ConfigError, CorruptData, JobConflict, JobNotFound, ModelMismatch, StorageError
from swarm.ids import HEAD, block_of

log = structlog.get_logger()


class Jobs:
    """Every job ever submitted here, in order. Call `recover` once, before anything else."""

    def __init__(self, shared: Shared, nodes: Nodes) -> None:
        self._shared = shared
        self._nodes = nodes
        self._drivers: dict[str, JobDriver] = {}
        self._submitting = asyncio.Lock()
        self._remakes = Remakes(shared.storage, shared.blobs)
        self._past = PastRounds(shared.storage, shared.settings.making_wait_s)

    async def recover(self) -> None:
        """Read every job back and go on with it. Raises ModelMismatch: they are of another base model."""
        for job in await asyncio.to_thread(self._shared.storage.jobs):
            if job.model_hash != self._shared.model.model_hash:
                raise ModelMismatch(
                    f"job {job.name} in this data folder is of model {job.model_hash.hex()[:12]}",
                    "start the coordinator with that model, or with another --data-dir",
                )
            spec = job_from_json(job.spec_json)
            driver = await asyncio.to_thread(self._load, job, spec)
            self._drivers[job.job_id] = driver
            log.info("job_recovered", job=job.name, state=driver.state.job, round=driver.state.round)
        for driver in self._drivers.values():
            driver.start()

    async def stop(self) -> None:
        for driver in self._drivers.values():
            await driver.stop()
        await self._remakes.stop()
        await self._past.stop()

    def all(self) -> list[JobDriver]:
        """In the order of submission."""
        return list(self._drivers.values())

    def find(self, job: str) -> JobDriver:
        """By id or name. Raises JobNotFound."""
        if job in self._drivers:
            return self._drivers[job]
        for driver in self._drivers.values():
            if driver.job.name == job:
                return driver
        raise JobNotFound(f"there is no job '{job[:100]}' here")

    def assigned(self, peer: str) -> JobDriver | None:
        """The job whose pipeline a node is in."""
        return next((d for d in self._drivers.values() if d.assignment_of(peer) is not None), None)

    # --- taking a job in ----------------------------------------------------------------------

    async def submit(
        self,
        submitter: str,
        spec_json: str,
        dataset: bytes,
        dataset_size: int,
        samples: int,
        heldout: tuple[bytes, int, int] = (b"", 0, 0),
    ) -> JobDriver:
        """Store a job and start it. `heldout`: hash, size and samples of the evaluation file.

        Raises ConfigError: the specification; JobConflict: its name is taken, or too many jobs;
        SwarmError of the adapter source: the method does not fit the model. Stores nothing then.
        """
        # Through a task of its own: a submitter that hangs up leaves a whole job or none.
        return await asyncio.shield(
            asyncio.ensure_future(
                self._submit(submitter, job_from_json(spec_json), (dataset, dataset_size, samples), heldout)
            )
        )

    async def _submit(
        self, submitter: str, spec: JobSpec, train: tuple[bytes, int, int], heldout: tuple[bytes, int, int]
    ) -> JobDriver:
        async with self._submitting:
            self._refuse_conflicts(spec)
            if (spec.eval is None) != (heldout == (b"", 0, 0)):
                raise ConfigError("a held-out file comes with `eval`, and the other way round")
            await self._refuse_absent("data.train", *train)
            if spec.eval is not None:
                await self._refuse_absent("eval.data", *heldout)
            return await self._create(submitter, spec, train, heldout)

    async def _refuse_absent(self, key: str, digest: bytes, size: int, samples: int) -> None:
        if not 1 <= samples <= size:
            raise ConfigError(f"{key} cannot hold {samples} samples in {size} bytes")
        if await asyncio.to_thread(self._shared.blobs.size, digest) != size:
            raise StorageError(f"the file of {key} is not uploaded", "upload it again, then submit the job")

    async def _create(
        self, submitter: str, spec: JobSpec, train: tuple[bytes, int, int], heldout: tuple[bytes, int, int]
    ) -> JobDriver:
        dataset, dataset_size, samples = train
        shared = self._shared
        shapes = await asyncio.to_thread(shared.model.adapters.shapes, spec.method)
        trainable = sum(math.prod(shape) for shape in shapes.values())
        self._refuse_shapes(shapes, trainable)
        digest = hashlib.sha256(f"{shared.signer.peer_id}\x1f{spec.name}\x1f{shared.clock.unix()}".encode())
        job = JobRecord(
            job_id=digest.hexdigest()[:16],
            name=spec.name,
            spec_json=spec.model_dump_json(),
            submitter=submitter,
            model_hash=shared.model.model_hash,
            dataset=dataset,
            dataset_size=dataset_size,
            samples=samples,
            trainable_parameters=trainable,
            heldout=heldout[0],
            heldout_size=heldout[1],
            heldout_samples=heldout[2],
        )
        state, _ = begin(rules_of(spec, shared.settings.fruitless_generations))
        driver = await asyncio.to_thread(self._store_new, job, spec, shapes, state)
        self._drivers[job.job_id] = driver
        log.info("job_submitted", job=job.name, job_id=job.job_id, trainable=trainable, by=submitter)
        driver.start()
        return driver

    def _store_new(
        self, job: JobRecord, spec: JobSpec, shapes: dict[str, tuple[int, ...]], state: RoundsState
    ) -> JobDriver:
        results = self._results(job, spec, shapes)
        ledger, initial = self._ledger(job, spec), results.initial()
        ledger.create(job, state, initial)
        # From here on nothing may fail that is asked elsewhere than in the database: the job is stored.
        return self._driver(job, spec, results, ledger, ledger.load(), {0: initial})

    def _refuse_conflicts(self, spec: JobSpec) -> None:
        if any(driver.job.name == spec.name for driver in self._drivers.values()):
            raise JobConflict(f"a job or adapter is already called {spec.name}", "choose another name")
        unfinished = [d for d in self._drivers.values() if d.state.job is not JobState.FINISHED]
        if len(unfinished) >= self._shared.settings.max_jobs:
            raise JobConflict(f"{len(unfinished)} jobs are unfinished here", "wait until some have finished")

    def _refuse_shapes(self, shapes: dict[str, tuple[int, ...]], trainable: int) -> None:
        if not shapes:
            raise ConfigError("method: it trains no parameter of this model")
        limit = self._shared.settings.max_parameters
        if trainable > limit:
            raise ConfigError(f"method: it trains {trainable} parameters, the limit here is {limit}")
        for key in shapes:
            block = block_of(key)
            if block != HEAD and int(block) >= self._shared.model.n_blocks:
                raise ConfigError(f"method: it trains '{key}', the model ends at {self._shared.model.n_blocks}")

    def _load(self, job: JobRecord, spec: JobSpec) -> JobDriver:
        shared = self._shared
        ledger = self._ledger(job, spec)
        stored = ledger.load()
        committed = stored.state.committed
        kept = {*range(max(0, committed - shared.settings.kept_rounds + 1), committed + 1)}
        if stored.state.best is not None:
            kept.add(stored.state.best.round)
        outcomes = {round: shared.storage.outcomes.find(job.job_id, round) for round in kept}
        # After a rewind, older rounds than the kept ones are known but no longer here. The newest one is what the job
        # goes on from: a file of it that is gone is made again when it is asked for.
        published = {
            round: outcome
            for round, outcome in outcomes.items()
            if outcome is not None and (round == committed or shared.blobs.size(outcome.state_blob) is not None)
        }
        results = self._results(job, spec, shared.model.adapters.shapes(spec.method))
        return self._driver(job, spec, results, ledger, stored, published)

    def _driver(
        self,
        job: JobRecord,
        spec: JobSpec,
        results: JobResults,
        ledger: JobLedger,
        stored: Stored,
        published: dict[int, Outcome],
    ) -> JobDriver:
        return JobDriver(job, spec, results, ledger, stored.state, stored.book, published, self._shared, self)

    def _results(self, job: JobRecord, spec: JobSpec, shapes: dict[str, tuple[int, ...]]) -> JobResults:
        return JobResults(job.job_id, spec, shapes, self._shared.model, self._shared.blobs)

    def _ledger(self, job: JobRecord, spec: JobSpec) -> JobLedger:
        shared = self._shared
        return JobLedger(shared.storage, job.job_id, spec.schedule, shared.signer, shared.clock, shared.settings)

    # --- sharing the nodes --------------------------------------------------------------------

    def place(self, job_id: str, without: frozenset[str] = frozenset()) -> Placement:
        """Place the nodes that no other job uses, but for those in `without`."""
        busy = {
            peer: driver.job.name
            for driver in self._drivers.values()
            if driver.job.job_id != job_id
            for peer in driver.state.busy_peers()
        }
        now_s, model = self._shared.clock.monotonic(), self._shared.model
        idle = [
            node
            for node in self._nodes.all()
            if node.record.peer not in busy and node.record.peer not in without and not node.doubted
        ]
        placement = form_pipelines(
            (Member(node.record.peer, node.record.span) for node in idle),
            model.n_blocks,
            {node.record.peer: Traits(node.record.token_block_s, now_s - node.joined_s) for node in idle},
            model.cuts,
            model.head_blocks,
        )
        if busy:
            jobs = ", ".join(sorted(set(busy.values())))
            placement = replace(placement, missing=f"{placement.missing} ({len(busy)} work for {jobs})")
        return placement

    def nodes_changed(self) -> None:
        """A node came, or one became free: waiting jobs look again, the oldest first."""
        for driver in self._drivers.values():
            driver.nodes_changed()

    def nodes_freed(self, job_id: str) -> None:
        """As a driver says it: the other jobs look again."""
        for driver in self._drivers.values():
            if driver.job.job_id != job_id:
                driver.nodes_changed()

    def doubt(self, peer: str) -> None:
        """As a driver says it: no pipeline is formed with the node before it calls again."""
        self._nodes.doubt(peer)

    def absent(self, members: Iterable[Member]) -> frozenset[str]:
        """As a driver asks: those that are not here, or not with the blocks that they had."""
        known = {member: self._nodes.get(member.peer) for member in members}
        return frozenset(m.peer for m, node in known.items() if node is None or not node.record.span.covers(m.span))

    def node_lost(self, peer: str, reason: str) -> None:
        for driver in self._drivers.values():
            driver.node_lost(peer, reason)

    async def remake(self, blob: bytes) -> bool:
        """Make a blob of a kept round again that is damaged or gone; False: it is of none.

        Raises CorruptData: what it was made of is damaged or gone, too; StorageError.
        """
        # The newest round first: older ones lack their contributions.
        kept_in = [
            (driver, round)
            for driver in self._drivers.values()
            for round in sorted(driver.published, reverse=True)
            if blob in driver.published[round].blobs
        ]
        failed: CorruptData | None = None
        for driver, round in kept_in:
            log.error("blob_damaged", job=driver.job.name, round=round, blob=blob.hex()[:12])
            try:
                await self._remakes.remake(driver.results, round, blob)
            except CorruptData as error:
                failed = error
            else:
                return True
        if failed is not None:
            raise failed
        return False

    async def past_file(self, digest: bytes) -> bytes | None:
        """A file of any committed round's adapter, made again; None: it is of none.

        Raises BeingMade, CorruptData, StorageError.
        """
        for job_id, round in await asyncio.to_thread(self._shared.storage.outcomes.with_file, digest):
            driver = self._drivers.get(job_id)
            if driver is not None:
                return await self._past.file(driver.results, driver.kept_rounds, round, digest)
        return None
