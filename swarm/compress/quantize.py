"""How kept values become signs and magnitude codes, and codes become values again.

In: a frame's values and the places kept of each chunk, or codes and levels. Out: one symbol a value, the code of its
magnitude with the sign above it, and the levels of each group; or the values.

A group's levels are evenly spaced and fitted by least squares to up to 2047 of its values: one level is the mean,
two levels are the two centroids of Lloyd's algorithm (1982). Freely placed centroids have less error at the same
`bits`, but since the codes are entropy coded they cost more than the same error bought with more even levels (Gish
and Pierce, 1968; seen on Gaussian, Student-t(3) and log-normal values). Rounding the levels to what a frame can say
(swarm.compress.levels) comes before the codes are chosen, so that the codes make up for most of it.

Sums are float64 in the order of the values. Never yields a value that is not finite.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from swarm.compress import levels
from swarm.compress.plan import Plan
from swarm.jit import float64, int64, jit

_LLOYD_STEPS = 6
"""From evenly spaced levels over the range. At density 1/16 the error is then within 5% of convergence; dense
heavy-tailed values would gain more, and pay for it in entropy."""
_LARGEST = 2.0**126
"""Magnitudes saturate here, so that no level can round to infinity; the residual keeps the rest."""
_SAMPLE = 1024

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]
Places = NDArray[np.uint16]
Symbols = NDArray[np.uint8]
Runs = NDArray[np.void]


def quantize(flat: Float32, plan: Plan, places: Places, bits: int) -> tuple[Symbols, Int64, Int64]:
    """A symbol a value, and each group's `top` and `fraction`. `places`: positions in chunks."""
    symbols = np.empty(plan.values, np.uint8)
    index, fraction = np.empty(plan.groups, np.int64), np.zeros(plan.groups, np.int64)
    resolution = levels.resolutions(plan.group_values)
    every, parts = levels.FINEST // resolution, 2 * resolution
    last = (1 << (bits - 1)) - 1
    _fit(flat, plan.runs, places, plan.group_values, levels.tops(), every, parts, last, index, fraction)
    top = np.where(index < 0, levels.ZERO, index + levels.LOWEST_OCTAVE * resolution)
    floor, step = levels.levels(top, fraction, resolution, bits)
    _assign(flat, plan.runs, places, floor, step, last, symbols)
    return symbols, top, fraction


def place(flat: Float32, plan: Plan, places: Places, packed: Symbols, bits: int, floor: Float32, step: Float32) -> None:
    """Writes the values of `packed` symbols into `flat`, zeros before: as many to a byte as fit 8 bits."""
    shift = {1: 3, 2: 2, 3: 1}.get(bits, 0)
    _place(flat, plan.runs, places, packed, bits, shift, floor, step)


@jit
def _square(value: float, floor: float, step: float, last: int) -> float:
    """Squared error of the nearest level."""
    code = np.floor(min(max((value - floor) / step + 0.5, 0.0), float(last)))
    rest: float = value - floor - code * step
    return rest * rest


@jit
def _fit_even(sample: NDArray[np.float64], size: int, largest: float, weight: float, last: int) -> tuple[float, float]:
    """Floor and step of `last` + 1 evenly spaced levels; `largest` counts as `weight` values more."""
    lowest, mean = largest, weight * largest
    for index in range(size):
        lowest = min(lowest, sample[index])
        mean += sample[index]
    mean /= size + weight
    if last == 0:
        return mean, 0.0
    step = (largest - lowest) / (last + 1)
    floor = lowest + step / 2
    for _ in range(_LLOYD_STEPS):
        if step <= 0.0:
            break
        inverse = 1.0 / step
        code = min(max(np.floor((largest - floor) * inverse + 0.5), 0.0), float(last))
        ones, squares, products = weight * code, weight * code * code, weight * code * (largest - mean)
        for index in range(size):
            code = np.floor(min(max((sample[index] - floor) * inverse + 0.5, 0.0), float(last)))
            ones += code
            squares += code * code
            products += code * (sample[index] - mean)
        code_mean = ones / (size + weight)
        variance = squares / (size + weight) - code_mean * code_mean
        # Values that all fall on one level keep their step.
        if variance > 1e-9:
            step = products / (size + weight) / variance
        floor = max(mean - step * code_mean, 0.0)
    return floor, max(step, 0.0)


@jit
def _fit(
    flat: Float32,
    runs: Runs,
    places: Places,
    group_values: Int64,
    tops: Float32,
    every: Int64,
    parts: Int64,
    last: int,
    top: Int64,
    fraction: Int64,
) -> None:
    sample = np.empty(2 * _SAMPLE, np.float64)
    size, seen, largest = 0, 0, 0.0
    for r in range(runs.size):
        run = runs[r]
        for row in range(run.rows):
            group = min(run.first_group + row // run.group_rows, run.last_group)
            stride = max(1, group_values[group] // _SAMPLE)
            start = run.start + row * run.length
            first = run.first_place + row * run.kept
            # Every stride-th value of the group, counted across its chunks.
            for index in range(-seen % stride, run.kept, stride):
                position = index if run.kept == run.length else int64(places[first + index])
                sample[size] = min(float64(abs(flat[start + position])), _LARGEST)
                size += 1
            if stride > 1:
                # The sample may miss the largest, and many levels would then end below it.
                for index in range(run.kept):
                    position = index if run.kept == run.length else int64(places[first + index])
                    largest = max(largest, float64(abs(flat[start + position])))
            seen += run.kept
            if seen == group_values[group]:
                weight = 1.0 / stride if stride > 1 else 0.0
                for index in range(size):
                    largest = max(largest, sample[index])
                largest = min(largest, _LARGEST)
                _round_levels(
                    sample, size, largest, weight, tops, every[group], parts[group], last, top, fraction, group
                )
                size, seen, largest = 0, 0, 0.0


@jit
def _round_levels(
    sample: NDArray[np.float64],
    size: int,
    largest: float,
    weight: float,
    tops: Float32,
    every: int,
    parts: int,
    last: int,
    top: Int64,
    fraction: Int64,
    group: int,
) -> None:
    """The best of the four (top, fraction) around the fitted levels, the first of equals; top -1 for zero."""
    floor, step = _fit_even(sample, size, largest, weight, last)
    highest = floor + last * step
    top[group] = -1
    if highest < tops[0]:
        return
    low, high = 0, tops.size
    while high - low > 1:
        middle = (low + high) >> 1
        if tops[middle] <= highest:
            low = middle
        else:
            high = middle
    below = low // every
    least = -1.0
    for candidate in range(below, below + 2):
        if candidate * every >= tops.size:
            continue
        value = float64(tops[candidate * every])
        if last == 0:
            error = abs(value - floor)
            if least < 0.0 or error < least:
                least = error
                top[group] = candidate
            continue
        lower = min(int64(floor / value * parts), parts - 1)
        for part in range(lower, min(lower + 2, parts)):
            if part == 0:
                own_floor = value / (2 * last + 1)
                own_step = own_floor * 2
            else:
                own_floor = value * part / parts
                own_step = (value - own_floor) / last
            error = weight * _square(largest, own_floor, own_step, last)
            for index in range(size):
                error += _square(sample[index], own_floor, own_step, last)
            if least < 0.0 or error < least:
                least = error
                top[group] = candidate
                fraction[group] = part


@jit
def _assign(
    flat: Float32, runs: Runs, places: Places, floors: Float32, steps: Float32, last: int, symbols: Symbols
) -> None:
    sign = last + 1
    half, most = np.float32(0.5), np.float32(last)
    for r in range(runs.size):
        run = runs[r]
        for row in range(run.rows):
            group = min(run.first_group + row // run.group_rows, run.last_group)
            floor = floors[group]
            inverse = np.float32(1.0) / steps[group] if steps[group] > 0 else np.float32(0.0)
            start = run.start + row * run.length
            first = run.first_place + row * run.kept
            at = run.first_value + row * run.kept
            if run.kept == run.length:
                for index in range(run.kept):
                    value = flat[start + index]
                    code = min(max((abs(value) - floor) * inverse + half, np.float32(0.0)), most)
                    symbols[at + index] = np.int32(code) + (sign if value < 0 else 0)
            else:
                for index in range(run.kept):
                    value = flat[start + places[first + index]]
                    code = min(max((abs(value) - floor) * inverse + half, np.float32(0.0)), most)
                    symbols[at + index] = np.int32(code) + (sign if value < 0 else 0)


@jit
def _place(
    flat: Float32,
    runs: Runs,
    places: Places,
    packed: Symbols,
    bits: int,
    shift: int,
    floors: Float32,
    steps: Float32,
) -> None:
    values = np.empty(1 << bits, np.float32)
    half = 1 << (bits - 1)
    mask, within = (1 << bits) - 1, (1 << shift) - 1
    known = -1
    for r in range(runs.size):
        run = runs[r]
        for row in range(run.rows):
            group = min(run.first_group + row // run.group_rows, run.last_group)
            if group != known:
                known = group
                for code in range(half):
                    magnitude = floors[group] + steps[group] * np.float32(code)
                    values[code] = magnitude
                    values[code + half] = -magnitude
            start = run.start + row * run.length
            first = run.first_place + row * run.kept
            at = run.first_value + row * run.kept
            if run.kept == run.length:
                for index in range(run.kept):
                    symbol = int64(packed[(at + index) >> shift]) >> (((at + index) & within) * bits)
                    flat[start + index] = values[symbol & mask]
            else:
                for index in range(run.kept):
                    symbol = int64(packed[(at + index) >> shift]) >> (((at + index) & within) * bits)
                    flat[start + int64(places[first + index])] = values[symbol & mask]
