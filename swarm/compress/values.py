"""How often each value symbol comes, told in few bytes, and how symbols share bytes.

In: value symbols, the magnitude's code with the sign bit above it. Out: bytes of 8, 4, 2 or 1 of them, the weights of
their frequencies as small numbers for the frame, and the table that both ends make of the weights.

Signs are taken to be independent of magnitudes: one number says how many are negative, one each how often a code
comes, to 4 significant bits. Never yields a table in which a symbol that occurs cannot be coded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from swarm.compress import ranges, rans
from swarm.errors import CodecError
from swarm.jit import int64, jit

_PER_BYTE = {1: 8, 2: 4, 3: 2}
"""By bits. Two symbols of 4 bits would fit too, but most of the 256 pairs are then too rare for the table."""
_SIGN_UNITS = 128
_SIGNIFICANT = 4
_MOST_WEIGHT_BITS = 14

Symbols = NDArray[np.uint8]


@dataclass(frozen=True)
class Weights:
    """Frequencies in proportion. `negative`: of 128 values, 1 to 127."""

    negative: int
    codes: tuple[int, ...]


def weights_of(symbols: Symbols, bits: int) -> Weights:
    counts = _count(symbols)[: 1 << bits]
    half = 1 << (bits - 1)
    negative = int(counts[half:].sum())
    codes = [int(count) for count in counts[:half] + counts[half:]]
    most = max(codes)
    shift = max(0, most.bit_length() - _MOST_WEIGHT_BITS)
    # A half, so that what a shift takes is rounded, and what occurs keeps a weight.
    scaled = [max(1, (count + (1 << shift >> 1)) >> shift) if count else 0 for count in codes]
    if bits == 1 or not symbols.size:
        scaled[0] = 1
    share = round(_SIGN_UNITS * negative / max(1, symbols.size))
    return Weights(min(max(share, 1), _SIGN_UNITS - 1), tuple(_rounded(count) for count in scaled))


def write_weights(writer: ranges.Writer, weights: Weights) -> None:
    writer.count(weights.negative)
    if len(weights.codes) == 1:
        return
    odds = ranges.learned(2)
    before = 0
    for weight in weights.codes:
        size = weight.bit_length()
        writer.number(size - before, odds, 0)
        before = size
        if size > 1:
            writer.number((weight >> max(0, size - _SIGNIFICANT)) & _mantissa_mask(size), odds, 1)


def read_weights(reader: ranges.Reader, bits: int) -> Weights:
    """Raises CodecError."""
    negative = reader.count()
    if not 0 < negative < _SIGN_UNITS:
        raise CodecError(f"{negative} of {_SIGN_UNITS} signs cannot be negative")
    if bits == 1:
        return Weights(negative, (1,))
    odds = ranges.learned(2)
    codes: list[int] = []
    size = 0
    for _ in range(1 << (bits - 1)):
        size += reader.number(odds, 0)
        if not 0 <= size <= _MOST_WEIGHT_BITS + 1:
            raise CodecError("the frequency of a value in the frame is out of bounds")
        mantissa = reader.number(odds, 1) if size > 1 else 0
        if not 0 <= mantissa <= _mantissa_mask(size):
            raise CodecError("the frequency of a value in the frame is out of bounds")
        codes.append(((1 << min(size - 1, _SIGNIFICANT - 1)) | mantissa) << max(0, size - _SIGNIFICANT) if size else 0)
    if not any(codes):
        raise CodecError("the frame has no value that can occur")
    return Weights(negative, tuple(codes))


@lru_cache(maxsize=16)
def table_of(weights: Weights, bits: int) -> rans.Table:
    """Of packed symbols. Products of integers, so that every machine has the same table."""
    signs = (_SIGN_UNITS - weights.negative, weights.negative)
    single: Sequence[int] = [sign * code for sign in signs for code in weights.codes]
    per_byte = _PER_BYTE.get(bits, 1)
    # Small enough for their products, large enough for the rarest.
    single = rans.normalized(single, 1 << 14) if bits > 1 else single
    whole = [1]
    for _ in range(per_byte):
        whole = [high * low for high in single for low in whole]
    return rans.table(whole)


def packed_size(symbols: int, bits: int) -> int:
    return -(-symbols // _PER_BYTE.get(bits, 1))


def packed(symbols: Symbols, bits: int) -> Symbols:
    """The first symbol in the lowest bits; a last byte is filled up with one that occurs."""
    per_byte = _PER_BYTE.get(bits, 1)
    if per_byte == 1:
        return symbols
    out = np.empty(packed_size(symbols.size, bits), np.uint8)
    _pack(symbols, out, bits, per_byte)
    return out


@jit
def _count(symbols: Symbols) -> NDArray[np.int64]:
    # Two counters in turn: equal neighbours would wait for each other.
    counts = np.zeros((2, 256), np.int64)
    for index in range(symbols.size):
        counts[index & 1, symbols[index]] += 1
    total: NDArray[np.int64] = counts[0] + counts[1]
    return total


@jit
def _pack(symbols: Symbols, out: Symbols, bits: int, per_byte: int) -> None:
    whole = symbols.size // per_byte
    for index in range(whole):
        byte = 0
        for place in range(per_byte):
            byte |= int64(symbols[index * per_byte + place]) << (place * bits)
        out[index] = byte
    if whole < out.size:
        byte = 0
        for place in range(per_byte):
            index = min(whole * per_byte + place, symbols.size - 1)
            byte |= int64(symbols[index]) << (place * bits)
        out[whole] = byte


def _mantissa_mask(size: int) -> int:
    return (1 << max(0, min(size - 1, _SIGNIFICANT - 1))) - 1


def _rounded(weight: int) -> int:
    """To 4 significant bits, by cutting: relative errors of up to a sixteenth cost 0.1%."""
    drop = max(0, weight.bit_length() - _SIGNIFICANT)
    return weight >> drop << drop
