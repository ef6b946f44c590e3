"""Which pipelines go on into the next round, and how their time is counted."""

from __future__ import annotations

from coordinator.overlap import continued, credited
from coordinator.placement import Member
from coordinator.round_model import Pipeline, Rules
from swarm.ids import Span

RULES = Rules(3, None, 1, 3, inner_steps=10, overlap_steps=5)
A, B, C = Member("a", Span(0, 2)), Member("b", Span(2, 4)), Member("c", Span(0, 4))


def test_the_same_nodes_in_the_same_order_go_on() -> None:
    before = [Pipeline(0, 1, (A, B)), Pipeline(1, 1, (C,))]
    formed = [Pipeline(0, 1, (C,)), Pipeline(1, 1, (B, A)), Pipeline(2, 1, (A, B))]
    assert continued(before, formed) == ((0, 1), (2, 0))


def test_a_round_counts_from_when_the_pipeline_began_it() -> None:
    """Whole at 100 s after 40 s; the next round is formed at 108 s, or at 150 s when others were slow."""
    before = Pipeline(0, 1, (A, B), took_s=40.0, whole_s=100.0)
    soon, late = (credited([before], [Pipeline(0, 1, (A, B), formed_s=at)], RULES)[0] for at in (108.0, 150.0))
    assert soon.formed_s == 100.0
    # Five of ten steps take half of 40 s, however long it waited after them.
    assert late.formed_s == 130.0


def test_who_starts_anew_counts_from_the_forming() -> None:
    before = Pipeline(0, 1, (A, B), took_s=40.0, whole_s=100.0)
    (other,) = credited([before], [Pipeline(0, 1, (C,), formed_s=108.0)], RULES)
    assert other.formed_s == 108.0
    # After a restart nobody knows when the pipeline was whole.
    (same,) = credited([Pipeline(0, 1, (A, B))], [Pipeline(0, 1, (A, B), formed_s=108.0)], RULES)
    assert same.formed_s == 108.0
