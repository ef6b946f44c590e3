"""The inner search of `cheapest`: over a row of blocks, the worker that computes each. Compiled.

In: plain arrays, as `cheapest.Problem` describes them; measured links as rows of a sparse matrix (of worker
n: `other[start[n]:start[n + 1]]` and their `cost_s`). Out: the total in seconds, inf if there is no way, and
the worker of every block. A walk may come back to a worker that it left; `cheapest` deals with that.

Dynamic programming over blocks with the worker as the state: about a thousand workers times their few
measured links a block. Ties go to staying, then to the lower index, so the answer does not depend on
how the machine orders its work.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from swarm.jit import jit

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_BEST = 8
"""Workers kept in order of cost: one of them is nearly always linked by the guess to the next."""


@jit
def _linked(other_L: Ints, first: int, end: int, other: int) -> bool:
    """Whether `other` is among the ascending others from `first` to before `end`."""
    while first < end:
        middle = (first + end) // 2
        if other_L[middle] == other:
            return True
        if other_L[middle] < other:
            first = middle + 1
        else:
            end = middle
    return False


@jit
def walk(
    block_s_BN: Floats,
    enter_s_N: Floats,
    first_s_N: Floats,
    last_s_N: Floats,
    start_N1: Ints,
    other_L: Ints,
    cost_s_L: Floats,
    guess_s: float,
) -> tuple[float, Ints]:
    """Total seconds and the worker of each block [B]."""
    blocks, workers = block_s_BN.shape
    path = np.zeros(blocks, np.int64)
    came_from = np.empty((blocks, workers), np.int32)
    done_N = np.empty(workers)
    for n in range(workers):
        done_N[n] = first_s_N[n] + enter_s_N[n] + block_s_BN[0, n]
    before_N = np.empty(workers)
    best = np.empty(_BEST, np.int64)
    for block in range(1, blocks):
        done_N, before_N = before_N, done_N
        count = 0
        for n in range(workers):
            if before_N[n] < np.inf and (count < _BEST or before_N[n] < before_N[best[count - 1]]):
                place = min(count, _BEST - 1)
                while place > 0 and before_N[n] < before_N[best[place - 1]]:
                    best[place] = best[place - 1]
                    place -= 1
                best[place] = n
                count = min(count + 1, _BEST)
        if count == 0:
            return np.inf, path
        for n in range(workers):
            step_s = block_s_BN[block, n]
            if step_s == np.inf:
                done_N[n] = np.inf
                continue
            first_link, end_link = start_N1[n], start_N1[n + 1]
            reach_s, source = np.inf, n
            for link in range(first_link, end_link):
                here_s = before_N[other_L[link]] + cost_s_L[link]
                if here_s < reach_s:  # others ascend, so the first of equals is the lowest
                    reach_s, source = here_s, other_L[link]
            # The cheapest worker to which no link was measured.
            guessed = -1
            for place in range(count):
                other = best[place]
                if other != n and not _linked(other_L, first_link, end_link, other):
                    guessed = other
                    break
            if guessed < 0 and count == _BEST:
                for other in range(workers):
                    nearer = guessed < 0 or before_N[other] < before_N[guessed]
                    if nearer and other != n and not _linked(other_L, first_link, end_link, other):
                        guessed = other
            if guessed >= 0:
                here_s = before_N[guessed] + guess_s
                if here_s < reach_s or (here_s == reach_s and guessed < source):
                    reach_s, source = here_s, guessed
            reach_s += enter_s_N[n]
            if before_N[n] <= reach_s:
                reach_s, source = before_N[n], n
            done_N[n] = reach_s + step_s
            came_from[block, n] = source
    total_s, worker = np.inf, 0
    for n in range(workers):
        if done_N[n] + last_s_N[n] < total_s:
            total_s, worker = done_N[n] + last_s_N[n], n
    if total_s == np.inf:
        return total_s, path
    for block in range(blocks - 1, -1, -1):
        path[block] = worker
        if block:
            worker = came_from[block, worker]
    return total_s, path
