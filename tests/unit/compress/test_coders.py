"""The two entropy coders alone: what goes in comes out, at the size it should have, and any bytes end somewhere."""

from __future__ import annotations

from math import lgamma, log, log2

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from swarm.compress import levels, plan, ranges, rans
from swarm.compress.plan import RUN
from swarm.errors import CodecError

weights = st.lists(st.integers(0, 2**40), min_size=1, max_size=256).filter(any)


def choices_bits(n: int, k: int) -> float:
    return (lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)) / log(2)


@settings(deadline=None)
@given(weights, st.sampled_from([256, 4096, 1 << 14]))
def test_frequencies_keep_what_occurs(given_weights: list[int], total: int) -> None:
    shares = rans.normalized(given_weights, total)
    assert sum(shares) == total
    assert all((share > 0) == (weight > 0) for share, weight in zip(shares, given_weights, strict=True))


@settings(deadline=None)
@given(weights, st.integers(0, 300), st.integers(0, 99))
def test_symbols_round_trip(given_weights: list[int], count: int, seed: int) -> None:
    possible = np.flatnonzero(given_weights).astype(np.uint8)
    symbols = np.random.default_rng(seed).choice(possible, count)
    table = rans.table(given_weights)
    reader = rans.Reader(rans.write(symbols, table))
    assert np.array_equal(reader.read(count, table), symbols)
    reader.finish()


@pytest.mark.parametrize("count", [65_535, 65_536, 65_537, 200_003])
def test_symbols_take_their_information(count: int) -> None:
    """Across segments, and two streams behind each other."""
    odds = 0.94 ** np.arange(200)
    symbols = np.random.default_rng(count).choice(200, count, p=odds / odds.sum()).astype(np.uint8)
    table = rans.table([int(1e9 * p) for p in odds])
    even = rans.table([1] * 256)
    data = rans.write(symbols, table) + rans.write(symbols, even)
    entropy_bits = -float(np.log2(odds / odds.sum())[symbols].sum())
    assert 8 * len(data) < 1.004 * entropy_bits + 8 * count + 8 * 32 * (1 + count / 65_536)
    reader = rans.Reader(data)
    assert np.array_equal(reader.read(count, table), symbols)
    assert np.array_equal(reader.read(count, even), symbols)
    reader.finish()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), weights, st.integers(1, 500))
def test_any_words_end_in_symbols_or_a_typed_error(data: bytes, given_weights: list[int], count: int) -> None:
    try:
        reader = rans.Reader(data)
        symbols = reader.read(count, rans.table(given_weights))
        reader.finish()
    except CodecError:
        return
    assert set(symbols.tolist()) <= set(np.flatnonzero(given_weights).tolist())


def read_all(data: bytes, count: int, table: rans.Table) -> None:
    reader = rans.Reader(data)
    reader.read(count, table)
    reader.finish()


def test_damaged_words_are_noticed() -> None:
    """States that do not return to their start: all but about one in 2^64 damaged streams."""
    table = rans.table([3, 2, 1])
    symbols = np.random.default_rng(0).integers(0, 3, 500).astype(np.uint8)
    data = rans.write(symbols, table)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CodecError):
            read_all(bytes(damaged), 500, table)
    for size in range(0, len(data), 2):
        with pytest.raises(CodecError, match="cut short"):
            rans.Reader(data[:size]).read(500, table)


def runs_of(rows: int, subset: int, kept: int) -> NDArray[np.void]:
    runs = np.zeros(1, RUN)
    runs["rows"], runs["subset"], runs["kept"] = rows, subset, kept
    return runs


@pytest.mark.parametrize(
    ("subset", "kept"), [(1, 1), (31, 31), (32, 31), (102, 2), (307, 5), (819, 13), (4096, 31), (65536, 1), (65536, 31)]
)
def test_few_positions_take_no_more_than_they_must(subset: int, kept: int) -> None:
    rng = np.random.default_rng(subset)
    rows = 60
    places = np.concatenate([np.sort(rng.choice(subset, kept, replace=False)) for _ in range(rows)]).astype(np.uint16)
    writer = ranges.Writer(16 * places.size)
    writer.positions(runs_of(rows, subset, kept), places)
    data = writer.finish()
    assert 8 * len(data) <= 1.002 * rows * choices_bits(subset, kept) + 16
    read = np.zeros_like(places)
    ranges.Reader(data).positions(runs_of(rows, subset, kept), read)
    assert np.array_equal(read, places)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 65536), st.data())
def test_extreme_positions_round_trip_within_their_room(subset: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, min(31, subset)))
    place = st.one_of(st.integers(0, subset - 1), st.integers(max(0, subset - 40), subset - 1))
    chosen = data.draw(st.sets(place, min_size=min(kept, 5), max_size=kept))
    rest = (p for p in (*range(40), *range(subset)) if p not in chosen)
    while len(chosen) < kept:
        chosen = {*chosen, next(rest)}
    places = np.array(sorted(chosen), np.uint16)
    writer = ranges.Writer(16 * kept)
    writer.positions(runs_of(1, subset, kept), places)
    written = writer.finish()
    read = np.zeros_like(places)
    ranges.Reader(written).positions(runs_of(1, subset, kept), read)
    assert np.array_equal(read, places)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60), st.integers(1, 2000), st.integers(1, 31))
def test_any_bytes_are_positions_in_bounds(data: bytes, subset: int, kept: int) -> None:
    kept = min(kept, subset)
    places = np.zeros(3 * kept, np.uint16)
    ranges.Reader(data).positions(runs_of(3, subset, kept), places)
    for row in places.reshape(3, kept).astype(int):
        assert (np.diff(row) > 0).all()
        assert row[-1] < subset


@settings(deadline=None)
@given(st.lists(st.one_of(st.integers(-5, 5), st.integers(-(1 << 20), 1 << 20)), max_size=60), st.integers(1, 3))
def test_numbers_round_trip(numbers: list[int], kinds: int) -> None:
    writer, odds = ranges.Writer(200 * len(numbers)), ranges.learned(kinds)
    for index, number in enumerate(numbers):
        writer.number(number, odds, index % kinds)
    reader, odds = ranges.Reader(writer.finish()), ranges.learned(kinds)
    assert [reader.number(odds, index % kinds) for index in range(len(numbers))] == numbers


def test_numbers_cost_about_their_entropy() -> None:
    numbers = np.round(np.random.default_rng(0).normal(0, 2, 2000)).astype(int)
    writer, odds = ranges.Writer(20_000), ranges.learned(1)
    for number in numbers:
        writer.number(int(number), odds, 0)
    assert 8 * len(writer.finish()) < 1.05 * numbers.size * log2(2 * 4.133)


group = st.tuples(st.integers(-400, 400), st.integers(0, 63), st.integers(0, 4), st.integers(0, 3), st.booleans())


@settings(deadline=None)
@given(st.lists(group, max_size=40), st.booleans())
def test_levels_round_trip(groups: list[tuple[int, int, int, int, bool]], with_fraction: bool) -> None:
    table = np.array([g[:4] for g in groups], np.int64).reshape(-1, 4)
    zero = np.array([g[4] for g in groups], np.bool_)
    top, fraction = np.where(zero, levels.ZERO, table[:, 0]), np.where(zero, 0, table[:, 1])
    classes, names = table[:, 2].copy(), table[:, 3].copy()
    writer = ranges.Writer(400 * len(groups))
    writer.levels(top, fraction if with_fraction else None, classes, names, levels.ZERO)
    read_top, read_fraction = ranges.Reader(writer.finish()).levels(
        classes, names, levels.ZERO, with_fraction=with_fraction
    )
    assert np.array_equal(read_top, top)
    assert np.array_equal(read_fraction, fraction if with_fraction else np.zeros_like(fraction))


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.uint8, 40), st.integers(0, 4))
def test_any_bytes_are_levels_or_a_typed_error(data: NDArray[np.uint8], class_: int) -> None:
    classes = np.full(12, class_, np.int64)
    top, fraction = ranges.Reader(data.tobytes()).levels(classes, classes * 0, levels.ZERO, with_fraction=True)
    try:
        floor, step = levels.levels(top, fraction, np.int64(2) << classes, 4)
    except CodecError:
        return
    assert np.isfinite(floor + 7 * step).all()
    assert (floor >= 0).all()
    assert (step >= 0).all()


def test_the_exact_coder_takes_every_chunk_that_the_plan_gives_it() -> None:
    assert plan.position_coding(4096, ranges.MOST_KEPT) is plan.PositionCoding.EXACT
    assert plan.position_coding(4096, ranges.MOST_KEPT + 1) is not plan.PositionCoding.EXACT
