"""The parts of the codec against plain, slow versions of themselves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from swarm.compress import packing, positions, quantize, select
from swarm.compress.chunks import chunk_groups
from swarm.compress.positions import PositionCoding
from swarm.config import CodecSettings
from swarm.errors import CodecError

ranks = hnp.arrays(
    np.uint32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=40),
    elements=st.sampled_from([0, 1, 2, 7, 2**32 - 1]),
)


@settings(deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=6), st.integers(1, 150))
def test_chunks_cover_every_coordinate_once(sizes: list[int], chunk: int) -> None:
    by_key = {f"{index}/w": size for index, size in enumerate(sizes)}
    flats = {key: np.arange(size) for key, size in by_key.items()}
    copies = {key: np.full(size, -1) for key, size in by_key.items()}
    groups = chunk_groups(by_key, chunk)
    assert [group.length for group in groups] == sorted({group.length for group in groups}, reverse=True)
    for group in groups:
        rows = group.gather(flats)
        assert rows.shape == (group.rows, group.length)
        assert group.length <= chunk
        assert (rows[:, 0] % chunk == 0).all()
        group.scatter(rows, copies)
    for key, flat in flats.items():
        assert np.array_equal(copies[key], flat)


@settings(deadline=None)
@given(ranks, st.data())
def test_top_positions(ranks_RN: NDArray[np.uint32], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, ranks_RN.shape[1]))
    chosen = select.top_positions(ranks_RN, count)
    for row, picked in zip(ranks_RN, chosen, strict=True):
        by_rank = sorted(range(row.size), key=lambda place: (-int(row[place]), place))
        assert list(picked) == sorted(by_rank[:count])


@pytest.mark.parametrize(
    ("length", "keep", "density", "expected"),
    [
        (4096, 1.0, 0.0625, (4096, 256)),
        (5, 0.2, 0.1, (1, 1)),
        (4096, 0.2, 0.1, (819, 82)),
        (1, 1.0, 1.0, (1, 1)),
    ],
)
def test_counts(length: int, keep: float, density: float, expected: tuple[int, int]) -> None:
    counted = select.counts(length, CodecSettings(random_keep=keep, density=density))
    assert (counted.subset, counted.kept) == expected


@st.composite
def kept_positions(draw: st.DrawFn) -> tuple[int, NDArray[np.int64]]:
    """Places a row, and as many ascending positions in each of a few rows."""
    subset = draw(st.sampled_from([1, 2, 9, 254, 255, 256, 257, 511, 2000]))
    kept = draw(st.integers(1, min(subset, 12)))
    choice = st.sets(st.integers(0, subset - 1), min_size=kept, max_size=kept).map(sorted)
    return subset, np.array(draw(st.lists(choice, min_size=1, max_size=4)), np.int64)


@settings(deadline=None)
@given(kept_positions())
def test_positions_round_trip(case: tuple[int, NDArray[np.int64]]) -> None:
    subset, positions_RK = case
    rows, kept = positions_RK.shape
    gaps = positions.write_gaps(positions_RK)
    assert len(gaps) <= positions.max_gap_bytes(rows, subset, kept)
    read = positions.read_gaps(gaps, rows * kept).reshape(rows, kept)
    assert np.array_equal(positions.positions_from_gaps(read, subset), positions_RK)
    marks = positions.write_bitmap(positions_RK, subset)
    assert len(marks) == positions.bitmap_bytes(rows, subset)
    assert np.array_equal(positions.read_bitmap(marks, rows, subset, kept), positions_RK)


def test_position_coding_follows_the_density() -> None:
    assert positions.position_coding(8, 8) is PositionCoding.ALL
    assert positions.position_coding(4096, 1024) is PositionCoding.BITMAP
    assert positions.position_coding(4096, 512) is PositionCoding.GAPS


@pytest.mark.parametrize("data", [b"", b"\x01", b"\x01\x02\x03", b"\x01\x02\xff", b"\x01\xff", b"\xff\xff"])
def test_wrong_number_of_gaps_is_refused(data: bytes) -> None:
    with pytest.raises(CodecError, match="gaps"):
        positions.read_gaps(data, 2)


def test_positions_beyond_the_chunk_are_refused() -> None:
    with pytest.raises(CodecError, match="beyond"):
        positions.positions_from_gaps(np.array([[0, 0], [5, 4]]), 10)
    with pytest.raises(CodecError, match="exactly 2 of 10"):
        positions.read_bitmap(b"\xc0\x00\x80\x20", 2, 10, 2)


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(np.float32, (3, 20), elements=st.floats(0, width=32, allow_nan=False, allow_infinity=False)),
    st.integers(1, 8),
)
def test_quantize_any_magnitudes(magnitudes_RK: NDArray[np.float32], bits: int) -> None:
    codes_RK, levels_RP = quantize.quantize(magnitudes_RK, bits)
    decoded = quantize.dequantize(codes_RK, levels_RP, bits)
    assert codes_RK.max(initial=0) < 1 << (bits - 1)
    assert (decoded.shape, decoded.dtype) == (magnitudes_RK.shape, np.float32)
    for row in range(3):
        alone = quantize.quantize(magnitudes_RK[row : row + 1], bits)
        assert np.array_equal(alone[0][0], codes_RK[row])
        assert np.array_equal(alone[1][0], levels_RP[row])
    capped = np.minimum(magnitudes_RK.astype(np.float64), 2.0**126)
    mean = capped.mean(axis=1)
    error = np.sqrt(np.square(decoded - capped).mean(axis=1))
    # Never much worse than one level at the mean, whose error is the standard deviation.
    assert (error <= 1.1 * capped.std(axis=1) + 0.01 * mean + 1e-38).all()


def test_two_levels_are_the_centroids() -> None:
    magnitudes = np.array([[1, 1.5, 2, 9, 10, 11, 2, 1.5]], np.float32)
    codes, levels = quantize.quantize(magnitudes, 2)
    assert list(codes[0]) == [0, 0, 0, 1, 1, 1, 0, 0]
    assert list(quantize.dequantize(codes, levels, 2)[0][[0, 3]]) == pytest.approx([1.6, 10], rel=0.01)


@pytest.mark.parametrize("levels", [[0x7F80, 0], [0, 0x7F80], [0x7FC0, 0], [0x8000, 0], [0, 0xBF80], [0x7F7F, 0x7F7F]])
def test_levels_that_are_no_magnitudes_are_refused(levels: list[int]) -> None:
    with pytest.raises(CodecError, match="level"):
        quantize.dequantize(np.zeros((1, 4), np.uint8), np.array([levels], np.uint16), 4)


def test_subnormal_levels_are_zero() -> None:
    """Some processes flush subnormals (torch.set_flush_denormal); all must decode the same bits."""
    codes = np.arange(4, dtype=np.uint8)[None]
    assert not quantize.dequantize(codes, np.array([[0x007F, 0x0001]], np.uint16), 3).any()
    assert list(quantize.dequantize(codes, np.array([[0x0001, 0x3F80]], np.uint16), 3)[0]) == [0, 1, 2, 3]


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 40), st.data())
def test_packing_round_trip(bits: int, rows: int, kept: int, data: st.DataObject) -> None:
    codes = data.draw(hnp.arrays(np.uint8, (rows, kept), elements=st.integers(0, (1 << (bits - 1)) - 1)))
    packed = packing.write_codes(codes, bits)
    assert len(packed) == packing.code_bytes(rows, kept, bits)
    assert np.array_equal(packing.read_codes(packed, rows, kept, bits), codes)
    values = data.draw(hnp.arrays(np.float32, (rows, kept), elements=st.sampled_from([-1.0, -0.0, 0.0, 2.0])))
    packed = packing.write_signs(values)
    assert len(packed) == packing.sign_bytes(rows, kept)
    assert np.array_equal(packing.read_signs(packed, rows, kept), values < 0)
    levels = data.draw(hnp.arrays(np.uint16, (rows, packing.levels_per_row(bits))))
    packed = packing.write_levels(levels)
    assert len(packed) == packing.level_bytes(rows, bits)
    assert np.array_equal(packing.read_levels(packed, rows, bits), levels)
