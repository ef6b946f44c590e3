"""Placement: what a pipeline is, how many there can be, and why a node is left over."""

from __future__ import annotations

from itertools import combinations, permutations

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.placement import Member, Placement, Traits, form_pipelines
from swarm.ids import Span


def _nodes(**spans: str) -> list[Member]:
    return [Member(peer, Span.parse(span)) for peer, span in spans.items()]


def _shown(placement: Placement) -> list[str]:
    return [" ".join(f"{m.peer}:{m.span}" for m in p.members) for p in placement.pipelines]


def test_overlapping_spans_are_cut_in_the_middle_if_nothing_is_known() -> None:
    assert _shown(form_pipelines(_nodes(a="0:20", b="10:30"), 30)) == ["a:0:15 b:15:30"]
    assert _shown(form_pipelines(_nodes(a="0:20", b="18:30"), 30)) == ["a:0:18 b:18:30"]


def test_the_cut_is_where_the_slower_stage_is_fastest() -> None:
    traits = {"a": Traits(token_block_s=1.0), "b": Traits(token_block_s=2.0)}
    nodes = _nodes(a="0:28", b="10:30")
    assert _shown(form_pipelines(nodes, 30, traits)) == ["a:0:20 b:20:30"]
    # A third one that overlaps both sides, ten times as fast.
    traits["c"] = Traits(token_block_s=0.1)
    nodes = _nodes(a="0:10", c="4:28", b="20:30")
    assert _shown(form_pipelines(nodes, 30, traits)) == ["a:0:4 c:4:28 b:28:30"]


def test_the_cut_is_where_the_family_allows_it() -> None:
    nodes = _nodes(a="0:20", b="10:30")
    assert _shown(form_pipelines(nodes, 30, cuts=(0, 5, 11, 18, 30))) == ["a:0:18 b:18:30"]


def test_who_did_not_measure_counts_as_average() -> None:
    traits = {"a": Traits(token_block_s=1.0), "z": Traits(token_block_s=3.0)}
    nodes = _nodes(a="0:28", b="2:30")
    assert _shown(form_pipelines(nodes, 30, traits)) == ["a:0:20 b:20:30"]


def test_steady_nodes_lead_and_fast_ones_take_part() -> None:
    traits = {
        "a": Traits(uptime_s=30.0, token_block_s=0.1),
        "b": Traits(uptime_s=7200.0, token_block_s=0.3),
        "c": Traits(uptime_s=7300.0, token_block_s=0.2),
        "x": Traits(token_block_s=0.9),
        "y": Traits(token_block_s=0.1),
    }
    placement = form_pipelines(_nodes(a="0:15", b="0:15", c="0:15", x="15:30", y="15:30"), 30, traits)
    # Two pipelines: the two steady ones lead, the faster of them with the faster stage.
    assert _shown(placement) == ["c:0:15 y:15:30", "b:0:15 x:15:30"]
    assert set(placement.unused) == {"a"}


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    spans=st.lists(st.tuples(st.integers(0, 7), st.integers(1, 8)), min_size=1, max_size=3),
    seconds=st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=3, max_size=3),
)
def test_no_other_cut_makes_the_slowest_stage_faster(spans: list[tuple[int, int]], seconds: list[float]) -> None:
    nodes = [Member(f"n{i}", Span(start, end)) for i, (start, end) in enumerate(spans) if start < end]
    traits = {f"n{i}": Traits(token_block_s=seconds[i]) for i in range(3)}
    for pipeline in form_pipelines(nodes, 8, traits).pipelines:
        held = [next(node.span for node in nodes if node.peer == member.peer) for member in pipeline.members]
        speeds = [traits[member.peer].token_block_s for member in pipeline.members]
        best = min(
            max(speed * (end - start) for speed, start, end in zip(speeds, (0, *cut), (*cut, 8), strict=True))
            for cut in combinations(range(1, 8), len(held) - 1)
            if all(s.start <= a and b <= s.end for s, a, b in zip(held, (0, *cut), (*cut, 8), strict=True))
        )
        found = max(speed * len(member.span) for speed, member in zip(speeds, pipeline.members, strict=True))
        assert found == best


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
