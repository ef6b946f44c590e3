"""Which coordinates of a chunk are sent: a seeded random subset, then the largest of it.

In: rows of values and of random ranks, one row a chunk. Out: ascending positions, as many in
every row. Both ends know the counts from the chunk's length and the settings, and both can draw
the random subset, so only the choice within the subset travels.

Never depends on the order in which an algorithm happens to meet equal values: ties go to the
lower position.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Philox
from numpy.typing import NDArray

from swarm.config import CodecSettings
from swarm.ids import seed_from

_MAGNITUDE_BITS = np.uint32(0x7FFF_FFFF)


@dataclass(frozen=True)
class Counts:
    """Of a chunk: how many coordinates may be sent, and how many of those are."""

    subset: int
    kept: int


def counts(length: int, settings: CodecSettings) -> Counts:
    """At least one coordinate of every chunk is kept."""
    subset = max(1, round(settings.random_keep * length))
    return Counts(subset, max(1, round(settings.density * subset)))


def random_ranks(job_id: str, round_: int, key: str, size: int) -> NDArray[np.uint32]:
    """[size] random numbers; the subset of a chunk is where its largest are.

    Philox (Salmon et al., 2011) is counter-based, and numpy promises that the raw words of a bit
    generator never change; it promises no such thing for the methods of Generator.
    """
    words = Philox(key=seed_from("swarm.compress.subset", job_id, round_, key)).random_raw((size + 1) // 2)
    return np.asarray(words).astype("<u8", copy=False).view("<u4")[:size].astype(np.uint32, copy=False)


def magnitude_ranks(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Integers in the order of |values|; finite IEEE floats without their sign sort as their bits do."""
    return np.ascontiguousarray(values).view(np.uint32) & _MAGNITUDE_BITS


def top_positions(ranks_RN: NDArray[np.uint32], count: int) -> NDArray[np.int64]:
    """[R, count] ascending positions of the `count` largest ranks of each row, the lower position on ties."""
    rows, length = ranks_RN.shape
    if count == length:
        return np.broadcast_to(np.arange(length), (rows, length))
    cut = length - count
    smallest_kept_R1 = np.partition(ranks_RN, cut, axis=1)[:, cut : cut + 1]
    keep_RN = ranks_RN >= smallest_kept_R1
    crowded = np.flatnonzero(np.count_nonzero(keep_RN, axis=1) > count)
    if crowded.size:
        above = ranks_RN[crowded] > smallest_kept_R1[crowded]
        tied = ranks_RN[crowded] == smallest_kept_R1[crowded]
        places = count - np.count_nonzero(above, axis=1, keepdims=True)
        keep_RN[crowded] = above | (tied & (np.cumsum(tied, axis=1) <= places))
    flat_RK: NDArray[np.int64] = np.flatnonzero(keep_RN).reshape(rows, count)
    flat_RK -= np.arange(rows)[:, None] * length
    return flat_RK
