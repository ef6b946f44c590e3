"""What the coordinator needs from outside, and the numbers that bound it.

Contracts and frozen values only: a clock, a signer, the base model's facts and the source of a
method's adapters are passed in, so that the whole coordinator runs in one process in a test.
Nothing here imports torch or reads a disk.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from swarm.config import LoraMethod

Tensors = Mapping[str, NDArray[np.float32]]
"""Parameter key (swarm.ids.param_key) to float32 array."""


class Clock(Protocol):
    """`monotonic` decides deadlines and liveness; `unix` is shown to people and decides nothing."""

    def monotonic(self) -> float: ...

    def unix(self) -> float: ...

    async def sleep(self, seconds: float) -> None: ...


class SystemClock:
    """The clock of this machine."""

    def monotonic(self) -> float:
        return time.monotonic()

    def unix(self) -> float:
        return time.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class Signer(Protocol):
    """The coordinator's identity (swarm.identity.Identity is one)."""

    @property
    def peer_id(self) -> str: ...

    def sign(self, message: bytes) -> bytes: ...


class AdapterSource(Protocol):
    """What a fine-tuning method trains in this base model. Every method is a pure function."""

    def shapes(self, method: LoraMethod) -> dict[str, tuple[int, ...]]:
        """Every parameter key of a job with its shape.

        Raises SwarmError if the method does not fit the model.
        """
        ...

    def initial(self, method: LoraMethod, seed: int) -> dict[str, NDArray[np.float32]]:
        """The parameters before round 1: the same bytes on every machine."""
        ...

    def export(self, method: LoraMethod, params: Tensors, model_name: str) -> dict[str, bytes]:
        """The files of an adapter in PEFT's layout, by file name."""
        ...


@dataclass(frozen=True)
class ModelFacts:
    """The base model of this coordinator's swarm. The coordinator holds no weights."""

    name: str
    revision: str
    model_hash: bytes
    n_blocks: int
    adapters: AdapterSource
    cuts: tuple[int, ...] | None = None
    """Where spans may start and end; None: everywhere."""
    head_blocks: float = 0.0
    """What the head costs in training, in blocks, where every position is labelled."""


def _no_durable_point(_name: str) -> None:
    """What a durable write does besides being written: nothing."""


@dataclass(frozen=True)
class CoordinatorSettings:
    """Bounds and intervals; each is used by one part, named in its comment."""

    poll_every_s: float = 5.0
    """Told to nodes at registration."""
    silent_s: float = 15.0
    """A node that has said nothing for so long is lost (nodes)."""
    recovery_grace_s: float = 45.0
    """After a start, a node known from before may be silent for so long (nodes)."""
    making_wait_s: float = 20.0
    """Longest wait within a call for a past round's adapter; it is made all the same (past)."""
    max_wait_s: float = 30.0
    """Longest long poll (service)."""
    retry_s: float = 5.0
    """Pause before a job's step that failed on disk is tried again (driver)."""
    fruitless_generations: int = 3
    """A job pauses after so many generations in a row without one contribution (rounds)."""
    max_blob_bytes: int = 8 * 1024**3
    max_piece_bytes: int = 4 * 1024**2
    max_partials: int = 1024
    blob_grace_s: float = 3600.0
    """An unreferenced blob lives for so long after its last use (blobs)."""
    kept_rounds: int = 3
    """Outer states, snapshots and adapters of so many newest rounds are kept (garbage collection)."""
    kept_events: int = 5000
    """Newest lines of a job's log that are kept (ledger)."""
    max_jobs: int = 1000
    """Unfinished jobs (service)."""
    max_nodes: int = 10_000
    """Registered nodes (nodes)."""
    max_parameters: int = 2**31
    """Trainable parameters of one job (service)."""
    concurrent_decodes: int = 2
    """Contributions validated at once; each holds its decoded parameters in memory (intake)."""
    durable_point: Callable[[str], None] = _no_durable_point
    """Called before and after every durable write with its name; tests count and crash here."""
