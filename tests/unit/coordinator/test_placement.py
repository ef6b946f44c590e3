"""Placement: what a pipeline is, how many there can be, and why a node is left over."""

from __future__ import annotations

from itertools import combinations, permutations

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.placement import Member, Placement, form_pipelines
from swarm.ids import Span


def _nodes(**spans: str) -> list[Member]:
    return [Member(peer, Span.parse(span)) for peer, span in spans.items()]


def _shown(placement: Placement) -> list[str]:
    return [" ".join(f"{m.peer}:{m.span}" for m in p.members) for p in placement.pipelines]


def test_overlapping_spans_are_trimmed() -> None:
    assert _shown(form_pipelines(_nodes(a="0:20", b="10:30"), 30)) == ["a:0:20 b:20:30"]


def test_a_node_that_holds_everything_is_a_pipeline() -> None:
    placement = form_pipelines(_nodes(a="0:15", b="15:30", c="0:30"), 30)
    assert _shown(placement) == ["c:0:30", "a:0:15 b:15:30"]
    assert placement.unused == {}


def test_a_short_chain_is_given_up_for_more_pipelines() -> None:
    # The shortest chain, a b, would leave c and d without a way to join.
    nodes = _nodes(a="0:20", b="10:30", c="0:10", d="20:30")
    assert _shown(form_pipelines(nodes, 30)) == ["a:0:20 d:20:30", "c:0:10 b:10:30"] or _shown(
        form_pipelines(nodes, 30)
    ) == ["c:0:10 b:10:30", "a:0:20 d:20:30"]


def test_left_over_nodes_have_a_reason() -> None:
    placement = form_pipelines(_nodes(a="0:10", b="10:30", c="0:10", d="0:40"), 30)
    assert _shown(placement) == ["a:0:10 b:10:30"]
    assert placement.unused == {
        "c": "no idle node holds blocks 10-29, which another pipeline would need",
        "d": "its span 0:40 ends beyond the model's 30 blocks",
    }


def test_nobody_there() -> None:
    placement = form_pipelines([], 2)
    assert (placement.pipelines, placement.missing) == ((), "no idle node holds blocks 0-1")


def _spans(n_blocks: int) -> st.SearchStrategy[Span]:
    ends = st.tuples(st.integers(0, n_blocks), st.integers(0, n_blocks)).filter(lambda e: e[0] != e[1])
    return ends.map(lambda e: Span(min(e), max(e)))


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(spans=st.lists(_spans(6), max_size=12), order=st.randoms(use_true_random=False))
def test_pipelines_are_disjoint_and_whole(spans: list[Span], order: object) -> None:
    nodes = [Member(f"n{number:02}", span) for number, span in enumerate(spans)]
    placement = form_pipelines(nodes, 6)
    held = {node.peer: node.span for node in nodes}
    used = [member.peer for pipeline in placement.pipelines for member in pipeline.members]
    assert len(used) == len(set(used))
    assert set(used) | set(placement.unused) == set(held)
    assert not set(used) & set(placement.unused)
    for pipeline in placement.pipelines:
        assert [m.span.start for m in pipeline.members] == [0, *(m.span.end for m in pipeline.members[:-1])]
        assert pipeline.members[-1].span.end == 6
        assert all(held[member.peer].covers(member.span) for member in pipeline.members)
    shuffled = list(nodes)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    assert form_pipelines(shuffled, 6) == placement


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(spans=st.lists(_spans(4), max_size=6))
def test_as_many_pipelines_as_possible_of_as_few_nodes_as_possible(spans: list[Span]) -> None:
    nodes = [Member(f"n{number}", span) for number, span in enumerate(spans)]
    placement = form_pipelines(nodes, 4)
    used = sum(len(pipeline.members) for pipeline in placement.pipelines)
    assert (-len(placement.pipelines), used) == _best(nodes, 4)


def _best(nodes: list[Member], n_blocks: int) -> tuple[int, int]:
    """By trying everything: the most pipelines, then the fewest nodes."""
    chains = [
        frozenset(member.peer for member in chain)
        for size in range(1, len(nodes) + 1)
        for chain in permutations(nodes, size)
        if _covers(chain, n_blocks)
    ]
    # Only chains that no other one is part of matter.
    minimal = [c for c in set(chains) if not any(other < c for other in set(chains))]
    best = (0, 0)
    for count in range(1, len(nodes) + 1):
        for group in combinations(minimal, count):
            size = len(frozenset().union(*group))
            if size == sum(len(chain) for chain in group):
                best = min(best, (-count, size))
    return best


def _covers(chain: tuple[Member, ...], n_blocks: int) -> bool:
    covered = 0
    for member in chain:
        if not member.span.start <= covered < member.span.end:
            return False
        covered = member.span.end
    return covered == n_blocks
