"""The cheapest chain of workers over a row of blocks: the search behind routing, on plain arrays.

In: what each worker asks for each block, for being entered first, entered at all and left last, and
what the links between workers cost. Out: pieces (worker, start, end) that meet and cover every
block, each worker at most once. Never reads the swarm, the clock or a random source.

`walk` finds the cheapest way when a worker may be entered again after it was left, which is legal for its
recurrence but not for a chain; such walks are split into the cases that forbid it (branch and bound),
which keeps the answer exact.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Piece = tuple[int, int, int]
"""(worker, first block, block after the last)."""
_MAX_SPLITS = 200


class Links:
    """Measured links between workers, the same in both directions; all others cost a guess."""

    def __init__(self, workers: int, one: Ints, two: Ints, seconds: Floats) -> None:
        """Pairs of workers as two columns, and what each costs. Costs are kept to seven digits.

        Of a pair that occurs twice, the smaller cost counts; a worker's link to itself does not.
        """
        real = one != two
        a, b, cost = one[real], two[real], seconds[real].astype(np.float32)
        pair = np.concatenate((a * workers + b, b * workers + a))
        # Positive floats sort like their bits, so that one sort of integers orders pairs and costs within them.
        packed = np.sort((pair << 32) | np.concatenate((cost, cost)).view(np.uint32).astype(np.int64))
        pair = packed >> 32
        first = np.ones(len(pair), dtype=bool)
        first[1:] = pair[1:] != pair[:-1]
        source, self.other_L = np.divmod(pair[first], workers)
        self.cost_s_L: Floats = (packed[first] & 0xFFFFFFFF).astype(np.uint32).view(np.float32).astype(np.float64)
        self.start_N1: Ints = np.searchsorted(source, np.arange(workers + 1))
        """Of worker n: `other_L` and `cost_s_L` from start_N1[n] to start_N1[n + 1], the others ascending."""


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
    from swarm.net.walk import walk  # compiled: loaded when there is something to route

    numbers = count()
    links = problem.links
    open_cases: list[tuple[float, int, tuple[Piece, ...], Floats]] = []

    def add(block_s_BN: Floats) -> None:
        total_s, path = walk(
            block_s_BN,
            problem.enter_s_N,
            problem.first_s_N,
            problem.last_s_N,
            links.start_N1,
            links.other_L,
            links.cost_s_L,
            problem.guess_s,
        )
        if total_s < np.inf:
            heapq.heappush(open_cases, (total_s, next(numbers), _pieces(path), block_s_BN))

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


def _pieces(path: Ints) -> tuple[Piece, ...]:
    """Runs of the same worker."""
    ends = [*(np.flatnonzero(path[1:] != path[:-1]) + 1).tolist(), len(path)]
    return tuple((int(path[start]), start, end) for start, end in pairwise([0, *ends]))
