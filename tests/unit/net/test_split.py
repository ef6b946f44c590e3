"""Where overlapping spans are cut: the slowest stage as fast as can be, the head counted on the lead."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import SpanError
from swarm.ids import Span
from swarm.net.split import choose_cuts


def cuts(held: str, head_blocks: float) -> str:
    return " ".join(str(span) for span in choose_cuts([Span.parse(text) for text in held.split()], head_blocks))


def test_the_lead_holds_fewer_blocks_for_the_head_it_runs() -> None:
    assert cuts("0:30 0:30", 0.0) == "0:15 15:30"
    assert cuts("0:30 0:30", 6.0) == "0:12 12:30"
    assert cuts("0:30 0:30 0:30", 6.0) == "0:6 6:18 18:30"
    assert cuts("0:30 0:30", 100.0) == "0:1 1:30"


def test_speeds_and_allowed_places_count() -> None:
    both = [Span(0, 30), Span(0, 30)]
    assert choose_cuts(both, 6.0, [2.0, 1.0]) == [Span(0, 6), Span(6, 30)]
    assert choose_cuts(both, 6.0, allowed={10, 15, 20}) == [Span(0, 10), Span(10, 30)]
    # The ends of what nodes hold are possible whatever is allowed.
    assert choose_cuts([Span(0, 17), Span(17, 30)], 0.0, allowed={15}) == [Span(0, 17), Span(17, 30)]
    assert choose_cuts([Span(0, 31), Span(0, 31)], 0.0) == [Span(0, 16), Span(16, 31)]


def test_nobody_runs_what_it_does_not_hold() -> None:
    assert cuts("0:20 18:30", 6.0) == "0:18 18:30"
    assert cuts("0:15 15:30", 6.0) == "0:15 15:30"
    assert cuts("0:30", 6.0) == "0:30"
    for held in ("1:30", "0:10 11:30", "0:1 0:1"):
        with pytest.raises(SpanError):
            cuts(held, 0.0)


@given(st.integers(2, 9), st.data())
def test_no_other_cut_has_a_faster_slowest_stage(n_blocks: int, data: st.DataObject) -> None:
    nodes = data.draw(st.integers(1, min(4, n_blocks)))
    edges = sorted(data.draw(st.sets(st.integers(1, n_blocks - 1), min_size=nodes - 1, max_size=nodes - 1)))
    bounds = list(pairwise([0, *edges, n_blocks]))
    held = [
        Span(data.draw(st.integers(0, start)), n_blocks if end == n_blocks else data.draw(st.integers(end, n_blocks)))
        for start, end in bounds
    ]
    held[0] = Span(0, held[0].end)
    head = data.draw(st.sampled_from([0.0, 1.5, 4.0]))
    found = choose_cuts(held, head)
    assert [s.start for s in found] == [0, *(s.end for s in found[:-1])]
    assert found[-1].end == n_blocks
    assert all(own.covers(span) for own, span in zip(held, found, strict=True))

    def slowest(at: tuple[int, ...]) -> float:
        return max(b - a + (head if a == 0 else 0.0) for a, b in pairwise((0, *at, n_blocks)))

    possible = [
        at
        for at in product(range(1, n_blocks), repeat=nodes - 1)
        if all(a < b for a, b in pairwise((0, *at, n_blocks)))
        and all(h.start <= a and b <= h.end for h, (a, b) in zip(held, pairwise((0, *at, n_blocks)), strict=True))
    ]
    assert slowest(tuple(s.end for s in found[:-1])) == min(slowest(at) for at in possible)
