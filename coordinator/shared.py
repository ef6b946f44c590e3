"""What the drivers of all jobs have in common."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from coordinator.blobs import Blobs
from coordinator.collector import Collector
from coordinator.ports import Clock, CoordinatorSettings, ModelFacts, Signer
from coordinator.signal import Signal
from coordinator.storage import Storage


@dataclass(frozen=True)
class Shared:
    storage: Storage
    blobs: Blobs
    collector: Collector
    signer: Signer
    clock: Clock
    settings: CoordinatorSettings
    model: ModelFacts
    placement_lock: asyncio.Lock
    """Held from looking for idle nodes until they are durably taken."""
    assignments: Signal
    """Notified when any node's part may have changed."""
