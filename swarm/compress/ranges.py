"""Entropy coding of what is too little for a table: few positions in a chunk, levels, small numbers.

In: bits, each with its probability, either computed or learned from the bits of its kind before. Out: bytes within a
few bits of their information, and back. A binary range coder with carries (Martin, 1979; as in LZMA).

`k` of `n` places: every such choice is equally likely, so the next kept place lies beyond the first h of
the m that are left with probability C(m - h, j) / C(m, j), j still to come. Halving the range of places with exact
probabilities spends log2 C(n, k) bits; the products are IEEE float64 in a fixed order and thus the same everywhere.

Any bytes decode to something within its bounds: `k` ascending places below `n`, numbers of at most 2^20.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from swarm.jit import int64, jit

MOST_KEPT = 31
"""Up to as many positions fit: larger products could leave float64's range, and a table costs less than 1%."""
_ONE = 1 << 16
_EDGE = 1 << 24
_LOW, _RANGE, _CACHE, _PENDING, _AT = range(5)
_SLOTS = 64
"""Learned probabilities a number takes: zero, sign, 22 for its length, 22 for the bit after the leading one."""

Bytes = NDArray[np.uint8]
Int64 = NDArray[np.int64]
State = NDArray[np.int64]
Learned = NDArray[np.int32]
Positions = NDArray[np.uint16]
Runs = NDArray[np.void]
"""Records as swarm.compress.plan makes them; only runs of at most MOST_KEPT positions a chunk belong here."""


def learned(kinds: int) -> Learned:
    """Even odds for numbers of so many kinds: [kinds * 64, probability of a zero and how many were seen]."""
    start = np.empty((kinds * _SLOTS, 2), np.int32)
    start[:] = (_ONE // 2, 0)
    return start


class Writer:
    """`room_bytes`: the caller's bound on what it will write."""

    def __init__(self, room_bytes: int) -> None:
        self._state: State = np.array([0, 0xFFFF_FFFF, 0, 1, 0], np.int64)
        self._out: Bytes = np.empty(room_bytes + 16, np.uint8)

    def number(self, value: int, odds: Learned, kind: int) -> None:
        _write_number(self._state, self._out, value, odds, kind * _SLOTS)

    def count(self, value: int) -> None:
        """A number of which nothing is known."""
        self.number(value, learned(1), 0)

    def positions(self, runs: Runs, places: Positions) -> None:
        """The kept places of every chunk of the runs."""
        _write_positions(self._state, self._out, runs, places)

    def levels(self, top: Int64, fraction: Int64 | None, classes: Int64, names: Int64, zero: int) -> None:
        """Levels of each group; see `_write_levels`."""
        odds, estimates = learned(11), _no_estimates(names)
        fractions = np.empty(0, np.int64) if fraction is None else fraction
        _write_levels(self._state, self._out, top, fractions, classes, names, zero, odds, estimates)

    def finish(self) -> bytes:
        _flush(self._state, self._out)
        size = int(self._state[_AT])
        assert size <= self._out.size, "a range coder was given too little room"
        # The first byte is always zero; beyond their end the bytes read as zeros.
        return self._out[1:size].tobytes().rstrip(b"\0")


class Reader:
    def __init__(self, data: bytes | memoryview) -> None:
        self._data: Bytes = np.frombuffer(bytes(data) or b"\0", np.uint8)
        self._state: State = np.array([0, 0xFFFF_FFFF, 0], np.int64)
        _start(self._state, self._data)

    def number(self, odds: Learned, kind: int) -> int:
        return int(_read_number(self._state, self._data, odds, kind * _SLOTS))

    def count(self) -> int:
        return self.number(learned(1), 0)

    def levels(self, classes: Int64, names: Int64, zero: int, *, with_fraction: bool) -> tuple[Int64, Int64]:
        """`top` and `fraction` of each group; any numbers may come."""
        odds, estimates = learned(11), _no_estimates(names)
        top, fraction = np.empty(classes.size, np.int64), np.zeros(classes.size * with_fraction, np.int64)
        _read_levels(self._state, self._data, top, fraction, classes, names, zero, odds, estimates)
        return top, fraction if with_fraction else np.zeros(classes.size, np.int64)

    def positions(self, runs: Runs, places: Positions) -> None:
        _read_positions(self._state, self._data, runs, places)


@jit
def _shift(state: State, out: Bytes) -> None:
    """One byte leaves the coder; bytes of 255 wait until it is known whether a carry runs through them."""
    low = state[_LOW]
    if low < 0xFF00_0000 or low > 0xFFFF_FFFF:
        carry = low >> 32
        byte = state[_CACHE]
        for _ in range(state[_PENDING]):
            if state[_AT] < out.size:
                out[state[_AT]] = (byte + carry) & 0xFF
            state[_AT] += 1
            byte = 0xFF
        state[_PENDING] = 0
        state[_CACHE] = low >> 24 & 0xFF
    state[_PENDING] += 1
    state[_LOW] = (low & 0x00FF_FFFF) << 8


@jit
def _write_bit(state: State, out: Bytes, bit: int, zero: int) -> None:
    """`zero`: the probability of a zero in 1/65536, 1 to 65535."""
    bound = (state[_RANGE] >> 16) * zero
    if bit:
        state[_LOW] += bound
        state[_RANGE] -= bound
    else:
        state[_RANGE] = bound
    while state[_RANGE] < _EDGE:
        state[_RANGE] <<= 8
        _shift(state, out)


@jit
def _flush(state: State, out: Bytes) -> None:
    """The value within the range that ends in the most zero bits."""
    last = state[_LOW] + state[_RANGE] - 1
    for bits in range(32, -1, -1):
        value = last >> bits << bits
        if value >= state[_LOW]:
            state[_LOW] = value
            break
    for _ in range(5):
        _shift(state, out)


@jit
def _next_byte(state: State, data: Bytes) -> int:
    at = state[2]
    state[2] = at + 1
    byte: int = int64(data[at]) if at < data.size else int64(0)
    return byte


@jit
def _start(state: State, data: Bytes) -> None:
    for _ in range(4):
        state[0] = state[0] << 8 | _next_byte(state, data)


@jit
def _read_bit(state: State, data: Bytes, zero: int) -> int:
    bound = (state[1] >> 16) * zero
    bit = 0
    if state[0] >= bound:
        state[0] -= bound
        state[1] -= bound
        bit = 1
    else:
        state[1] = bound
    while state[1] < _EDGE:
        state[1] <<= 8
        state[0] = (state[0] << 8 | _next_byte(state, data)) & 0xFFFF_FFFF
    return bit


@jit
def _learn(odds: Learned, slot: int, bit: int) -> None:
    """Moves by 1/(n + 1.5) towards what came, n up to 30: soon near the truth, later able to follow."""
    seen = odds[slot, 1]
    target = 64 if bit else _ONE - 64
    odds[slot, 0] += 2 * (target - odds[slot, 0]) // (2 * seen + 3)
    if seen < 30:
        odds[slot, 1] = seen + 1


@jit
def _write_learned(state: State, out: Bytes, bit: int, odds: Learned, slot: int) -> None:
    _write_bit(state, out, bit, int64(odds[slot, 0]))
    _learn(odds, slot, bit)


@jit
def _read_learned(state: State, data: Bytes, odds: Learned, slot: int) -> int:
    bit = _read_bit(state, data, int64(odds[slot, 0]))
    _learn(odds, slot, bit)
    return bit


@jit
def _write_number(state: State, out: Bytes, value: int, odds: Learned, base: int) -> None:
    """Zero or not, sign, length in unary, the bits after the leading one (Exp-Golomb, learned)."""
    _write_learned(state, out, int64(value != 0), odds, base)
    if value == 0:
        return
    _write_learned(state, out, int64(value < 0), odds, base + 1)
    size = abs(value)
    length = 0
    while size >> (length + 1):
        length += 1
    for step in range(20):
        _write_learned(state, out, int64(step < length), odds, base + 2 + step)
        if step == length:
            break
    for place in range(length - 1, -1, -1):
        bit = size >> place & 1
        if place == length - 1:
            _write_learned(state, out, bit, odds, base + 24 + length)
        else:
            _write_bit(state, out, bit, _ONE // 2)


@jit
def _read_number(state: State, data: Bytes, odds: Learned, base: int) -> int:
    if _read_learned(state, data, odds, base) == 0:
        return 0
    negative = _read_learned(state, data, odds, base + 1)
    length = 0
    while length < 20 and _read_learned(state, data, odds, base + 2 + length):
        length += 1
    size = 1
    for place in range(length - 1, -1, -1):
        if place == length - 1:
            bit = _read_learned(state, data, odds, base + 24 + length)
        else:
            bit = _read_bit(state, data, _ONE // 2)
        size = size << 1 | bit
    return -size if negative else size


def _no_estimates(names: Int64) -> Int64:
    """[names and one more for the group before whatever its name, top and fraction, mean and how many]"""
    return np.zeros((int(names.max(initial=0)) + 2, 2, 2), np.int64)


@jit
def _expected(estimates: Int64, name: int, part: int, shift: int) -> int:
    """What groups of the same name came to so far, else the group before; in units of 2^shift."""
    own = name if estimates[name, part, 1] else -1
    expected: int = (estimates[own, part, 0] + (8 << shift)) >> (4 + shift)
    return expected


@jit
def _observe(estimates: Int64, name: int, part: int, value: int, shift: int) -> None:
    """A running mean of about the last eight, in sixteenths."""
    fine = value << (4 + shift)
    seen = min(estimates[name, part, 1] + 1, 8)
    estimates[name, part, 0] += (fine - estimates[name, part, 0]) // seen
    estimates[name, part, 1] = seen
    estimates[-1, part, 0] = fine


@jit
def _write_levels(
    state: State,
    out: Bytes,
    top: Int64,
    fraction: Int64,
    classes: Int64,
    names: Int64,
    zero: int,
    odds: Learned,
    estimates: Int64,
) -> None:
    """Each level as its distance from what groups of the same name had before: the same matrix of a neighbouring
    block is of about the same scale. `classes`: 0 to 4, how fine a group's levels are."""
    for g in range(top.size):
        _write_number(state, out, int64(top[g] == zero), odds, 0)
        if top[g] == zero:
            continue
        shift = 4 - classes[g]
        expected = _expected(estimates, names[g], 0, shift)
        _write_number(state, out, top[g] - expected, odds, (1 + classes[g]) * _SLOTS)
        _observe(estimates, names[g], 0, top[g], shift)
        if fraction.size:
            expected = _expected(estimates, names[g], 1, shift)
            _write_number(state, out, fraction[g] - expected, odds, (6 + classes[g]) * _SLOTS)
            _observe(estimates, names[g], 1, fraction[g], shift)


@jit
def _read_levels(
    state: State,
    data: Bytes,
    top: Int64,
    fraction: Int64,
    classes: Int64,
    names: Int64,
    zero: int,
    odds: Learned,
    estimates: Int64,
) -> None:
    for g in range(top.size):
        if _read_number(state, data, odds, 0):
            top[g] = zero
            continue
        shift = 4 - classes[g]
        top[g] = _expected(estimates, names[g], 0, shift) + _read_number(state, data, odds, (1 + classes[g]) * _SLOTS)
        _observe(estimates, names[g], 0, top[g], shift)
        if fraction.size:
            fraction[g] = _expected(estimates, names[g], 1, shift) + _read_number(
                state, data, odds, (6 + classes[g]) * _SLOTS
            )
            _observe(estimates, names[g], 1, fraction[g], shift)


@jit
def _beyond(left: int, kept: int, first: int) -> float:
    """C(left - first, kept) / C(left, kept): the chance that none of the first places is kept."""
    above, below = 1.0, 1.0
    if kept <= first:
        for i in range(kept):
            above *= left - first - i
            below *= left - i
    else:
        for i in range(first):
            above *= left - kept - i
            below *= left - i
    return above / below


@jit
def _chance(probability: float) -> int:
    chance: int = min(max(int64(probability * _ONE), 1), _ONE - 1)
    return chance


@jit
def _stride(left: int, kept: int) -> int:
    """About as many places as hold the next kept one with even odds; at most all it can lie in."""
    return min(max(1, left * 11 // (16 * kept)), left - kept + 1)


@jit
def _write_positions(state: State, out: Bytes, runs: Runs, places: Positions) -> None:
    for r in range(runs.size):
        run = runs[r]
        for row in range(run.rows):
            at = run.first_place + row * run.kept
            begin = 0
            for index in range(run.kept):
                left, kept = run.subset - begin, run.kept - index
                gap = places[at + index] - begin
                begin = places[at + index] + 1
                stride = _stride(left, kept)
                none = _beyond(left, kept, stride)
                while gap >= stride:
                    _write_bit(state, out, 1, _ONE - _chance(none))
                    gap -= stride
                    left -= stride
                    stride = _stride(left, kept)
                    none = _beyond(left, kept, stride)
                if none > 0:
                    _write_bit(state, out, 0, _ONE - _chance(none))
                while stride > 1:
                    half = stride >> 1
                    none_half = _beyond(left, kept, half)
                    chance = _chance((1.0 - none_half) / (1.0 - none))
                    if gap < half:
                        _write_bit(state, out, 0, chance)
                        stride, none = half, none_half
                    else:
                        _write_bit(state, out, 1, chance)
                        gap -= half
                        left -= half
                        stride, none = stride - half, none / none_half


@jit
def _read_positions(state: State, data: Bytes, runs: Runs, places: Positions) -> None:
    for r in range(runs.size):
        run = runs[r]
        for row in range(run.rows):
            at = run.first_place + row * run.kept
            begin = 0
            for index in range(run.kept):
                left, kept = run.subset - begin, run.kept - index
                stride = _stride(left, kept)
                none = _beyond(left, kept, stride)
                while none > 0 and _read_bit(state, data, _ONE - _chance(none)):
                    begin += stride
                    left -= stride
                    stride = _stride(left, kept)
                    none = _beyond(left, kept, stride)
                while stride > 1:
                    half = stride >> 1
                    none_half = _beyond(left, kept, half)
                    chance = _chance((1.0 - none_half) / (1.0 - none))
                    if _read_bit(state, data, chance) == 0:
                        stride, none = half, none_half
                    else:
                        begin += half
                        left -= half
                        stride, none = stride - half, none / none_half
                places[at + index] = begin
                begin += 1
