"""The parts of the codec against plain, slow versions of themselves."""

from __future__ import annotations

from decimal import Decimal, getcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from swarm.compress import allocate, levels, plan, positions, quantize, ranges, select, values
from swarm.compress.plan import RUN, Crowd, PositionCoding
from swarm.config import CodecSettings
from swarm.errors import CodecError


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 4000), min_size=1, max_size=6),
    st.integers(64, 1500),
    st.sampled_from([0.001, 0.1, 0.5, 1.0]),
    st.data(),
)
def test_chunks_and_groups_cover_every_coordinate_once(
    sizes: list[int], chunk: int, density: float, data: st.DataObject
) -> None:
    codec = CodecSettings(density=density, chunk=chunk, random_keep=0.7)
    steps = tuple(data.draw(st.integers(-16, 16)) for _ in sizes)
    made = plan.make_plan(tuple(sizes), codec, steps)
    at = places = value = 0
    group_values = np.zeros(made.groups, np.int64)
    for run in made.runs:
        assert (run["start"], run["first_place"], run["first_value"]) == (at, places, value)
        assert run["length"] == chunk or (run["rows"] == 1 and run["length"] < chunk)
        counted = plan.counts(int(run["length"]), codec, steps[run["tensor"]])
        assert (run["subset"], run["kept"]) == (counted.subset, counted.kept)
        at += int(run["rows"] * run["length"])
        value += int(run["rows"] * run["kept"])
        places += int(run["rows"] * run["kept"]) * bool(run["kept"] < run["length"])
        for row in range(run["rows"]):
            group = min(run["first_group"] + row // run["group_rows"], run["last_group"])
            group_values[group] += run["kept"]
            assert made.group_tensor[group] == run["tensor"]
    assert (at, value, places) == (sum(sizes), made.values, made.places)
    assert np.array_equal(group_values, made.group_values)
    listed = sum(len(runs) for runs in (made.all, made.exact, *(crowd.runs for crowd in made.crowds)))
    assert listed == np.count_nonzero(made.runs["kept"] < made.runs["length"])


@pytest.mark.parametrize(
    ("length", "keep", "density", "step", "expected"),
    [
        (4096, 1.0, 0.0625, 0, (4096, 256)),
        (4096, 1.0, 0.0625, 4, (4096, 512)),
        (4096, 1.0, 0.0625, -2, (4096, 181)),
        (4096, 1.0, 0.5, 16, (4096, 4096)),
        (5, 0.2, 0.1, 0, (1, 1)),
        (4096, 0.2, 0.1, 0, (819, 82)),
        (1, 1.0, 1.0, 0, (1, 1)),
    ],
)
def test_counts(length: int, keep: float, density: float, step: int, expected: tuple[int, int]) -> None:
    counted = plan.counts(length, CodecSettings(random_keep=keep, density=density), step)
    assert (counted.subset, counted.kept) == expected


def test_powers_of_two_are_rounded_correctly() -> None:
    getcontext().prec = 40
    for step, value in enumerate(plan.EIGHTHS):
        assert value == float(Decimal(2) ** (Decimal(step) / 8))
    for index in (0, 1, 31, 32, 777, 3519, 3520, 3521, 7551, 7552):
        exact = Decimal(2) ** (Decimal(index) / 32 + levels.LOWEST_OCTAVE)
        assert levels.tops()[index] == np.float32(float(exact))
    assert levels.tops().size == 32 * (levels.HIGHEST_OCTAVE - levels.LOWEST_OCTAVE) + 1


def runs_of(rows: int, length: int, subset: int, kept: int) -> NDArray[np.void]:
    runs = np.zeros(1, RUN)
    for name, value in {"rows": rows, "length": length, "subset": subset, "kept": kept, "group_rows": 1}.items():
        runs[name] = value
    return runs


some_floats = st.sampled_from([0.0, -0.0, 1e-45, 1.0, -1.0, 1.0000001, -2.0, 3e38, 1.5, 1.25])


@settings(deadline=None)
@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=60), elements=some_floats), st.data())
def test_the_largest_are_kept_and_ties_go_left(rows_RN: NDArray[np.float32], data: st.DataObject) -> None:
    rows, length = rows_RN.shape
    kept = data.draw(st.integers(1, length))
    places = np.zeros(rows * kept, np.uint16)
    select.largest(rows_RN.reshape(-1), runs_of(rows, length, length, kept), np.zeros(1, np.uint64), places, length)
    if kept == length:
        return
    for row, picked in zip(rows_RN, places.reshape(rows, kept), strict=True):
        by_rank = sorted(range(length), key=lambda place: (-abs(float(row[place])), place))
        assert list(picked) == sorted(by_rank[:kept])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(100, 5000), st.data())
def test_the_largest_of_many(seed: int, length: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, length - 1))
    values_N = np.random.default_rng(seed).standard_t(3, length).astype(np.float32)
    places = np.zeros(kept, np.uint16)
    select.largest(values_N, runs_of(1, length, length, kept), np.zeros(1, np.uint64), places, length)
    assert set(places.tolist()) == set(np.argsort(np.abs(values_N))[-kept:].tolist())


@settings(deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(2, 900), st.data())
def test_a_subset_is_drawn_without_repetition(seed: int, length: int, data: st.DataObject) -> None:
    subset = data.draw(st.integers(1, length - 1))
    runs = runs_of(3, length, subset, subset)
    drawn = np.tile(np.arange(subset, dtype=np.uint16), 3)
    select.in_chunks(runs, np.array([seed], np.uint64), drawn, length)
    rows = drawn.reshape(3, subset).astype(int)
    assert (np.diff(rows, axis=1) > 0).all()
    assert (rows[:, -1] < length).all()
    assert not subset or subset < 8 or (rows[0] != rows[1]).any()


@pytest.mark.parametrize("subset", [30, 77, 149])
def test_every_coordinate_is_drawn_equally_often(subset: int) -> None:
    length, rounds = 150, 4000
    runs = runs_of(rounds, length, subset, subset)
    drawn = np.tile(np.arange(subset, dtype=np.uint16), rounds)
    select.in_chunks(runs, np.array([7], np.uint64), drawn, length)
    share = np.bincount(drawn, minlength=length) / rounds
    deviation = np.sqrt(subset / length * (1 - subset / length) / rounds)
    assert np.abs(share - subset / length).max() < 5 * deviation


@st.composite
def kept_places(draw: st.DrawFn) -> tuple[int, NDArray[np.uint16]]:
    """Places a row, and as many ascending positions in each of a few rows."""
    subset = draw(st.sampled_from([1, 2, 9, 254, 255, 256, 257, 511, 2000]))
    kept = draw(st.integers(1, min(subset, 12)))
    choice = st.sets(st.integers(0, subset - 1), min_size=kept, max_size=kept).map(sorted)
    return subset, np.array(draw(st.lists(choice, min_size=1, max_size=4)), np.uint16)


def crowd_of(coding: PositionCoding, rows: int, subset: int, kept: int) -> Crowd:
    least, most = rows * kept, rows * (kept + (subset - kept) // 255)
    if coding is PositionCoding.BITMAP:
        least = most = rows * ((subset + 7) // 8)
    eighths = plan.octave_eighths(subset, kept)
    return Crowd(coding, eighths, runs_of(rows, subset, subset, kept), rows * kept, least, most)


@settings(deadline=None)
@given(kept_places(), st.sampled_from([PositionCoding.GAPS, PositionCoding.BITMAP]))
def test_positions_round_trip(case: tuple[int, NDArray[np.uint16]], coding: PositionCoding) -> None:
    subset, places_RK = case
    crowd = crowd_of(coding, len(places_RK), subset, places_RK.shape[1])
    symbols = positions.symbols_of(crowd, places_RK.reshape(-1))
    assert crowd.symbols <= symbols.size <= crowd.most_symbols
    read = np.zeros(places_RK.size, np.uint16)
    positions.places_of(crowd, symbols, read)
    assert np.array_equal(read, places_RK.reshape(-1))
    assert (positions.table_of(crowd).spans[np.unique(symbols)] & 0xFFFF).all()


def test_position_coding_follows_the_counts() -> None:
    assert plan.position_coding(8, 8) is PositionCoding.ALL
    assert plan.position_coding(4096, 2) is PositionCoding.EXACT
    assert plan.position_coding(4096, 512) is PositionCoding.GAPS
    assert plan.position_coding(4096, 1024) is PositionCoding.BITMAP


@pytest.mark.parametrize(
    "symbols", [[], [1], [1, 2, 3], [1, 2, 255], [1, 255], [255, 255], [5, 4], [9, 0], [255, 0, 0]]
)
def test_gaps_that_do_not_fit_are_refused(symbols: list[int]) -> None:
    with pytest.raises(CodecError, match="gaps"):
        positions.places_of(
            crowd_of(PositionCoding.GAPS, 1, 10, 2), np.array(symbols, np.uint8), np.zeros(2, np.uint16)
        )


@pytest.mark.parametrize("marks", [[0xC0, 0], [3, 0, 7, 0], [3, 0, 1, 0], [3, 0, 3, 4], [0, 0, 3, 3]])
def test_bitmaps_of_another_count_are_refused(marks: list[int]) -> None:
    padded = np.array((marks + [0] * 4)[:4], np.uint8)
    with pytest.raises(CodecError, match="exactly"):
        positions.places_of(crowd_of(PositionCoding.BITMAP, 2, 10, 2), padded, np.zeros(4, np.uint16))


def quantized(magnitudes_RK: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """One group a row, whole chunks, there and back."""
    rows, kept = magnitudes_RK.shape
    made = plan.make_plan((kept,) * rows, CodecSettings(density=1, bits=bits, chunk=65536), (0,) * rows)
    none = np.empty(0, np.uint16)
    symbols, top, fraction = quantize.quantize(magnitudes_RK.reshape(-1), made, none, bits)
    assert symbols.max(initial=0) < 1 << bits
    floor, step = levels.levels(top, fraction, levels.resolutions(made.group_values), bits)
    decoded = np.zeros(magnitudes_RK.size, np.float32)
    quantize.place(decoded, made, none, values.packed(symbols, bits), bits, floor, step)
    return decoded.reshape(rows, kept)


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(np.float32, (3, 20), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
    st.integers(1, 8),
)
def test_quantize_any_values(values_RK: NDArray[np.float32], bits: int) -> None:
    decoded = quantized(values_RK, bits)
    assert np.isfinite(decoded).all()
    assert (decoded * np.sign(values_RK) >= 0).all()
    for row in range(3):
        assert np.array_equal(quantized(values_RK[row : row + 1], bits)[0], decoded[row])
    wide = np.abs(values_RK.astype(np.float64))
    capped = np.where(wide < 2.0**-110, 0, np.minimum(wide, 2.0**126))
    error = np.sqrt(np.square(np.abs(decoded) - capped).mean(axis=1))
    # Never much worse than one level at the mean, whose error is the standard deviation; 20 values that are alike
    # share a level that is within an eighth of an octave.
    assert (error <= 1.1 * capped.std(axis=1) + 0.1 * np.sqrt(np.square(capped).mean(axis=1)) + 2.0**-110).all()


def test_two_levels_are_the_centroids() -> None:
    magnitudes = np.array([[1, 1.5, 2, 9, 10, 11, 2, 1.5] * 130], np.float32)
    decoded = quantized(magnitudes, 2)[0][:8]
    assert list(decoded) == pytest.approx([1.6, 1.6, 1.6, 10, 10, 10, 1.6, 1.6], rel=0.03)


@pytest.mark.parametrize(
    ("top", "fraction"), [(4033, 0), (-3521, 0), (0, 64), (0, -1), (1 << 40, 0), (levels.ZERO + 1, 0)]
)
def test_levels_out_of_bounds_are_refused(top: int, fraction: int) -> None:
    with pytest.raises(CodecError, match="level"):
        levels.levels(np.array([top]), np.array([fraction]), np.array([32]), 4)


def test_every_level_is_normal_or_zero() -> None:
    """Some processes flush subnormals (torch.set_flush_denormal); all must decode the same bits."""
    for bits in range(1, 9):
        top, fraction = np.meshgrid([levels.ZERO, -110 * 32, 0, 126 * 32], np.arange(64))
        floor, step = levels.levels(top.reshape(-1), fraction.reshape(-1), np.full(256, 32), bits)
        with np.errstate(over="raise"):
            highest = floor + step * np.float32((1 << (bits - 1)) - 1)
        for part in (floor, step, highest):
            assert ((part == 0) | (part >= np.finfo(np.float32).tiny)).all()


@settings(deadline=None)
@given(st.integers(1, 8), st.data())
def test_values_pack_and_their_frequencies_travel(bits: int, data: st.DataObject) -> None:
    most = data.draw(st.integers(0, (1 << bits) - 1))
    symbols = data.draw(hnp.arrays(np.uint8, st.integers(0, 60), elements=st.integers(0, most)))
    weights = values.weights_of(symbols, bits)
    writer = ranges.Writer(4000)
    values.write_weights(writer, weights)
    assert values.read_weights(ranges.Reader(writer.finish()), bits) == weights
    packed = values.packed(symbols, bits)
    assert packed.size == values.packed_size(symbols.size, bits)
    # Whatever occurs can be coded.
    assert (values.table_of(weights, bits).spans[packed] & 0xFFFF).all()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40), st.integers(1, 8))
def test_any_bytes_are_frequencies_or_a_typed_error(data: bytes, bits: int) -> None:
    try:
        weights = values.read_weights(ranges.Reader(data), bits)
    except CodecError:
        return
    table = values.table_of(weights, bits)
    assert int((table.spans & 0xFFFF).sum()) == 1 << 14


def test_energy_moves_density_to_where_the_large_values_are() -> None:
    rng = np.random.default_rng(0)
    sizes = (40_000, 40_000, 40_000, 40_000)
    flat = (rng.standard_normal((4, 40_000)) * [[1.0], [1.0], [1.5], [0.1]]).astype(np.float32).reshape(-1)
    codec = CodecSettings(density=0.1)
    steps = allocate.steps_by_energy(flat, sizes, codec)
    assert abs(steps[0] - steps[1]) <= 1  # one of two equals may be what still fits
    assert steps[2] > max(steps[:2])
    assert min(steps[:2]) > steps[3] == -16
    kept = plan.make_plan(sizes, codec, steps).values
    assert 0.85 * 16_000 < kept <= 1.01 * 16_000
    writer = ranges.Writer(100)
    names = allocate.names_of(("0/a", "0/b", "1/a", "1/b"))
    allocate.write_steps(writer, steps, names)
    assert allocate.read_steps(ranges.Reader(writer.finish()), names) == steps


def test_energy_spends_what_it_may_where_values_have_few_magnitudes() -> None:
    """As after a few steps of Adam, which moves most values by nearly as much."""
    rng = np.random.default_rng(1)
    sizes = (4096,) * 100
    steps_taken = rng.binomial(10, rng.uniform(0.05, 0.3, (100, 1)), (100, 4096))
    flat = (1e-3 * steps_taken).astype(np.float32).reshape(-1)
    codec = CodecSettings(density=0.02)
    kept = plan.make_plan(sizes, codec, allocate.steps_by_energy(flat, sizes, codec)).values
    assert 0.95 * 0.02 * flat.size < kept <= 1.02 * 0.02 * flat.size


def test_densities_out_of_bounds_are_refused() -> None:
    writer, names = ranges.Writer(100), allocate.names_of(("0/a", "1/a"))
    allocate.write_steps(writer, (10, 17), names)
    with pytest.raises(CodecError, match="density"):
        allocate.read_steps(ranges.Reader(writer.finish()), names)
