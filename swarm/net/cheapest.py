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
Ints = NDArray[np.int64]
Piece = tuple[int, int, int]
"""(worker, first block, block after the last)."""
_MAX_SPLITS = 200


class Links:
    """Measured links between workers, the same in both directions; all others cost `guess_s`."""

    def __init__(self, workers: int, one: Ints, two: Ints, seconds: Floats) -> None:
        """Pairs of workers as two columns, and what each costs. Costs are kept to seven digits.

        Of a pair that occurs twice, the smaller cost counts; a worker's link to itself does not.
        """
        self.workers = workers
        real = one != two
        a, b, cost = one[real], two[real], seconds[real].astype(np.float32)
        pair = np.concatenate((a * workers + b, b * workers + a))
        # Positive floats sort like their bits, so that one sort of integers orders pairs and costs within them.
        packed = np.sort((pair << 32) | np.concatenate((cost, cost)).view(np.uint32).astype(np.int64))
        pair = packed >> 32
        first = np.ones(len(pair), dtype=bool)
        first[1:] = pair[1:] != pair[:-1]
        source, self._other = np.divmod(pair[first], workers)
        self._cost_s = (packed[first] & 0xFFFFFFFF).astype(np.uint32).view(np.float32).astype(np.float64)
        self._from = np.searchsorted(source, np.arange(workers + 1))
        self._source = source
        # The same for every search with the same guess.
        self._fast: tuple[float, tuple[Ints, Floats, Floats]] | None = None

    def of(self, worker: int) -> tuple[Ints, Floats]:
        """The workers it has a measured link to, and what each costs."""
        part = slice(self._from[worker], self._from[worker + 1])
        return self._other[part], self._cost_s[part]

    def faster_than(self, guess_s: float) -> tuple[Ints, Floats, Floats]:
        """Links below the guess as padded rows (others [N, K], cost [N, K]), and each worker's best gain [N]."""
        if self._fast is not None and self._fast[0] == guess_s:
            return self._fast[1]
        fast = np.flatnonzero(self._cost_s < guess_s)
        source = self._source[fast]
        starts = np.searchsorted(source, np.arange(self.workers + 1))
        width = int(np.diff(starts).max(initial=0))
        column = np.arange(len(fast)) - starts[source]
        others = np.zeros((self.workers, width), dtype=np.int64)
        cost_s = np.full((self.workers, width), np.inf)
        others[source, column] = self._other[fast]
        cost_s[source, column] = self._cost_s[fast]
        self._fast = guess_s, (others, cost_s, guess_s - cost_s.min(axis=1, initial=np.inf))
        return self._fast[1]


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
        self._rows: dict[int, Floats] = {}

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
        slow = self._slower_than_guessed(best)
        slow = slow[(next_s_N[slow] < np.inf) & (reach_N[slow] < done_N[slow])]
        for other in slow.tolist():
            # The guess does not hold from the best worker to this one, so the next best ones matter.
            reach_N[other] = (done_N + self._links(other)).min() + p.enter_s_N[other]
        np.minimum(reach_N, done_N, out=reach_N)
        # A faster link only matters from a worker that is not further behind than the link gains.
        sources = (done_N - self._gain_s_N < done_N[best]).nonzero()[0]
        if len(sources):
            arrive_s = done_N[sources, None] + self._fast_s_NK[sources]
            matter = arrive_s < guessed_s
            others = self._fast_others_NK[sources][matter]
            np.minimum.at(reach_N, others, arrive_s[matter] + p.enter_s_N[others])

    def _slower_than_guessed(self, worker: int) -> Ints:
        """Workers to which the link is measured and above the guess."""
        if worker not in self._slow:
            others, cost_s = self._p.links.of(worker)
            self._slow[worker] = others[cost_s > self._p.guess_s]
        return self._slow[worker]

    def _links(self, worker: int) -> Floats:
        """What the link between the worker and every other costs; none leads to itself."""
        if worker not in self._rows:
            link_s_N = np.full(self._p.links.workers, self._p.guess_s)
            others, cost_s = self._p.links.of(worker)
            link_s_N[others] = cost_s
            link_s_N[worker] = np.inf
            self._rows[worker] = link_s_N
        return self._rows[worker]

    def _trace(self, reach_BN: Floats, done_BN: Floats, worker: int) -> tuple[Piece, ...]:
        pieces = []
        end = len(reach_BN)
        for block in range(end - 1, 0, -1):
            if reach_BN[block, worker] < done_BN[block - 1, worker]:
                pieces.append((worker, block, end))
                worker, end = int((done_BN[block - 1] + self._links(worker)).argmin()), block
        pieces.append((worker, 0, end))
        return tuple(reversed(pieces))
