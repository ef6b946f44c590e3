"""The cheapest chain of workers over a row of blocks: the search behind routing, on plain arrays.

In: what each worker asks for each block, for being entered first, entered at all and left last, and
what the links between workers cost. Out: pieces (worker, start, end) that meet and cover every
block, each worker at most once. Never reads the swarm, the clock or a random source.

Dynamic programming over blocks: the state is the worker that computes the block, so that a worker may
be entered in the middle of its span and left before its end. Most links cost the same guess, so a step
costs one pass over the workers and a look at the few links that were measured. A walk that comes back
to a worker is legal for that recurrence but not for a chain; such walks are split into the cases that
forbid them (branch and bound), which keeps the answer exact.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]
Piece = tuple[int, int, int]
"""(worker, first block, block after the last)."""
_MAX_SPLITS = 200


class Links:
    """Measured links between workers, the same in both directions; all others cost `guess_s`."""

    def __init__(self, workers: int, pairs: Sequence[tuple[int, int, float]], factor: float = 1.0) -> None:
        """`pairs`: (worker, other worker, seconds); of a pair that occurs twice, the smaller counts.

        `factor` turns the pairs' seconds into those of a link: one half for round trips.
        """
        self.workers = workers
        one, two, seconds = zip(*pairs, strict=True) if pairs else ((), (), ())
        a, b = np.array(one, dtype=np.intp), np.array(two, dtype=np.intp)
        cost_s = np.array(seconds, dtype=np.float64) * factor
        key = np.concatenate((a * workers + b, b * workers + a))
        cost_s = np.concatenate((cost_s, cost_s))
        order = np.lexsort((cost_s, key))
        key, cost_s = key[order], cost_s[order]
        first = np.ones(len(key), dtype=bool)
        first[1:] = key[1:] != key[:-1]
        key, cost_s = key[first], cost_s[first]
        source, other = np.divmod(key, workers)
        real = source != other
        source, self._other, self._cost_s = source[real], other[real], cost_s[real]
        self._from = np.searchsorted(source, np.arange(workers + 1))
        self._source = source

    def of(self, worker: int) -> tuple[Ints, Floats]:
        """The workers it has a measured link to, and what each costs."""
        part = slice(self._from[worker], self._from[worker + 1])
        return self._other[part], self._cost_s[part]

    def faster_than(self, guess_s: float) -> tuple[Ints, Floats, Floats]:
        """Links below the guess as padded rows (others [N, K], cost [N, K]), and each worker's best gain [N]."""
        fast = np.flatnonzero(self._cost_s < guess_s)
        source = self._source[fast]
        starts = np.searchsorted(source, np.arange(self.workers + 1))
        width = int(np.diff(starts).max(initial=0))
        column = np.arange(len(fast)) - starts[source]
        others = np.zeros((self.workers, width), dtype=np.intp)
        cost_s = np.full((self.workers, width), np.inf)
        others[source, column] = self._other[fast]
        cost_s[source, column] = self._cost_s[fast]
        return others, cost_s, guess_s - cost_s.min(axis=1, initial=np.inf)


@dataclass(frozen=True)
class Problem:
    """What the search needs. All costs are in seconds and not negative."""

    block_s_BN: Floats
    """What worker n takes for block b; inf where it does not hold it."""
    enter_s_N: Floats
    """Once, wherever the worker is entered."""
    first_s_N: Floats
    """The link to the worker, if it comes first."""
    last_s_N: Floats
    """The link back from the worker, if it comes last."""
    links: Links
    guess_s: float
    """Every link that was not measured."""


def cheapest(problem: Problem) -> tuple[float, tuple[Piece, ...]] | None:
    """Total cost and pieces of the cheapest chain, or None if there is none.

    Exact as long as at most 200 walks that return to a worker must be split; after that such a worker
    keeps the longest of its pieces, which is legal but perhaps not the cheapest.
    """
    numbers = count()
    search = _Search(problem)
    open_cases: list[tuple[float, int, tuple[Piece, ...], Floats]] = []

    def add(block_s_BN: Floats) -> None:
        walk = search.walk(block_s_BN)
        if walk is not None:
            heapq.heappush(open_cases, (walk[0], next(numbers), walk[1], block_s_BN))

    add(problem.block_s_BN)
    splits = 0
    while open_cases:
        total_s, _, pieces, block_s_BN = heapq.heappop(open_cases)
        again = _visited_twice(pieces)
        if again is None:
            return total_s, pieces
        worker, left_at = again
        splits += 1
        if splits > _MAX_SPLITS:
            _, start, end = max((p for p in pieces if p[0] == worker), key=lambda p: p[2] - p[1])
            only = block_s_BN.copy()
            only[:start, worker] = only[end:, worker] = np.inf
            add(only)
            continue
        # A chain in which the worker does not compute block `left_at` uses it on one side of that block only.
        before, behind, here = block_s_BN.copy(), block_s_BN.copy(), block_s_BN.copy()
        before[left_at:, worker] = np.inf
        behind[: left_at + 1, worker] = np.inf
        here[left_at] = np.inf
        here[left_at, worker] = block_s_BN[left_at, worker]
        for case in (before, behind, here):
            add(case)
    return None


def _visited_twice(pieces: Sequence[Piece]) -> tuple[int, int] | None:
    """A worker that occurs twice, and the block at which it was left first."""
    left: dict[int, int] = {}
    for worker, _, end in pieces:
        if worker in left:
            return worker, left[worker]
        left[worker] = end
    return None


class _Search:
    def __init__(self, problem: Problem) -> None:
        self._p = problem
        self._fast_others_NK, self._fast_s_NK, self._gain_s_N = problem.links.faster_than(problem.guess_s)
        self._slow: dict[int, Ints] = {}

    def walk(self, block_s_BN: Floats) -> tuple[float, tuple[Piece, ...]] | None:
        """The cheapest walk, which may return to a worker."""
        p = self._p
        blocks = len(block_s_BN)
        reach_BN, done_BN = np.empty_like(block_s_BN), np.empty_like(block_s_BN)
        # reach: cheapest way to stand at worker n before block b; done: … and to have computed it.
        np.add(p.first_s_N, p.enter_s_N, out=reach_BN[0])
        for block in range(blocks):
            done_N = done_BN[block]
            np.add(reach_BN[block], block_s_BN[block], out=done_N)
            best = int(done_N.argmin())
            if done_N[best] == np.inf:
                return None
            if block + 1 < blocks:
                self._cross(done_N, best, block_s_BN[block + 1], reach_BN[block + 1])
        done_N = done_BN[-1] + p.last_s_N
        worker = int(done_N.argmin())
        return float(done_N[worker]), self._trace(reach_BN, done_BN, worker)

    def _cross(self, done_N: Floats, best: int, next_s_N: Floats, reach_N: Floats) -> None:
        """Fill `reach_N`: stay, or take the cheapest link from any worker."""
        p = self._p
        guessed_s = done_N[best] + p.guess_s
        np.add(p.enter_s_N, guessed_s, out=reach_N)
        if best not in self._slow:
            others, cost_s = p.links.of(best)
            self._slow[best] = others[cost_s > p.guess_s]
        for other in self._slow[best]:
            # The guess does not hold between these two, so the next best worker matters.
            if next_s_N[other] < np.inf:
                reach_N[other] = self._arrive(done_N, int(other)).min() + p.enter_s_N[other]
        np.minimum(reach_N, done_N, out=reach_N)
        # A faster link only matters from a worker that is not further behind than the link gains.
        sources = np.flatnonzero(done_N - self._gain_s_N < guessed_s - p.guess_s)
        if len(sources):
            others = self._fast_others_NK[sources]
            arrive_s = done_N[sources, None] + self._fast_s_NK[sources] + p.enter_s_N[others]
            np.minimum.at(reach_N, others.ravel(), arrive_s.ravel())

    def _arrive(self, done_N: Floats, worker: int) -> Floats:
        """From every other worker: its cost so far and its link to `worker`."""
        arrive_N = done_N + self._p.guess_s
        others, cost_s = self._p.links.of(worker)
        arrive_N[others] = done_N[others] + cost_s
        arrive_N[worker] = np.inf
        return arrive_N

    def _trace(self, reach_BN: Floats, done_BN: Floats, worker: int) -> tuple[Piece, ...]:
        pieces = []
        end = len(reach_BN)
        for block in range(end - 1, 0, -1):
            if reach_BN[block, worker] < done_BN[block - 1, worker]:
                pieces.append((worker, block, end))
                worker, end = int(self._arrive(done_BN[block - 1], worker).argmin()), block
        pieces.append((worker, 0, end))
        return tuple(reversed(pieces))
