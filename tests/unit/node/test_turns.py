"""1F1B: what a stage runs, in which order, and how many graphs it keeps."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.turns import Room, Turns, Window, auto_microbatches, window


def order(microbatches: int, window: Window) -> list[tuple[str, int]]:
    """What a stage with memory for the least window runs when nothing else keeps it waiting."""
    turns, found = Turns(window), list[tuple[str, int]]()
    while turns.backwards < microbatches:
        if turns.forwards < microbatches and turns.may_forward(lambda: False):
            found.append(("forward", turns.forwards))
            turns = turns.forward()
        else:
            found.append(("backward", turns.backwards))
            turns = turns.backward()
    return found


def shown(microbatches: int, window: Window) -> str:
    return " ".join(f"{kind[0].upper()}{number}" for kind, number in order(microbatches, window))


def test_the_order_by_distance_from_the_loss() -> None:
    # Two nodes: the lead, the second node, and the head on the lead as the third stage.
    assert shown(4, window(2, 0)) == "F0 F1 F2 B0 F3 B1 B2 B3"
    assert shown(4, window(2, 1)) == "F0 F1 B0 F2 B1 F3 B2 B3"
    assert shown(4, window(1, 0)) == "F0 B0 F1 B1 F2 B2 F3 B3"
    assert shown(2, window(5, 0)) == "F0 F1 B0 B1"


@given(st.integers(1, 40), st.integers(1, 12), st.data())
def test_each_pass_once_in_order_with_bounded_graphs(microbatches: int, nodes: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, nodes - 1))
    of_node = window(nodes, index)
    most = of_node.least
    held, seen = 0, {"forward": 0, "backward": 0}
    for kind, number in order(microbatches, of_node):
        assert number == seen[kind]
        seen[kind] += 1
        held += 1 if kind == "forward" else -1
        assert 0 <= held <= most
    assert seen == {"forward": microbatches, "backward": microbatches}
    passes = [kind for kind, _ in order(microbatches, of_node)]
    warm_up = min(most, microbatches)
    steady = 2 * (microbatches - warm_up)
    assert passes[:warm_up] == ["forward"] * warm_up
    assert passes[warm_up : warm_up + steady] == ["backward", "forward"] * (microbatches - warm_up)
    assert set(passes[warm_up + steady :]) == {"backward"}


def test_a_pass_out_of_turn_is_refused() -> None:
    turns = Turns(Window(1, 1)).forward()
    assert not turns.may_forward(lambda: True)
    with pytest.raises(ValueError, match="wait for their gradients"):
        turns.forward()
    with pytest.raises(ValueError, match="no microbatch"):
        turns.backward().backward()
    with pytest.raises(ValueError, match="no node 2"):
        window(2, 2)


@given(st.integers(1, 8), st.integers(0, 8), st.lists(st.sampled_from(["roomy", "short", "back"]), max_size=60))
def test_memory_decides_between_the_least_and_the_most(least: int, more: int, events: list[str]) -> None:
    turns = Turns(Window(least, least + more))
    for event in events:
        if event == "back":
            turns = turns.backward() if turns.held else turns
            continue
        roomy = event == "roomy"
        may = turns.may_forward(lambda roomy=roomy: roomy)  # type: ignore[misc]
        assert may == (turns.held < least or (roomy and turns.held < least + more))
        turns = turns.forward() if may else turns
    assert 0 <= turns.held <= least + more


def test_a_node_alone_keeps_one_graph_and_a_chain_twice_what_stands_before_the_loss() -> None:
    assert window(1, 0) == Window(1, 1)
    assert [window(3, index) for index in range(3)] == [Window(4, 8), Window(3, 6), Window(2, 4)]


async def test_a_stage_waits_for_a_gradient_where_memory_is_short() -> None:
    room, short = Room(Window(1, 2)), True
    await room.forward(lambda: not short)
    second = asyncio.create_task(room.forward(lambda: not short))
    await asyncio.sleep(0)
    assert (room.held, second.done()) == (1, False)
    await room.backward()
    await second
    assert room.held == 1
    await room.forward(lambda: short)
    assert room.held == 2


def test_how_many_microbatches_a_job_has_by_default() -> None:
    assert [auto_microbatches(nodes, 8, 2000, "cpu") for nodes in (2, 3, 8)] == [4, 6, 8]


def test_on_a_node_alone_they_are_as_small_as_costs_nothing() -> None:
    assert [auto_microbatches(1, 8, tokens, "cpu") for tokens in (100, 600, 2000, 9000)] == [1, 2, 7, 8]
    assert [auto_microbatches(1, 8, tokens, "cuda") for tokens in (2000, 9000)] == [1, 2]
