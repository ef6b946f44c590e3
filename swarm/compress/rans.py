"""Entropy coding of byte symbols whose frequencies both ends know.

In: symbols 0-255 and a table of frequencies. Out: 16-bit words whose number is within a fraction of a percent of the
symbols' information under the table, and back.

Range asymmetric numeral systems (Duda, 2013), four states taking turns so that a processor works on four symbols at
once (Giesen, 2014), in segments of 64 Ki symbols so that the scratch of the encoder does not grow. A state that does
not return to its start tells of damaged words.

Never reads beyond the words or writes more than it was asked for; the words hold no count to trust.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swarm.errors import CodecError
from swarm.jit import int64, jit

SCALE_BITS = 14
"""Frequencies sum to 2^14: at 12 bits the forced least frequency of rare symbols costs up to 1.4%."""
_SCALE = 1 << SCALE_BITS
_MASK = _SCALE - 1
_START = 1 << 16
"""States live in [2^16, 2^32)."""
_SEGMENT = 1 << 16
_STATE_WORDS = 8
_FREQ_LIMIT_SHIFT = 32 - SCALE_BITS
_PADDING_WORDS = 8
"""One round of four symbols reads at most four words, and a start eight, before it is checked."""

Words = NDArray[np.uint16]
Symbols = NDArray[np.uint8]


@dataclass(frozen=True)
class Table:
    """`spans`: start << 16 | frequency of each symbol; `symbol_of`: the symbol of each of the 2^14 slots."""

    spans: NDArray[np.uint32]
    symbol_of: Symbols


def table(weights: Sequence[int]) -> Table:
    """Frequencies in proportion to up to 256 weights; a symbol of weight zero cannot be coded."""
    freqs = np.array(normalized(weights, _SCALE), np.int64)
    starts = np.cumsum(freqs) - freqs
    spans = np.zeros(256, np.uint32)
    spans[: freqs.size] = starts << 16 | freqs
    return Table(spans, np.repeat(np.arange(freqs.size, dtype=np.uint8), freqs))


def normalized(weights: Sequence[int], total: int) -> list[int]:
    """Integers that sum to `total` in proportion to the weights, at least 1 where a weight is not zero."""
    whole = sum(weights)
    shares = [max(1, weight * total // whole) if weight else 0 for weight in weights]
    missing = total - sum(shares)
    if missing > 0:
        by_rest = sorted((-(weight * total % whole), index) for index, weight in enumerate(weights) if weight)
        for place in range(missing):
            shares[by_rest[place % len(by_rest)][1]] += 1
    while missing < 0:
        # Every share of more than half the largest gives one: cheapest where there is most.
        threshold = max(2, max(shares) // 2)
        for index, share in enumerate(shares):
            if share >= threshold and missing < 0:
                shares[index] -= 1
                missing += 1
    return shares


def write(symbols: Symbols, coding: Table) -> bytes:
    """Words as little-endian bytes. Every symbol must have a frequency."""
    out = bytearray()
    scratch = np.empty(min(symbols.size, _SEGMENT) + _STATE_WORDS, np.uint16)
    for start in range(0, symbols.size, _SEGMENT):
        first = _write_segment(symbols[start : start + _SEGMENT], coding.spans, scratch)
        out += scratch[first:].astype("<u2", copy=False).tobytes()
    return bytes(out)


class Reader:
    """Words of several streams behind each other."""

    def __init__(self, data: bytes | memoryview) -> None:
        if len(data) % 2:
            raise CodecError("the coded symbols end within a word")
        self._words = np.zeros(len(data) // 2 + _PADDING_WORDS, np.uint16)
        self._words[:-_PADDING_WORDS] = np.frombuffer(data, "<u2")
        self._at = 0

    def read(self, count: int, coding: Table) -> Symbols:
        """The next `count` symbols, a number the caller vouches for. Raises CodecError for damaged words."""
        symbols = np.empty(count, np.uint8)
        for start in range(0, count, _SEGMENT):
            segment = symbols[start : start + _SEGMENT]
            self._at = _read_segment(self._words, self._at, coding.spans, coding.symbol_of, segment)
            if self._at < 0:
                raise CodecError("the coded symbols are damaged or cut short")
        return symbols

    def finish(self) -> None:
        """Raises CodecError if words are left."""
        left = self._words.size - _PADDING_WORDS - self._at
        if left:
            raise CodecError(f"the frame has {2 * left} bytes after its last symbol")


@jit
def _write_segment(symbols: Symbols, spans: NDArray[np.uint32], scratch: Words) -> int:
    """Fills `scratch` from its end; returns where the words begin. Coding runs backwards, reading forwards."""
    states = np.full(4, _START, np.int64)
    at = scratch.size
    for index in range(symbols.size - 1, -1, -1):
        span = int64(spans[symbols[index]])
        freq = span & 0xFFFF
        state = states[index & 3]
        scratch[at - 1] = state & 0xFFFF
        full = state >= freq << _FREQ_LIMIT_SHIFT
        at -= full
        state = state >> 16 if full else state
        quotient = int64(np.uint64(state) // np.uint64(freq))
        states[index & 3] = (quotient << SCALE_BITS) + (state - quotient * freq) + (span >> 16)
    for lane in range(3, -1, -1):
        at -= 2
        scratch[at] = states[lane] >> 16
        scratch[at + 1] = states[lane] & 0xFFFF
    return at


@jit
def _read_segment(words: Words, at: int, spans: NDArray[np.uint32], symbol_of: Symbols, symbols: Symbols) -> int:
    """Where the next segment begins, or -1: not enough words, or states that do not end where they started."""
    last = words.size - _PADDING_WORDS
    if at + _STATE_WORDS > last:
        return -1
    a = int64(words[at]) << 16 | int64(words[at + 1])
    b = int64(words[at + 2]) << 16 | int64(words[at + 3])
    c = int64(words[at + 4]) << 16 | int64(words[at + 5])
    d = int64(words[at + 6]) << 16 | int64(words[at + 7])
    at += _STATE_WORDS
    whole = symbols.size & ~3
    for index in range(0, whole, 4):
        slot = a & _MASK
        symbol = symbol_of[slot]
        symbols[index] = symbol
        span = int64(spans[symbol])
        a = (span & 0xFFFF) * (a >> SCALE_BITS) + slot - (span >> 16)
        low = a < _START
        a = a << 16 | int64(words[at]) if low else a
        at += low
        slot = b & _MASK
        symbol = symbol_of[slot]
        symbols[index + 1] = symbol
        span = int64(spans[symbol])
        b = (span & 0xFFFF) * (b >> SCALE_BITS) + slot - (span >> 16)
        low = b < _START
        b = b << 16 | int64(words[at]) if low else b
        at += low
        slot = c & _MASK
        symbol = symbol_of[slot]
        symbols[index + 2] = symbol
        span = int64(spans[symbol])
        c = (span & 0xFFFF) * (c >> SCALE_BITS) + slot - (span >> 16)
        low = c < _START
        c = c << 16 | int64(words[at]) if low else c
        at += low
        slot = d & _MASK
        symbol = symbol_of[slot]
        symbols[index + 3] = symbol
        span = int64(spans[symbol])
        d = (span & 0xFFFF) * (d >> SCALE_BITS) + slot - (span >> 16)
        low = d < _START
        d = d << 16 | int64(words[at]) if low else d
        at += low
        if at > last:
            return -1
    # Up to three symbols more, from the first states.
    for index in range(whole, symbols.size):
        slot = a & _MASK
        symbol = symbol_of[slot]
        symbols[index] = symbol
        span = int64(spans[symbol])
        a = (span & 0xFFFF) * (a >> SCALE_BITS) + slot - (span >> 16)
        if a < _START:
            a = a << 16 | int64(words[at])
            at += 1
        a, b, c = b, c, a
    unchanged = a == _START and b == _START and c == _START and d == _START
    return at if unchanged and at <= last else -1
