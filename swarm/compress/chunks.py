"""Which coordinates share a chunk, and how chunks of many tensors become one matrix.

A tensor of n elements, flattened in C order, is cut every `chunk` elements; the last chunk is
shorter. Chunks of equal length are stacked as rows of one matrix, so that numpy works on all of
them at once; nothing computed from a row may depend on the other rows.

In: element counts by parameter key, in key order. Out: groups of chunks in a fixed order (longest
first, then key order, then position), the same on both ends. Never looks at values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True)
class Piece:
    """`rows` consecutive chunks of one tensor, from flat position `start` on."""

    key: str
    start: int
    rows: int


@dataclass(frozen=True)
class ChunkGroup:
    """Every chunk of one length, over all tensors. Matrices of a group are [rows, length]."""

    length: int
    pieces: tuple[Piece, ...]

    @property
    def rows(self) -> int:
        return sum(piece.rows for piece in self.pieces)

    def gather(self, flats: Mapping[str, NDArray[Scalar]]) -> NDArray[Scalar]:
        """Rows [rows, length] out of flat tensors, copied."""
        return np.concatenate(
            [
                flats[piece.key][piece.start : piece.start + piece.rows * self.length].reshape(piece.rows, -1)
                for piece in self.pieces
            ]
        )

    def scatter(self, values_RL: NDArray[Scalar], flats: Mapping[str, NDArray[Scalar]]) -> None:
        """The inverse of `gather`: writes rows into flat tensors."""
        row = 0
        for piece in self.pieces:
            end = piece.start + piece.rows * self.length
            flats[piece.key][piece.start : end] = values_RL[row : row + piece.rows].reshape(-1)
            row += piece.rows


def chunk_groups(sizes: Mapping[str, int], chunk: int) -> list[ChunkGroup]:
    """The groups of all chunks of tensors with `sizes` elements each (at least one)."""
    pieces: dict[int, list[Piece]] = {}
    for key, size in sizes.items():
        whole, rest = divmod(size, chunk)
        if whole:
            pieces.setdefault(chunk, []).append(Piece(key, 0, whole))
        if rest:
            pieces.setdefault(rest, []).append(Piece(key, whole * chunk, 1))
    return [ChunkGroup(length, tuple(pieces[length])) for length in sorted(pieces, reverse=True)]
