"""Which magnitudes a kept value can decode to: what `top` and `fraction` of a group mean.

In: two integers a group. Out: float32 `floor` and `step`; magnitude code c stands for floor + c * step. The top level
is 2^(top / resolution) and the floor `fraction` / (2 * resolution) of it; fraction 0 is half a step, which makes the
levels of both signs evenly spaced. The resolution grows from 2 to 32 an octave as the square root of the number of
values that share the levels, as does the precision of any mean of them: a finer one would outweigh
a handful of values.

Every integer within its bounds gives finite numbers that are normal or zero, made by products and quotients of
float32 in a fixed order and powers of two from a table of integers, so that all machines agree.
"""

from __future__ import annotations

from functools import cache
from math import isqrt, ldexp

import numpy as np
from numpy.typing import NDArray

from swarm.errors import CodecError

ZERO = -(1 << 20)
"""The top of a group whose values all decode to zero."""
FINEST = 32
LOWEST_OCTAVE, HIGHEST_OCTAVE = -110, 126
"""Below, floors and steps could be subnormal, which some processes flush; above, floats end."""

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]


def classes(group_values: Int64) -> Int64:
    """0 below 16 values, then one more for every four times as many, up to 4."""
    return np.searchsorted(np.array([16, 64, 256, 1024]), group_values, side="right").astype(np.int64)


def resolutions(group_values: Int64) -> Int64:
    """Steps an octave of each group's levels: 2, 4, 8, 16 or 32."""
    return np.int64(2) << classes(group_values)


@cache
def tops() -> Float32:
    """2^(i/32) for i from 32 * LOWEST_OCTAVE to 32 * HIGHEST_OCTAVE."""
    octave = []
    for i in range(FINEST):
        # 2^(i/32) to 60 bits: five square roots of 2^(i + 60 * 32), exact integers.
        root = 1 << (i + 60 * FINEST)
        for _ in range(5):
            root = isqrt(root)
        octave.append(ldexp(root, -60))
    values = [ldexp(m, e) for e in range(LOWEST_OCTAVE, HIGHEST_OCTAVE) for m in octave]
    return np.array([*values, ldexp(1.0, HIGHEST_OCTAVE)], np.float32)


def levels(top: Int64, fraction: Int64, resolution: Int64, bits: int) -> tuple[Float32, Float32]:
    """`floor` and `step` of each group. Raises CodecError for integers out of bounds."""
    present = top != ZERO
    bad = present & ((top < LOWEST_OCTAVE * resolution) | (top > HIGHEST_OCTAVE * resolution))
    if bad.any() or (fraction < 0).any() or (fraction >= 2 * resolution).any():
        raise CodecError("a quantization level in the frame is out of bounds")
    index = np.where(present, top * (FINEST // resolution) - LOWEST_OCTAVE * FINEST, 0)
    highest = np.where(present, tops()[index], np.float32(0))
    last = (1 << (bits - 1)) - 1
    if last == 0:
        return highest, np.zeros_like(highest)
    # The share is exact: a small integer over a power of two.
    floor = highest * (fraction.astype(np.float32) / (2 * resolution).astype(np.float32))
    step = (highest - floor) / np.float32(last)
    even = highest / np.float32(2 * last + 1)
    gapless = fraction == 0
    return np.where(gapless, even, floor), np.where(gapless, even * np.float32(2), step)
