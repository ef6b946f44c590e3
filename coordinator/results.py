"""Makes a round's outcome out of stored contributions, and keeps it as blobs.

In: the durable rows of a job and its blobs. Out: an `Outcome` whose blobs are on disk, not yet
referenced by a row; doing it again writes the same bytes. A damaged newest outer state is made
again from the one before. Every method blocks; nothing here decides what counts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
import structlog
from numpy.typing import NDArray

from coordinator.aggregate import (
    OuterState,
    RoundResult,
    average,
    initial_round,
    outer_round,
    pipeline_weights,
    refuse_huge,
)
from coordinator.blobs import Blobs
from coordinator.placement import Member
from coordinator.ports import ModelFacts
from coordinator.records import AdapterFile, BlockPiece, Outcome
from coordinator.replay import Parameters, Replay
from coordinator.round_model import Pipeline, Standing
from coordinator.storage import Storage
from swarm.compress import FrameContext, decode
from swarm.config import JobSpec
from swarm.errors import BlobAbsent, BlobStoreAway, CodecError, ContributionError, CorruptData, StorageError
from swarm.ids import HEAD, block_of, sha256

Shape = tuple[int, ...]
log = structlog.get_logger()
_BACKUP = (
    "restore the coordinator's data folder from a backup, or pause the job and resume it from the end of an"
    " earlier round"
)


class PayloadsDamaged(CorruptData):
    """Contributions that were held cannot be read any more. `pipelines`: id, and why."""

    def __init__(self, round: int, pipelines: Mapping[int, str]) -> None:
        super().__init__(
            f"contributions to round {round} cannot be aggregated: {'; '.join(pipelines.values())}",
            "look at the disk and its log; the round goes on without their pipelines",
        )
        self.pipelines = tuple(pipelines.items())


def shapes_of_member(shapes: Mapping[str, Shape], members: tuple[Member, ...], peer: str) -> dict[str, Shape]:
    """The parameters a member contributes: those of its blocks, and the head's if it leads."""
    position, member = next((i, m) for i, m in enumerate(members) if m.peer == peer)
    return {
        key: shape
        for key, shape in shapes.items()
        if (block_of(key) == HEAD and position == 0) or (block_of(key) != HEAD and int(block_of(key)) in member.span)
    }


class JobResults:
    """The computations of one job."""

    def __init__(
        self, job_id: str, spec: JobSpec, shapes: Mapping[str, Shape], model: ModelFacts, blobs: Blobs
    ) -> None:
        self.job_id = job_id
        self.spec = spec
        self.shapes = shapes
        self._model = model
        self._blobs = blobs

    def initial(self) -> Outcome:
        """Round 0."""
        return self._keep(initial_round(self._initial()))

    def _initial(self) -> Parameters:
        return self._model.adapters.initial(self.spec.method, self.spec.schedule.seed)

    def remake(self, storage: Storage, round: int) -> Outcome:
        """Write the blobs of a committed round again. Raises StorageError, CorruptData: what it came from is gone."""
        return self.aggregate(storage, round) if round else self.initial()

    def replay(
        self,
        storage: Storage,
        round: int,
        known: tuple[int, Parameters] | None,
        kept: Collection[int],
        stopping: Callable[[], bool],
    ) -> tuple[Parameters, dict[str, bytes]]:
        """Parameters and adapter of any committed round, from the updates (`coordinator.replay`); writes nothing.

        Raises CorruptData: an update is damaged or gone; StorageError.
        """
        replay = Replay(storage, self._blobs, self.job_id, self.shapes, self._initial, stopping)
        params = replay.parameters(round, known, kept)
        return params, self._export(params)

    def aggregate(self, storage: Storage, round: int) -> Outcome:
        """The outcome of a frozen round. Raises PayloadsDamaged (of this round), StorageError, CorruptData."""
        # The state is read before the contributions: a folder that is not mounted lacks it, too, and is waited for.
        result = self._compute(storage, round, self._outer_state(storage, round - 1))
        return self._keep(result)

    def decode(
        self, payload: bytes, members: tuple[Member, ...], peer: str, context: FrameContext
    ) -> dict[str, NDArray[np.float32]]:
        """A member's contribution. Raises StorageError, CodecError, ContributionError."""
        sent = decode(self._blobs.read(payload), shapes_of_member(self.shapes, members, peer), context)
        refuse_huge(sent)
        return sent

    def _compute(self, storage: Storage, round: int, state: OuterState) -> RoundResult:
        before = storage.outcomes.of(self.job_id, round - 1)
        context = FrameContext(self.job_id, round, before.params_hash)
        accepted = [p for p in storage.pipelines(self.job_id, round) if p.standing is Standing.WHOLE]
        sent = sorted((held.peer, held.payload, p.members, p.pipeline_id) for p in accepted for held in p.held)
        damaged: dict[int, str] = {}

        def decoded() -> Iterator[tuple[str, dict[str, NDArray[np.float32]]]]:
            for peer, payload, members, pipeline_id in sent:
                try:
                    tensors = self.decode(payload, members, peer, context)
                except (BlobAbsent, CodecError, ContributionError, CorruptData) as error:
                    # It decoded when it was held, and will not any more. A disk or store that refuses is another thing.
                    damaged[pipeline_id] = f"the contribution of {peer} cannot be used any more: {error.cause}"
                else:
                    yield peer, tensors

        mean = average(decoded(), len(accepted), self.spec.uplink, self._weights(storage, round, accepted))
        if damaged:
            raise PayloadsDamaged(round, damaged)
        return outer_round(state, mean, self.spec, self.job_id, round)

    def _weights(self, storage: Storage, round: int, accepted: Sequence[Pipeline]) -> dict[str, float] | None:
        """By peer: every member counts as much as its pipeline."""
        if self.spec.outer.weights == "equal":
            return None
        rows = storage.contributions(self.job_id, round)
        # A lead that does not tell labels from prompts is weighed by all of its tokens.
        tokens = {c.pipeline_id: c.label_tokens or c.tokens for c in rows if c.lead}
        by_id = pipeline_weights({p.pipeline_id: tokens[p.pipeline_id] for p in accepted})
        return {member.peer: by_id[p.pipeline_id] for p in accepted for member in p.members}

    def _outer_state(self, storage: Storage, round: int) -> OuterState:
        outcome = storage.outcomes.of(self.job_id, round)
        try:
            return OuterState.unpack(self._blobs.read(outcome.state_blob))
        except BlobStoreAway:
            raise
        except (CorruptData, StorageError) as error:
            log.error("outer_state_damaged", job_id=self.job_id, round=round, error=str(error))
            lost = f"the outer state of round {round} is damaged and cannot be made again"
            try:
                remade = self._remake(storage, round)
            except (BlobAbsent, CorruptData) as cause:
                raise CorruptData(f"{lost}: {cause.cause}", _BACKUP) from cause
            if self._blobs.put(remade) != outcome.state_blob:
                raise CorruptData(lost, _BACKUP) from error
            return OuterState.unpack(remade)

    def _remake(self, storage: Storage, round: int) -> bytes:
        if round == 0:
            return initial_round(self._initial()).state.pack()
        earlier = storage.outcomes.of(self.job_id, round - 1)
        state = OuterState.unpack(self._blobs.read(earlier.state_blob))
        return self._compute(storage, round, state).state.pack()

    def _keep(self, result: RoundResult) -> Outcome:
        """Write the blobs. The snapshot is one file of all blocks; so is the update."""
        pieces: list[BlockPiece] = []
        update_offset = snapshot_offset = 0
        for block in result.blocks:
            pieces.append(
                BlockPiece(
                    block=block.block,
                    params_hash=block.params_hash,
                    update_offset=update_offset,
                    update_length=len(block.frame),
                    update_sha256=sha256(block.frame),
                    snapshot_offset=snapshot_offset,
                    snapshot_length=len(block.snapshot),
                    snapshot_sha256=sha256(block.snapshot),
                )
            )
            update_offset += len(block.frame)
            snapshot_offset += len(block.snapshot)
        exported = self._export(result.state.params)
        return Outcome(
            params_hash=result.params_hash,
            state_blob=self._blobs.put(result.state.pack()),
            update_blob=self._blobs.put(b"".join(block.frame for block in result.blocks)),
            update_size=update_offset,
            snapshot_blob=self._blobs.put(b"".join(block.snapshot for block in result.blocks)),
            snapshot_size=snapshot_offset,
            blocks=tuple(pieces),
            files=tuple(
                AdapterFile(name, self._blobs.put(content), len(content)) for name, content in sorted(exported.items())
            ),
        )

    def _export(self, params: Mapping[str, NDArray[np.float32]]) -> dict[str, bytes]:
        return self._model.adapters.export(self.spec.method, params, self._model.name)
