"""The figures of `benchmarks.wan_training` out of made measurements."""

from __future__ import annotations

import pytest

from benchmarks.shaping import Counts
from benchmarks.wan_training import Measured, Stretch, needed, row


def stretch(gap_s: float, steps_s: tuple[float, ...], hop: tuple[int, int] = (0, 0)) -> Stretch:
    counts = (Counts(*hop, 1, 1, 0), Counts(0, 0, 1, 1, 0), Counts(1000, 3000, 1, 1, 0), Counts(1000, 1000, 1, 1, 0))
    return Stretch(gap_s, steps_s, 1000 * len(steps_s), (3.0, 4.0, 0.5), counts)


JOB = Measured(stretch(0.0, (1.0, 1.0)), stretch(0.4, (1.2, 1.2), (2_000_000, 4_000_000)), stretch(0.1, (1.0, 1.0)))


def test_shares_are_of_the_shaped_round() -> None:
    result = row(JOB)
    assert result["compute_share"] == pytest.approx(2.0 / 2.8, abs=1e-4)
    assert result["over_unshaped"] == pytest.approx(2.1 / 2.8, abs=1e-4)
    assert result["busiest_cpu_share"] == pytest.approx(4.0 / 2.8, abs=1e-4)
    assert result["proxy_cpu_share"] == pytest.approx(0.5 / 2.8, abs=1e-4)
    assert result["bytes_per_token"] == {
        "hop_forth": 1000,
        "hop_back": 2000,
        "coordinator_up": 1.0,
        "coordinator_down": 2.0,
    }


def test_link_rates_follow_from_bytes_and_compute() -> None:
    """1 ms of computing a token here, so 0.1 ms on a node ten times as fast."""
    result = needed(JOB, 10)
    assert result["hidden"] == pytest.approx(8e-6 * 2000 / (1e-4 / 0.95), abs=0.1)
    # Both ways of the hop, and half of what all links to the coordinator carry, within a nineteenth of the time.
    assert result["unhidden"] == pytest.approx(8e-6 * 3001.5 / (1e-4 / 19), abs=1.0)
    assert result["step_s"] == 0.1
    assert result["tokens_for_delay"] == 40_000
