"""Serving and training take turns: serving first, training never below its share."""

from __future__ import annotations

import threading

import pytest

from swarm.baton import Baton, Side


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Serving:
    """A thread that takes the baton once, computes for `seconds` of the clock, and gives it back."""

    def __init__(self, baton: Baton, clock: Clock, seconds: float) -> None:
        self.served = threading.Event()
        self._baton, self._clock, self._seconds = baton, clock, seconds
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        self._baton.take(Side.SERVE)
        self._clock.now_s += self._seconds
        self.served.set()  # before: the trainer goes on with the next line
        self._baton.give()

    def asks(self) -> None:
        """Until the thread waits for the baton."""
        while not self._baton.waits(Side.SERVE):
            pass


def test_serving_goes_first_where_training_gives_way() -> None:
    clock = Clock()
    baton = Baton(0.5, clock=clock)
    baton.take(Side.TRAIN)
    serving = Serving(baton, clock, 1.0)
    serving.asks()
    assert not serving.served.is_set()
    baton.give_way()
    assert serving.served.is_set()
    baton.give()


@pytest.mark.parametrize(("share", "owed_s"), [(0.5, 2.0), (0.75, 6.0), (0.2, 0.5)])
def test_training_gets_its_share_before_serving_goes_on(share: float, owed_s: float) -> None:
    clock = Clock()
    baton = Baton(share, clock=clock)
    baton.take(Side.TRAIN)
    first = Serving(baton, clock, 2.0)
    first.asks()
    baton.give_way()
    second = Serving(baton, clock, 2.0)
    second.asks()
    for _ in range(9):  # layers of a tenth of that; the last one ends nearest to what is owed
        clock.now_s += owed_s / 10.01
        baton.give_way()
        assert not second.served.is_set()
    clock.now_s += owed_s / 10.01
    baton.give_way()
    assert second.served.wait(5)
    baton.give()


def test_a_piece_that_happens_to_take_long_does_not_lengthen_trainings_turn() -> None:
    clock = Clock()
    baton = Baton(0.5, clock=clock)
    baton.take(Side.TRAIN)
    turns = []
    for seconds in (2.0, 2.0, 2.8, 2.0, 10.0, 10.0):
        serving = Serving(baton, clock, seconds)
        serving.asks()
        began_s = clock.now_s
        baton.give_way()
        while not serving.served.is_set():
            clock.now_s += 0.01
            baton.give_way()
        turns.append(clock.now_s - seconds - began_s)
    baton.give()
    # Each turn follows the piece before it: of another kind are only the first and those of 10 seconds.
    assert turns == pytest.approx([0.0, 2.0, 2.0, 2.1, 2.1 - 0.1 / 8, 10.0], abs=0.02)


def test_serving_does_not_wait_for_training_that_has_nothing_to_do() -> None:
    clock = Clock()
    baton = Baton(0.5, clock=clock)
    for _ in range(2):
        serving = Serving(baton, clock, 1.0)
        assert serving.served.wait(5)


def test_a_device_that_computes_later_settles_only_while_somebody_is_served() -> None:
    clock = Clock()
    settled: list[float] = []
    baton = Baton(0.5, settle=lambda: settled.append(clock.now_s), clock=clock)
    baton.take(Side.TRAIN)
    baton.give_way()
    assert not settled
    serving = Serving(baton, clock, 1.0)
    serving.asks()
    baton.give_way()
    baton.give_way()
    assert settled == [0.0, 1.0]
    clock.now_s += 10
    baton.give_way()
    assert len(settled) == 2
    baton.give()


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError):
        Baton(share)
