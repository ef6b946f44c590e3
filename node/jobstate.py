"""What a node keeps on disk of a job: its blocks' parameters, moments and residual.

    jobs/<job id>/state.safetensors     after each settled round
    jobs/<job id>/previous.safetensors  the same, one round earlier
    jobs/<job id>/pending.safetensors   residual and moments that hold if the contribution on its way counts
    jobs/<job id>/pending.bin           that contribution

A file is replaced whole (write aside, fsync, rename), so a kill leaves the old or the new one. Each
carries the SHA-256 of what it holds; of a damaged state the earlier one is loaded. The
pending pair is written before the upload starts and removed after the round settled: a node that
dies in between finishes the upload when it comes back.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import structlog
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from swarm.adapters.registry import Parameters
from swarm.errors import StorageError

log = structlog.get_logger()


@dataclass(frozen=True)
class SavedState:
    """`round`: the round these parameters start. `base_hash`: of all blocks' parameters then.

    `lineage`: the coordinator's number for the history of rounds they follow from.
    """

    round: int
    base_hash: bytes
    reference: Parameters
    residual: Parameters
    moments: Parameters
    """As `AdapterStage.moments` gives them; so below."""
    lineage: int = 0


@dataclass(frozen=True)
class PendingContribution:
    """A contribution that was begun: all that is needed to finish it."""

    round: int
    request: bytes
    """Serialized ContributeRequest."""
    payload: bytes
    residual: Parameters
    moments: Parameters


class JobFolder:
    """The files of one job on this node."""

    def __init__(self, root: Path, job_id: str) -> None:
        self._folder = root / "jobs" / job_id
        self._state = self._folder / "state.safetensors"
        self._previous = self._folder / "previous.safetensors"
        self._pending = self._folder / "pending.safetensors"
        self._payload = self._folder / "pending.bin"

    def save(self, state: SavedState) -> None:
        arrays: Parameters = dict(state.moments)
        arrays |= {f"p/{key}": value for key, value in state.reference.items()}
        arrays |= {f"e/{key}": value for key, value in state.residual.items()}
        facts = {"round": state.round, "base_hash": state.base_hash.hex(), "lineage": state.lineage}
        self._write(self._state, _dump(arrays, facts), keep=self._previous)

    def load(self) -> SavedState | None:
        """The last settled state; None if there is none (it can be rebuilt).

        Of a damaged one the state a round earlier, without its residual: part of that was sent since.
        """
        newest = self._read(self._state)
        if newest is not None or not self._state.exists():
            return newest
        earlier = self._read(self._previous)
        found = "none" if earlier is None else f"of round {earlier.round}"
        log.warning("state_damaged", file=str(self._state), loaded_instead=found)
        return None if earlier is None else replace(earlier, residual={})

    def _read(self, path: Path) -> SavedState | None:
        loaded = _load(path)
        if loaded is None:
            return None
        arrays, facts = loaded
        return SavedState(
            round=int(facts["round"]),
            base_hash=bytes.fromhex(str(facts["base_hash"])),
            reference=_under(arrays, "p/"),
            residual=_under(arrays, "e/"),
            moments=_moments(arrays, facts),
            lineage=int(facts.get("lineage", 0)),
        )

    def save_pending(self, pending: PendingContribution) -> None:
        self._write(self._payload, pending.payload)
        facts = {"round": pending.round, "request": pending.request.hex()}
        arrays: Parameters = dict(pending.moments)
        arrays |= {f"e/{key}": value for key, value in pending.residual.items()}
        self._write(self._pending, _dump(arrays, facts))

    def load_pending(self) -> PendingContribution | None:
        loaded = _load(self._pending)
        if loaded is None or not self._payload.exists():
            return None
        arrays, facts = loaded
        try:
            payload = self._payload.read_bytes()
        except OSError as error:
            raise StorageError(f"cannot read {self._payload}: {error.strerror}") from error
        return PendingContribution(
            round=int(facts["round"]),
            request=bytes.fromhex(str(facts["request"])),
            payload=payload,
            residual=_under(arrays, "e/"),
            moments=_moments(arrays, facts),
        )

    def clear_pending(self) -> None:
        """Raises StorageError."""
        try:
            self._pending.unlink(missing_ok=True)
            self._payload.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"cannot remove {self._pending}: {error.strerror}") from error

    def remove(self) -> None:
        """The job is over for this node."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, path: Path, data: bytes, keep: Path | None = None) -> None:
        """`keep`: where the file that is replaced stays."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if keep is not None and path.exists():
                keep.unlink(missing_ok=True)
                os.link(path, keep)
            os.replace(temporary, path)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}") from error


def _dump(arrays: Mapping[str, NDArray[np.float32]], facts: Mapping[str, object]) -> bytes:
    # safetensors refuses an empty file; a marker keeps the round's facts readable all the same.
    tensors = {key: np.ascontiguousarray(value) for key, value in arrays.items()} or {"none": np.zeros(1, np.float32)}
    text = json.dumps(dict(facts))
    return bytes(save(tensors, metadata={"facts": text, "sha256": _digest(tensors, text)}))


def _digest(tensors: Mapping[str, NDArray[np.float32]], facts: str) -> str:
    """safetensors itself has no checksum: a flipped bit would be trained on."""
    digest = hashlib.sha256(facts.encode())
    for key in sorted(tensors):
        digest.update(f"\x1f{key}\x1f{tensors[key].dtype}\x1f{tensors[key].shape}\x1f".encode())
        digest.update(tensors[key].tobytes())
    return digest.hexdigest()


def _load(path: Path) -> tuple[Parameters, dict[str, int | str]] | None:
    if not path.exists():
        return None
    try:
        with safe_open(str(path), framework="numpy") as reader:
            text, digest = reader.metadata()["facts"], reader.metadata()["sha256"]
            tensors = {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118
        if _digest(tensors, text) != digest:
            return None
        tensors.pop("none", None)
        return tensors, json.loads(text)
    except (SafetensorError, OSError, KeyError, ValueError):
        return None


def _moments(arrays: Parameters, facts: Mapping[str, int | str]) -> Parameters:
    found = {key: value for key, value in arrays.items() if key.startswith(("m/", "v/", "t/"))}
    if "steps" in facts:  # a file of before every parameter had a count of its own
        steps = np.array([float(facts["steps"])], np.float32)
        found |= {f"t/{key[2:]}": steps for key in arrays if key.startswith("m/")}
    return found


def _under(arrays: Parameters, prefix: str) -> Parameters:
    return {key[len(prefix) :]: value for key, value in arrays.items() if key.startswith(prefix)}
