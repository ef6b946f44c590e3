from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from node.jobstate import JobFolder, PendingContribution, SavedState


def array(seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(seed).normal(size=(3, 2)).astype(np.float32)


def test_state_and_pending_round_trip(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path, "job1")
    assert folder.load() is None
    assert folder.load_pending() is None
    moments = {"m/0/a": array(3), "v/0/a": array(4), "t/0/a": np.array([17], np.float32)}
    folder.save(SavedState(4, bytes(range(32)), {"0/a": array(1)}, {"0/a": array(2)}, moments))
    state = folder.load()
    assert state is not None
    assert (state.round, state.base_hash) == (4, bytes(range(32)))
    assert np.array_equal(state.reference["0/a"], array(1))
    assert np.array_equal(state.residual["0/a"], array(2))
    assert {key: value.tobytes() for key, value in state.moments.items()} == {
        key: value.tobytes() for key, value in moments.items()
    }
    folder.save_pending(PendingContribution(4, b"request", b"payload", {"0/a": array(5)}, moments))
    pending = folder.load_pending()
    assert pending is not None
    assert (pending.round, pending.request, pending.payload) == (4, b"request", b"payload")
    assert np.array_equal(pending.residual["0/a"], array(5))
    assert pending.moments.keys() == moments.keys()
    folder.clear_pending()
    assert folder.load_pending() is None
    folder.remove()
    assert folder.load() is None


def test_nothing_trained_yet_is_saved_too(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path, "job1")
    folder.save(SavedState(1, b"", {}, {}, {}))
    state = folder.load()
    assert state is not None
    assert state.reference == {}


def test_a_damaged_file_is_rebuilt_not_believed(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path, "job1")
    folder.save(SavedState(1, b"", {"0/a": array(1)}, {}, {}))
    path = tmp_path / "jobs" / "job1" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    assert folder.load() is None


@pytest.mark.faults
def test_a_flipped_bit_is_noticed_and_the_state_before_is_loaded(tmp_path: Path, seed: int) -> None:
    """TRUST.md, 13, on a node: fifty places of a state file a seed."""
    chance = random.Random(seed)
    folder = JobFolder(tmp_path, "job1")
    first = {"0/a": array(2 * seed), "1/b": array(2 * seed + 1)}
    folder.save(SavedState(7, bytes(32), first, {"0/a": array(5)}, {"m/0/a": array(6)}))
    folder.save(SavedState(8, bytes(32), {"0/a": array(7), "1/b": array(8)}, {"0/a": array(9)}, {}))
    newest = folder.load()
    assert newest is not None
    assert newest.round == 8
    path = tmp_path / "jobs" / "job1" / "state.safetensors"
    whole = path.read_bytes()
    for _ in range(50):
        bit = chance.randrange(8 * len(whole))
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        state = folder.load()
        assert state is not None, bit
        assert (state.round, state.residual) == (7, {}), bit
        assert all(np.array_equal(state.reference[key], value) for key, value in first.items())
        assert np.array_equal(state.moments["m/0/a"], array(6))


@pytest.mark.faults
def test_a_pending_contribution_with_a_flipped_bit_is_dropped(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    folder = JobFolder(tmp_path, "job1")
    folder.save_pending(PendingContribution(4, b"request", b"payload", {"0/a": array(seed)}, {}))
    path = tmp_path / "jobs" / "job1" / "pending.safetensors"
    whole = path.read_bytes()
    for _ in range(50):
        bit = chance.randrange(8 * len(whole))
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        assert folder.load_pending() is None, bit
