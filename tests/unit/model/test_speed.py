"""Which scheme a node holds, from bytes and measured speeds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import OutOfMemory
from swarm.model.quantize import SCHEMES, Scheme
from swarm.model.speed import ROWS, Speeds, measure, pick_scheme

BYTES: dict[Scheme, int] = {"none": 400, "int8": 100, "int4": 62}


def speeds(int8_gain: float, int8_gain_many: float = 1.0) -> Speeds:
    gain = {1: int8_gain, 8: int8_gain_many, 64: int8_gain_many}
    int8 = {rows: 1 / gain[rows] for rows in ROWS}
    plain = dict.fromkeys(ROWS, 1.0)
    return Speeds("cpu", "float32", {"none": plain, "int8": int8, "int4": plain})


@pytest.mark.parametrize(
    ("budget", "gain", "gain_many", "chosen"),
    [
        (1000, 2.0, 1.2, "int8"),
        (1000, 2.0, 0.5, "none"),
        (1000, 1.1, 1.1, "none"),
        (399, 1.1, 0.2, "int8"),
        (100, 0.5, 0.5, "int8"),
        (99, 2.0, 2.0, "int4"),
        (62, 2.0, 2.0, "int4"),
    ],
)
def test_exact_if_it_fits_unless_int8_is_faster(budget: int, gain: float, gain_many: float, chosen: Scheme) -> None:
    assert pick_scheme(BYTES, budget, speeds(gain, gain_many)) == chosen


def test_what_must_not_be_used_is_left_out() -> None:
    assert pick_scheme({"none": 400}, 400, speeds(9.0)) == "none"
    with pytest.raises(OutOfMemory, match="400 bytes"):
        pick_scheme({"none": 400}, 399, speeds(9.0))
    with pytest.raises(OutOfMemory, match="62 bytes"):
        pick_scheme(BYTES, 61, speeds(9.0))


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.integers(62, 1000), st.floats(0.1, 10), st.floats(0.1, 10))
def test_the_choice_always_fits(budget: int, gain: float, gain_many: float) -> None:
    assert BYTES[pick_scheme(BYTES, budget, speeds(gain, gain_many))] <= budget


def test_every_scheme_is_timed_at_every_number_of_rows() -> None:
    found = measure(torch.device("cpu"), torch.float32)
    assert set(found.gigaweight_s) == set(SCHEMES)
    assert all(tuple(times) == ROWS and min(times.values()) > 0 for times in found.gigaweight_s.values())
    assert found.gain("none", 1) == 1.0
