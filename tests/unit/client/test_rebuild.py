"""Rebuilding plans against a simulation of hops that hold columns and logs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from swarm.client.rebuild import Fill, Held, plan_fills, resume_at


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[Held], int]:
    end = draw(st.integers(0, 40))
    hops = []
    for _ in range(draw(st.integers(1, 6))):
        columns = draw(st.sampled_from([0, end, end + 3, draw(st.integers(0, 45))]))
        hops.append(Held(columns, draw(st.integers(0, columns))))
    return hops, end


def _apply(hops: list[Held], fill: Fill) -> list[int]:
    """What every hop holds after a fill, if hops behave as `node.hop_serve` says."""
    held = [hop.columns for hop in hops]
    source = 0 if fill.from_client else fill.first
    for index in range(source, fill.last + 1):
        assert held[index] >= fill.start, "a step that does not follow"
        held[index] = fill.end
    return held


@given(chains())
def test_fills_leave_every_hop_with_all_columns(case: tuple[list[Held], int]) -> None:
    hops, end = case
    for fill in plan_fills(hops, end):
        if not fill.from_client:
            before = hops[fill.first - 1]
            assert before.columns >= end
            assert before.logged_from <= fill.start
        hops = [Held(c, h.logged_from) for c, h in zip(_apply(hops, fill), hops, strict=True)]
    assert all(hop.columns >= end for hop in hops)


@given(chains())
def test_nothing_is_sent_to_hops_that_lack_nothing(case: tuple[list[Held], int]) -> None:
    hops, end = case
    for fill in plan_fills(hops, end):
        assert all(hop.columns < end for hop in hops[fill.first : fill.last + 1])


def test_a_replaced_hop_is_filled_by_its_neighbour() -> None:
    assert plan_fills([Held(9, 0), Held(0, 0), Held(9, 9)], 9) == [Fill(1, 1, 0, 9, from_client=False)]


def test_without_a_log_the_client_replays() -> None:
    assert plan_fills([Held(9, 5), Held(0, 0)], 9) == [Fill(1, 1, 0, 9, from_client=True)]


def test_a_prompt_goes_on_where_the_surviving_hops_are() -> None:
    assert resume_at([Held(256, 0), Held(0, 0), Held(128, 0)], 0, 300) == 128
    assert resume_at([Held(0, 0), Held(0, 0)], 0, 300) == 0
    assert resume_at([Held(301, 0), Held(0, 0)], 0, 300) == 300
