"""The inner learning rate: warm-up, then constant, linear or cosine, by the job's global step."""

from __future__ import annotations

import pytest

from swarm.config import InnerSettings
from swarm.optim.schedule import global_step, learning_rate


def test_steps_count_over_rounds() -> None:
    assert [global_step(1, 20, 0), global_step(1, 20, 19), global_step(3, 20, 5)] == [0, 19, 45]


def test_warm_up_ends_at_the_full_rate() -> None:
    inner = InnerSettings(lr=1.0, warmup_steps=3)
    assert [learning_rate(inner, step, 100) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_without_warm_up_it_is_constant() -> None:
    inner = InnerSettings(lr=0.3)
    assert {learning_rate(inner, step, 10) for step in range(20)} == {0.3}


def test_it_decays_to_zero_at_the_end_of_the_job() -> None:
    linear = InnerSettings(lr=1.0, decay="linear")
    assert [learning_rate(linear, step, 10) for step in (0, 5, 10, 99)] == [1.0, 0.5, 0.0, 0.0]
    cosine = InnerSettings(lr=1.0, decay="cosine", warmup_steps=10)
    rates = [learning_rate(cosine, step, 110) for step in (0, 10, 60, 110)]
    assert rates == pytest.approx([1 / 11, 1.0, 0.5, 0.0])
