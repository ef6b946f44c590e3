"""How the kept places of a crowded chunk become byte symbols, and how often each symbol comes.

In: ascending places, `kept` out of `subset` a chunk. Out: one byte a gap (255: as many places further, and the gap
goes on) or one byte for eight places of a bitmap, and back. If every choice of `kept` places is equally likely, gaps
are nearly geometric and the places of a bitmap nearly independent, so both ends know the frequencies from the counts
and none are sent. That the counts are fixed is worth another 2 to 5 bits a chunk, which is why
chunks that keep few go through `swarm.compress.ranges` instead.

Never trusts what it reads: places beyond the subset, a wrong number of them and unfinished gaps are a CodecError.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from swarm.compress import rans
from swarm.compress.plan import EIGHTHS, Crowd, PositionCoding
from swarm.errors import CodecError
from swarm.jit import int64, jit

_ESCAPE = 255
_UNIT = 2.0**52

Places = NDArray[np.uint16]
Symbols = NDArray[np.uint8]
Runs = NDArray[np.void]


def symbols_of(crowd: Crowd, places: Places) -> Symbols:
    """The symbols of all chunks of a crowd, one after the other."""
    symbols = np.zeros(crowd.most_symbols, np.uint8)
    if crowd.coding is PositionCoding.BITMAP:
        _write_bitmaps(crowd.runs, places, symbols)
        return symbols
    return symbols[: _write_gaps(crowd.runs, places, symbols)]


def places_of(crowd: Crowd, symbols: Symbols, places: Places) -> None:
    """The inverse; writes the crowd's share of the frame's places."""
    if crowd.coding is PositionCoding.BITMAP:
        if not _read_bitmaps(crowd.runs, symbols, places):
            raise CodecError("a bitmap in the frame does not mark exactly as many places as its chunk keeps")
    elif not _read_gaps(crowd.runs, symbols, places):
        raise CodecError("the position gaps in the frame reach beyond a chunk, or their number is wrong")


def table_of(crowd: Crowd) -> rans.Table:
    return _table(crowd.coding, crowd.octave_eighths)


@lru_cache(maxsize=32)
def _table(coding: PositionCoding, octave_eighths: int) -> rans.Table:
    """Products of IEEE float64 in a fixed order, so that every machine has the same table."""
    octaves, eighths = divmod(octave_eighths, 8)
    marked = 1.0 / EIGHTHS[eighths] / 2.0**octaves
    blank = 1.0 - marked
    if coding is PositionCoding.BITMAP:
        chances = []
        for byte in range(256):
            chance = 1.0
            for bit in range(8):
                chance *= marked if byte >> bit & 1 else blank
            chances.append(chance)
    else:
        chances = []
        none_yet = 1.0
        for _ in range(_ESCAPE):
            chances.append(none_yet * marked)
            none_yet *= blank
        chances.append(none_yet)
    return rans.table([max(1, int(chance * _UNIT)) for chance in chances])


@jit
def _write_gaps(runs: Runs, places: Places, symbols: Symbols) -> int:
    """How many symbols there are."""
    at = 0
    for r in range(runs.size):
        run = runs[r]
        for row in range(run.rows):
            first = run.first_place + row * run.kept
            begin = 0
            for index in range(first, first + run.kept):
                gap = int64(places[index]) - begin
                begin += gap + 1
                while gap >= 255:
                    symbols[at] = 255
                    at += 1
                    gap -= 255
                symbols[at] = gap
                at += 1
    return at


@jit
def _read_gaps(runs: Runs, symbols: Symbols, places: Places) -> bool:
    at = 0
    for r in range(runs.size):
        run = runs[r]
        for row in range(run.rows):
            first = run.first_place + row * run.kept
            place = -1
            for index in range(first, first + run.kept):
                place += 1
                while True:
                    if at == symbols.size:
                        return False
                    symbol = int64(symbols[at])
                    at += 1
                    place += symbol
                    if symbol != 255:
                        break
                # Truncated to 16 bits where it is too large, which the check after the chunk refuses.
                places[index] = place
            if place >= run.subset:
                return False
    return at == symbols.size


@jit
def _write_bitmaps(runs: Runs, places: Places, symbols: Symbols) -> None:
    """`symbols`: zeros."""
    at = 0
    for r in range(runs.size):
        run = runs[r]
        for row in range(run.rows):
            first = run.first_place + row * run.kept
            for index in range(first, first + run.kept):
                place = int64(places[index])
                symbols[at + (place >> 3)] |= 1 << (place & 7)
            at += (run.subset + 7) >> 3


@jit
def _read_bitmaps(runs: Runs, symbols: Symbols, places: Places) -> bool:
    at = 0
    for r in range(runs.size):
        run = runs[r]
        for row in range(run.rows):
            index = run.first_place + row * run.kept
            end = index + run.kept
            for place in range(run.subset):
                bit = symbols[at + (place >> 3)] >> (place & 7) & 1
                # Written before it is known to count; beyond the chunk's last it would hit the next one's.
                if index < end:
                    places[index] = place
                elif bit:
                    return False
                index += bit
            if index != end:
                return False
            at += (run.subset + 7) >> 3
            if run.subset & 7 and symbols[at - 1] >> (run.subset & 7):
                return False
    return True
