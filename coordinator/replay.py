"""The reference parameters after any committed round, from the updates that led there.

Updates are kept for good: they are what a round cost in the downlink. Outer states, snapshots and adapters are many
times larger and kept of the newest rounds. Starts from the nearest round of which they are here, else from the job's
initial parameters; every block is checked against its hash after every round. Blocks (call it from a thread).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np
import structlog
from numpy.typing import NDArray

from coordinator.aggregate import OuterState
from coordinator.blobs import Blobs
from coordinator.records import Outcome
from coordinator.storage import Storage
from swarm.errors import BlobAbsent, CodecError, CorruptData, StorageError
from swarm.optim.params import by_block, unpack_block
from swarm.optim.update import updated_block

Shape = tuple[int, ...]
Parameters = dict[str, NDArray[np.float32]]
log = structlog.get_logger()


class Replay:
    """Of one job. `initial` makes the parameters of round 0."""

    def __init__(
        self,
        storage: Storage,
        blobs: Blobs,
        job_id: str,
        shapes: Mapping[str, Shape],
        initial: Callable[[], Parameters],
        stopping: Callable[[], bool],
    ) -> None:
        self._storage = storage
        self._blobs = blobs
        self._job_id = job_id
        self._shapes = shapes
        self._initial = initial
        self._stopping = stopping

    def parameters(self, round: int, known: tuple[int, Parameters] | None, kept: Collection[int]) -> Parameters:
        """After a committed round. `known` are a round before it and the parameters after that; `kept` the rounds whose
        state is here.

        Raises CorruptData: an update is damaged or gone; StorageError: the disk refuses, or the coordinator stops.
        """
        start, params = self._nearest(round, known, kept)
        for number in range(start + 1, round + 1):
            if self._stopping():
                raise StorageError("the coordinator stops", "ask again once it runs")
            try:
                params = self._updated(params, number)
            except (BlobAbsent, CodecError, CorruptData) as error:
                raise CorruptData(f"the update of round {number} cannot be used: {error.cause}") from error
        return params

    def _nearest(
        self, round: int, known: tuple[int, Parameters] | None, kept: Collection[int]
    ) -> tuple[int, Parameters]:
        first = known[0] if known else 0
        for number in sorted((number for number in kept if first < number <= round), reverse=True):
            outcome = self._storage.outcomes.of(self._job_id, number)
            for blob, read in ((outcome.snapshot_blob, self._snapshot), (outcome.state_blob, self._state)):
                if self._blobs.size(blob) is None:
                    continue
                try:
                    return number, read(outcome)
                except (BlobAbsent, CorruptData) as error:
                    log.warning("past_state_damaged", job_id=self._job_id, round=number, error=str(error))
        return known or (0, self._initial())

    def _state(self, outcome: Outcome) -> Parameters:
        return dict(OuterState.unpack(self._blobs.read(outcome.state_blob)).params)

    def _snapshot(self, outcome: Outcome) -> Parameters:
        data = self._blobs.read(outcome.snapshot_blob)
        keys = by_block(self._shapes)
        params: Parameters = {}
        for piece in outcome.blocks:
            raw = data[piece.snapshot_offset : piece.snapshot_offset + piece.snapshot_length]
            params |= unpack_block(raw, {key: self._shapes[key] for key in keys[piece.block]})
        return params

    def _updated(self, params: Parameters, round: int) -> Parameters:
        outcome, keys = self._storage.outcomes.of(self._job_id, round), by_block(params)
        update = self._blobs.read(outcome.update_blob)
        after: Parameters = {}
        for piece in outcome.blocks:
            frame = update[piece.update_offset : piece.update_offset + piece.update_length]
            before = {key: params[key] for key in keys[piece.block]}
            after |= updated_block(piece.block, before, frame, self._job_id, round, piece.params_hash)
        return after
