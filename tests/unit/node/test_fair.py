from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from node.fair import FairClock


def test_a_client_that_asks_for_much_waits_behind_one_that_asks_for_little() -> None:
    clock = FairClock()
    greedy = [clock.start("greedy", 100) for _ in range(5)]
    modest = [clock.start("modest", 10) for _ in range(5)]
    assert max(modest) < greedy[1]


def test_an_idle_client_gains_no_credit() -> None:
    clock = FairClock()
    for _ in range(10):
        clock.began(clock.start("busy", 10))
    assert clock.start("late", 10) >= 90


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 50)), max_size=60))
def test_clients_that_always_wait_get_equal_shares(asks: list[tuple[str, int]]) -> None:
    clock = FairClock()
    queue = [(clock.start(client, cost), number, client, cost) for number, (client, cost) in enumerate(asks)]
    served = dict.fromkeys("abc", 0)
    waiting = {c: sum(cost for client, cost in asks if client == c) for c in "abc"}
    largest = max([cost for _, cost in asks], default=0)
    for start, _, client, cost in sorted(queue):
        clock.began(start)
        served[client] += cost
        backlogged = [c for c in "abc" if served[c] < waiting[c]]
        for one in backlogged:
            for other in backlogged:
                assert served[one] - served[other] <= 2 * largest
