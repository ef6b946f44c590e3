"""Which coordinates share a selection and which share levels: all that follows from shapes and settings alone.

A tensor of n elements, flattened in C order, is cut every `chunk` elements; the last chunk is shorter. Every chunk
keeps its share, at least one coordinate. Consecutive chunks of a tensor share quantization levels until they hold
1024 kept values, and what is left at a tensor's end joins the group before it: a pair of levels for each chunk of a
few values would outweigh them.

In: keys and sizes in key order, settings, and how far each tensor's density departs from the settings'. Out: tables
that kernels walk along, the same on both ends. Nothing about a tensor depends on the others but where it
lies. Never looks at values.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from swarm.config import CodecSettings

GROUP_VALUES = 1024
_MOST_EXACT = 31
"""As swarm.compress.ranges.MOST_KEPT; a test holds them together."""
DENSITY_STEPS = 16
"""A tensor's density may be 2^(step/4) times that of the settings, for steps from -16 to 16."""
_QUARTERS = (1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429)
"""2^(i/4), correctly rounded: literals, since exp2 differs between machines."""
EIGHTHS = (
    1.0,
    1.0905077326652577,
    1.189207115002721,
    1.2968395546510096,
    1.4142135623730951,
    1.5422108254079407,
    1.681792830507429,
    1.8340080864093424,
)
"""2^(i/8), correctly rounded."""

RUN = np.dtype(
    [
        ("start", np.int64),  # flat position of the first chunk in the frame
        ("rows", np.int64),
        ("length", np.int64),
        ("subset", np.int64),
        ("kept", np.int64),
        ("first_place", np.int64),  # in the frame's list of positions
        ("first_value", np.int64),  # in the frame's list of values
        ("first_group", np.int64),
        ("group_rows", np.int64),
        ("last_group", np.int64),
        ("tensor", np.int64),
        ("first_chunk", np.int64),  # within the tensor
    ]
)
"""Chunks of equal length that follow each other in one tensor."""


class PositionCoding(IntEnum):
    """How the kept places of a chunk's subset are written down; both ends derive it from the counts."""

    ALL = 0
    """Nothing to write."""
    EXACT = 1
    """Few: `swarm.compress.ranges`, within a hundredth of a bit of log2 C(n, k)."""
    GAPS = 2
    BITMAP = 3


@dataclass(frozen=True)
class Crowd:
    """Runs whose positions share one table: one coding, densities within an eighth of an octave."""

    coding: PositionCoding
    octave_eighths: int
    """8 log2(subset / kept), rounded."""
    runs: NDArray[np.void]
    places: int
    """Kept places, all chunks together."""
    symbols: int
    """How many symbols there are: exactly for bitmaps, at least for gaps."""
    most_symbols: int


@dataclass(frozen=True)
class Plan:
    runs: NDArray[np.void]
    all: NDArray[np.void]
    """Runs that keep all of a proper subset; where a whole chunk is kept no list of places is made."""
    exact: NDArray[np.void]
    crowds: tuple[Crowd, ...]
    values: int
    places: int
    groups: int
    group_values: NDArray[np.int64]
    group_tensor: NDArray[np.int64]


@dataclass(frozen=True)
class Counts:
    """Of a chunk: how many coordinates may be sent, and how many of those are."""

    subset: int
    kept: int


def counts(length: int, settings: CodecSettings, step: int = 0) -> Counts:
    """At least one coordinate of every chunk is kept."""
    subset = max(1, round(settings.random_keep * length))
    density = min(1.0, settings.density * (_QUARTERS[step % 4] * 2.0 ** (step // 4)))
    return Counts(subset, max(1, round(density * subset)))


def position_coding(subset: int, kept: int) -> PositionCoding:
    if kept == subset:
        return PositionCoding.ALL
    if kept <= _MOST_EXACT:
        return PositionCoding.EXACT
    return PositionCoding.BITMAP if kept * 4 >= subset else PositionCoding.GAPS


def octave_eighths(subset: int, kept: int) -> int:
    """8 log2(subset / kept) rounded, by comparison alone."""
    ratio, octave = subset / kept, 0
    while ratio >= 2.0:
        ratio, octave = ratio / 2.0, octave + 1
    # Nearest in ratio, where neighbours are 9% apart.
    return 8 * octave + min(range(9), key=lambda i: abs((*EIGHTHS, 2.0)[i] - ratio))


@lru_cache(maxsize=16)
def even_plan(sizes: tuple[int, ...], settings: CodecSettings) -> Plan:
    """Every tensor at the density of the settings; remembered, since a round asks for the same again and again."""
    return make_plan(sizes, settings, (0,) * len(sizes))


def make_plan(sizes: tuple[int, ...], settings: CodecSettings, steps: tuple[int, ...]) -> Plan:
    """`steps`: of each tensor's density, in quarter octaves."""
    rows_of_run: list[tuple[int, ...]] = []
    codings: list[tuple[PositionCoding, int]] = []
    group_values: list[int] = []
    group_tensor: list[int] = []
    start = places = values = 0
    for tensor, (size, step) in enumerate(zip(sizes, steps, strict=True)):
        whole, rest = divmod(size, settings.chunk)
        of_whole = counts(settings.chunk, settings, step)
        group_rows = -(-GROUP_VALUES // of_whole.kept)
        first_group = len(group_values)
        n_groups = max(1, whole // group_rows)
        last_group = first_group + n_groups - 1
        of_group = [group_rows * of_whole.kept] * n_groups
        of_group[-1] = (whole - (n_groups - 1) * group_rows) * of_whole.kept
        for rows, length, first_chunk in ((whole, settings.chunk, 0), (int(rest > 0), rest, whole)):
            if not rows:
                continue
            counted = counts(length, settings, step)
            coding = position_coding(counted.subset, counted.kept)
            listed = counted.kept < length
            # A shorter last chunk belongs to the last group whatever its row.
            group = first_group if length == settings.chunk else last_group
            rows_of_run.append(
                (
                    start,
                    rows,
                    length,
                    counted.subset,
                    counted.kept,
                    places,
                    values,
                    group,
                    group_rows,
                    last_group,
                    tensor,
                    first_chunk,
                )
            )
            codings.append((coding, octave_eighths(counted.subset, counted.kept)))
            start += rows * length
            values += rows * counted.kept
            places += rows * counted.kept * listed
            if length != settings.chunk:
                of_group[-1] += counted.kept
        group_values += of_group
        group_tensor += [tensor] * n_groups
    runs = np.array(rows_of_run, RUN)
    return Plan(
        runs,
        runs[[c is PositionCoding.ALL and r["kept"] < r["length"] for (c, _), r in zip(codings, runs, strict=True)]],
        runs[[c is PositionCoding.EXACT for c, _ in codings]],
        _crowds(runs, codings),
        values,
        places,
        len(group_values),
        np.array(group_values, np.int64),
        np.array(group_tensor, np.int64),
    )


def _crowds(runs: NDArray[np.void], codings: list[tuple[PositionCoding, int]]) -> tuple[Crowd, ...]:
    members: dict[tuple[PositionCoding, int], list[int]] = {}
    for index, key in enumerate(codings):
        if key[0] in (PositionCoding.GAPS, PositionCoding.BITMAP):
            members.setdefault(key, []).append(index)
    crowds: list[Crowd] = []
    for (coding, eighths), indices in sorted(members.items()):
        own = runs[indices]
        places = int((own["rows"] * own["kept"]).sum())
        if coding is PositionCoding.BITMAP:
            least = most = int((own["rows"] * ((own["subset"] + 7) // 8)).sum())
        else:
            least = places
            most = places + int((own["rows"] * ((own["subset"] - own["kept"]) // 255)).sum())
        crowds.append(Crowd(coding, eighths, own, places, least, most))
    return tuple(crowds)
