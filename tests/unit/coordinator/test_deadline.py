"""Deadlines that follow the volunteers: generous at first, a multiple of the median, doubled after a failure."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.deadline import FIRST_S, grace_s, limit_s, quorum_of

TIMES = st.lists(st.floats(0.1, 1e5), min_size=1, max_size=40)


def test_the_first_round_is_given_time() -> None:
    assert limit_s(None, (), 0) == FIRST_S


def test_a_fixed_deadline_is_what_the_file_says() -> None:
    assert limit_s(7.0, (100.0, 200.0), 3) == 7.0


def test_it_is_three_times_the_median_and_one_straggler_does_not_stretch_it() -> None:
    assert limit_s(None, (100.0, 110.0, 90.0, 5000.0), 0) == pytest.approx(3 * 105.0)


def test_only_recent_times_count() -> None:
    assert limit_s(None, (1000.0,) * 16 + (100.0,) * 16, 0) == 300.0


def test_quick_rounds_keep_a_floor_and_failures_double_it() -> None:
    assert [limit_s(None, (0.1,), attempt) for attempt in (0, 1, 2)] == [30.0, 60.0, 120.0]
    assert limit_s(None, (1e5,), 10_000) == 24 * 3600.0


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(times=TIMES, attempt=st.integers(0, 5))
def test_it_grows_with_every_attempt_and_half_of_the_pipelines_fit(times: list[float], attempt: int) -> None:
    limit = limit_s(None, times, attempt)
    assert limit <= limit_s(None, times, attempt + 1)
    recent = times[-16:]
    if max(recent) * 3 <= 24 * 3600:
        assert sum(time <= limit for time in recent) * 2 >= len(recent)


def test_a_quorum_is_a_share_rounded_up() -> None:
    assert [quorum_of(0.75, formed) for formed in (1, 2, 3, 4, 8)] == [1, 2, 3, 3, 6]
    assert quorum_of(0.7, 10) == 7
    assert quorum_of(1.0, 3) == 3
    assert quorum_of(0.01, 3) == 1


def test_the_grace_follows_the_spread() -> None:
    assert grace_s(()) == 5.0
    assert grace_s((10.0, 10.0)) == 5.0
    assert grace_s((100.0, 100.0, 100.0)) == 20.0
    assert grace_s((100.0, 140.0, 160.0)) == 90.0
