"""Which of two computing threads may compute: the one that serves, or the one that trains.

One at a time, as one device has it. Serving comes first wherever training stops to ask (`give_way`, between
layers of a microbatch), but training keeps its share: after a piece of serving that takes d seconds of late it may
compute for d * share / (1 - share) seconds before the next, to the nearest layer, if it has anything to compute.
So neither waits for much longer than the other has just had: with a share of one half, what is served while
the node trains takes about twice as long, and training takes about twice as long too.

Nothing is carried over: a side that had nothing to do does not catch up later.
"""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable

TRAINING_SHARE = 0.57
"""Unless told: either side takes about twice as long as alone while both have work. More than half, because training
computes more slowly in turns than alone, and who is served has other things to wait for (ADR 9)."""
_LATELY_S = 1.0
_ALIKE, _SMOOTHING = 1.5, 8
"""Pieces of serving within this factor of the usual one are alike: one that happened to take long does not make
training's turn after it long, too. The usual one is a mean over about so many."""


class Side(enum.Enum):
    SERVE = "serve"
    TRAIN = "train"


class Baton:
    """Held by whoever computes. All methods may be called from any thread."""

    def __init__(
        self,
        training_share: float = TRAINING_SHARE,
        settle: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`settle`: waits until the device has done what was asked of it, where asking returns at once. It is
        called between layers only while somebody is served. Raises ValueError for a share outside [0, 1)."""
        if not 0.0 <= training_share < 1.0:
            raise ValueError(f"a share of training lies in [0, 1), not at {training_share}")
        self._owed_ratio = training_share / (1.0 - training_share)
        self._settle = settle
        self._clock = clock
        self._changed = threading.Condition()
        self._holder: Side | None = None
        self._wants = dict.fromkeys(Side, False)
        self._since_s = 0.0
        """When the holder's time was counted last."""
        self._asked_s = 0.0
        self._stretch_s = 0.0
        """When training asked last whether to give way, and how long it had computed since the time before: the
        best guess at how long it will until the next."""
        self._owed_s = 0.0
        """What training may still compute before serving goes on."""
        self._served_s = -_LATELY_S
        """When serving computed last."""
        self._usual_s = 0.0
        """What a piece of serving takes of late."""

    def waits(self, side: Side) -> bool:
        """Whether a side waits for the baton."""
        return self._wants[side]

    def take(self, side: Side) -> None:
        """Wait for the baton."""
        with self._changed:
            self._wants[side] = True
            self._changed.wait_for(lambda: self._may(side))
            self._hold(side)

    def give(self) -> None:
        """The holder is done for now."""
        with self._changed:
            self._count()
            self._release()

    def give_way(self) -> None:
        """Training only, from any thread that computes for it: let serving go first if it waits and its time
        has come. Returns once training may go on."""
        if self._settle is not None and self._served_lately():
            self._settle()
        now_s = self._clock()
        self._stretch_s, self._asked_s = now_s - self._asked_s, now_s
        if not self._wants[Side.SERVE]:  # read without the lock: this is asked a few hundred times a pass
            return
        with self._changed:
            self._count()
            if self._owed_s > self._stretch_s / 2 or not self._wants[Side.SERVE]:
                return
            self._owed_s = 0.0
            self._wants[Side.TRAIN] = True
            self._release()
            self._changed.wait_for(lambda: self._may(Side.TRAIN))
            self._hold(Side.TRAIN)

    def _may(self, side: Side) -> bool:
        if self._holder is not None:
            return False
        if side is Side.SERVE:
            return self._owed_s <= 0.0 or not self._wants[Side.TRAIN]
        return self._owed_s > 0.0 or not self._wants[Side.SERVE]

    def _hold(self, side: Side) -> None:
        self._wants[side] = False
        self._holder = side
        self._since_s = self._asked_s = self._clock()

    def _release(self) -> None:
        self._holder = None
        self._changed.notify_all()

    def _count(self) -> None:
        now_s = self._clock()
        took_s = now_s - self._since_s
        self._since_s = now_s
        if self._holder is Side.SERVE:
            alike = self._usual_s / _ALIKE < took_s < self._usual_s * _ALIKE
            self._usual_s = self._usual_s + (took_s - self._usual_s) / _SMOOTHING if alike else took_s
            self._owed_s = self._usual_s * self._owed_ratio
            self._served_s = now_s
        else:
            self._owed_s = max(0.0, self._owed_s - took_s)

    def _served_lately(self) -> bool:
        return self._wants[Side.SERVE] or self._clock() - self._served_s < _LATELY_S
