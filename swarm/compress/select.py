"""Which coordinates of a chunk are sent: a seeded random subset, then the largest of it.

In: all values of a frame, one after the other, a seed a tensor and the runs of chunks. Out: ascending places in
the subset, as many in every chunk. Both ends know the counts and can draw the subset, so only the choice within
it travels.

The subset is a jittered sample: one coordinate out of each of as many equal strata, all turned by a random amount so
that every coordinate is as likely as any other. It needs one random number a drawn coordinate, from a
counter and a 64-bit mixing function (SplitMix64: Steele, Lea and Flood, 2014): integers only, the
same on every machine. A tensor's seed and a chunk's number decide it, never a node or a span.

Never depends on the order in which an algorithm happens to meet equal values: ties go to the lower position.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from swarm.ids import seed_from
from swarm.jit import int64, jit

_MAGNITUDE = 0x7FFF_FFFF
"""Finite IEEE floats without their sign sort as their bits do."""
_UNFINITE = 0x7F80_0000
_COARSE, _FINE = 20, 9
"""Selection looks at 11 bits of a magnitude, then 11 more, then the last 9."""
_BINS = 1 << 11

Float32 = NDArray[np.float32]
Bits = NDArray[np.uint32]
Seeds = NDArray[np.uint64]
Places = NDArray[np.uint16]
Runs = NDArray[np.void]


def seeds_of(job_id: str, round_: int, keys: tuple[str, ...]) -> Seeds:
    return np.array([seed_from("swarm.compress.subset", job_id, round_, key) for key in keys], np.uint64)


def count_unfinite(flat: Float32) -> int:
    return int(_count_unfinite(flat.view(np.uint32)))


def largest(flat: Float32, runs: Runs, seeds: Seeds, places: Places, chunk: int) -> None:
    """Writes the kept places of every chunk into the frame's list."""
    _largest(flat.view(np.uint32), runs, seeds, places, np.empty(chunk, np.uint16), np.empty((2, chunk), np.uint32))


def in_chunks(runs: Runs, seeds: Seeds, places: Places, chunk: int) -> None:
    """Turns places in subsets into positions in chunks, where they stand."""
    _in_chunks(runs, seeds, places, np.empty(chunk, np.uint16))


@jit
def _count_unfinite(bits: Bits) -> int:
    count = 0
    for index in range(bits.size):
        count += (bits[index] & _UNFINITE) == _UNFINITE
    return count


@jit
def _mix(state: np.uint64) -> np.uint64:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


@jit
def _below(key: np.uint64, counter: int, limit: int) -> int:
    """One of 0 to limit - 1, limit at most 65536: the upper half of a random word as a fraction."""
    word = _mix(key + np.uint64(counter + 1) * np.uint64(0x9E3779B97F4A7C15))
    below: int = int64((word >> np.uint64(32)) * np.uint64(limit) >> np.uint64(32))
    return below


@jit
def _draw(seed: np.uint64, chunk: int, length: int, subset: int, drawn: Places) -> None:
    """Fills drawn[:subset], ascending."""
    key = _mix(seed + np.uint64(chunk + 1) * np.uint64(0xD1342543DE82EF95))
    turn = _below(key, 0, length)
    # The strata that the turn carries past the end come first.
    wrapped = 0
    for stratum in range(subset - 1, -1, -1):
        begin, end = stratum * length // subset, (stratum + 1) * length // subset
        place = begin + _below(key, stratum + 1, end - begin) + turn
        if place < length:
            break
        wrapped += 1
    for stratum in range(subset):
        begin, end = stratum * length // subset, (stratum + 1) * length // subset
        place = begin + _below(key, stratum + 1, end - begin) + turn
        if place < length:
            drawn[stratum + wrapped] = place
        else:
            drawn[stratum - (subset - wrapped)] = place - length


@jit
def _kth(ranks: Bits, size: int, kept: int, spare: Bits, bins: NDArray[np.int32]) -> tuple[int, int]:
    """The smallest rank among the `kept` largest, and how many of those equal to it are kept."""
    bins[:] = 0
    for index in range(size):
        bins[ranks[index] >> _COARSE] += 1
    above, bin_ = 0, _BINS - 1
    while above + bins[bin_] < kept:
        above += bins[bin_]
        bin_ -= 1
    # The ranks of that bin, side by side.
    crowd = 0
    for index in range(size):
        spare[crowd] = ranks[index]
        crowd += (ranks[index] >> _COARSE) == bin_
    rank = bin_ << _COARSE
    for shift in (_FINE, 0):
        bins[:] = 0
        for index in range(crowd):
            bins[spare[index] >> shift & (_BINS - 1)] += 1
        bin_ = _BINS - 1
        while above + bins[bin_] < kept:
            above += bins[bin_]
            bin_ -= 1
        rank |= bin_ << shift
        left = 0
        for index in range(crowd):
            value = spare[index]
            spare[left] = value
            left += (value >> shift & (_BINS - 1)) == bin_
        crowd = left
    return rank, kept - above


@jit
def _largest(bits: Bits, runs: Runs, seeds: Seeds, places: Places, drawn: Places, scratch: Bits) -> None:
    bins = np.empty(_BINS, np.int32)
    ranks, spare = scratch[0], scratch[1]
    for r in range(runs.size):
        run = runs[r]
        if run.kept == run.length:
            continue
        for row in range(run.rows):
            at = run.first_place + row * run.kept
            start = run.start + row * run.length
            if run.kept == run.subset:
                for index in range(run.kept):
                    places[at + index] = index
                continue
            if run.subset == run.length:
                for index in range(run.length):
                    ranks[index] = bits[start + index] & _MAGNITUDE
            else:
                _draw(seeds[run.tensor], run.first_chunk + row, run.length, run.subset, drawn)
                for index in range(run.subset):
                    ranks[index] = bits[start + drawn[index]] & _MAGNITUDE
            rank, ties = _kth(ranks, run.subset, run.kept, spare, bins)
            end = at + run.kept
            for index in range(run.subset):
                if at == end:
                    break
                places[at] = index
                tied = ranks[index] == rank
                at += ranks[index] > rank or (tied and ties > 0)
                ties -= tied


@jit
def _in_chunks(runs: Runs, seeds: Seeds, places: Places, drawn: Places) -> None:
    for r in range(runs.size):
        run = runs[r]
        if run.subset == run.length:
            continue
        for row in range(run.rows):
            _draw(seeds[run.tensor], run.first_chunk + row, run.length, run.subset, drawn)
            first = run.first_place + row * run.kept
            for index in range(first, first + run.kept):
                places[index] = drawn[places[index]]
