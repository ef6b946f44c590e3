from __future__ import annotations

from pathlib import Path

import numpy as np

from node.jobstate import JobFolder, PendingContribution, SavedState


def array(seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(seed).normal(size=(3, 2)).astype(np.float32)


def test_state_and_pending_round_trip(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path, "job1")
    assert folder.load() is None
    assert folder.load_pending() is None
    moments = {"m/0/a": array(3), "v/0/a": array(4)}
    folder.save(SavedState(4, bytes(range(32)), {"0/a": array(1)}, {"0/a": array(2)}, moments, 17))
    state = folder.load()
    assert state is not None
    assert (state.round, state.base_hash, state.steps) == (4, bytes(range(32)), 17)
    assert np.array_equal(state.reference["0/a"], array(1))
    assert np.array_equal(state.residual["0/a"], array(2))
    assert {key: value.tobytes() for key, value in state.moments.items()} == {
        key: value.tobytes() for key, value in moments.items()
    }
    folder.save_pending(PendingContribution(4, b"request", b"payload", {"0/a": array(5)}))
    pending = folder.load_pending()
    assert pending is not None
    assert (pending.round, pending.request, pending.payload) == (4, b"request", b"payload")
    folder.clear_pending()
    assert folder.load_pending() is None
    folder.remove()
    assert folder.load() is None


def test_nothing_trained_yet_is_saved_too(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path, "job1")
    folder.save(SavedState(1, b"", {}, {}, {}, 0))
    state = folder.load()
    assert state is not None
    assert state.reference == {}


def test_a_damaged_file_is_rebuilt_not_believed(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path, "job1")
    folder.save(SavedState(1, b"", {"0/a": array(1)}, {}, {}, 0))
    path = tmp_path / "jobs" / "job1" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    assert folder.load() is None
