"""How many values each tensor keeps, if not all of them the same share.

`energy`: one threshold for the magnitudes of the whole frame says how many values of each tensor matter; a tensor's
density is the settings' times the power of 2^(1/4) that comes closest to that, and the threshold is set so that as
many values are kept as evenly, where those tensors that a lower one would give most have their step from there. For a
given number of kept values that leaves the least energy behind (reverse water-filling; Cover and Thomas, 10.3), and
it is what a tensor's density travels for: a step of -16 to 16 each.

What a tensor is allotted depends on what travels with it, unlike everything else in a frame; how a given frame decodes
does not. Off unless asked for.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from swarm.compress import ranges
from swarm.compress.plan import DENSITY_STEPS
from swarm.config import CodecSettings
from swarm.errors import CodecError
from swarm.jit import jit

_BINS = 1 << 12
"""Magnitudes by exponent and 4 bits more: thresholds 3 to 6% apart."""

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]


@lru_cache(maxsize=64)
def names_of(keys: tuple[str, ...]) -> Int64:
    """Numbers by tensor name, so that what holds for a matrix in one block helps with the same one in the next."""
    known: dict[str, int] = {}
    return np.array([known.setdefault(key.split("/", 1)[1], len(known)) for key in keys], np.int64)


def steps_by_energy(flat: Float32, sizes: tuple[int, ...], settings: CodecSettings) -> tuple[int, ...]:
    """The density steps of each tensor."""
    at_least = np.zeros((len(sizes), _BINS), np.int64)
    _count_magnitudes(flat.view(np.uint32), np.array(sizes, np.int64), at_least)
    elements = np.array(sizes, np.float64)
    bounds = settings.density * 2.0 ** (np.arange(-DENSITY_STEPS, DENSITY_STEPS + 1) / 4)
    middles = np.sqrt(bounds[:-1] * bounds[1:])
    budget = settings.density * elements.sum()

    def steps_at(threshold: int) -> Int64:
        return np.searchsorted(middles, at_least[:, threshold] / elements).astype(np.int64) - DENSITY_STEPS

    def kept(steps: Int64) -> NDArray[np.float64]:
        return np.minimum(1.0, bounds[steps + DENSITY_STEPS]) * elements

    # The lowest threshold within the budget.
    low, high = 0, _BINS - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if kept(steps_at(middle)).sum() <= budget else (middle + 1, high)
    steps = steps_at(low)
    if low:
        # An optimizer that bounds its steps leaves many values at one magnitude: up to a third of the budget is between
        # two thresholds.
        more = steps_at(low - 1)
        order = np.argsort(-at_least[:, low - 1] / elements / bounds[more + DENSITY_STEPS], kind="stable")
        fits = np.cumsum((kept(more) - kept(steps))[order]) <= budget - kept(steps).sum()
        steps[order[fits]] = more[order[fits]]
    return tuple(int(step) for step in steps)


def write_steps(writer: ranges.Writer, steps: tuple[int, ...], names: Int64) -> None:
    before = np.zeros(int(names.max(initial=0)) + 1, np.int64)
    odds = ranges.learned(1)
    for step, name in zip(steps, names[: len(steps)], strict=True):
        writer.number(step - int(before[name]), odds, 0)
        before[name] = step


def read_steps(reader: ranges.Reader, names: Int64) -> tuple[int, ...]:
    """Raises CodecError for a step out of bounds."""
    before = np.zeros(int(names.max(initial=0)) + 1, np.int64)
    odds = ranges.learned(1)
    steps: list[int] = []
    for name in names:
        before[name] += reader.number(odds, 0)
        if abs(int(before[name])) > DENSITY_STEPS:
            raise CodecError("the density of a tensor in the frame is out of bounds")
        steps.append(int(before[name]))
    return tuple(steps)


@jit
def _count_magnitudes(bits: NDArray[np.uint32], sizes: Int64, at_least: Int64) -> None:
    """How many magnitudes of each tensor reach each bin."""
    at = 0
    for tensor in range(sizes.size):
        for index in range(at, at + sizes[tensor]):
            at_least[tensor, (bits[index] & 0x7FFF_FFFF) >> 19] += 1
        at += sizes[tensor]
        for bin_ in range(at_least.shape[1] - 2, -1, -1):
            at_least[tensor, bin_] += at_least[tensor, bin_ + 1]
