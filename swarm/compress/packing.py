"""How signs, magnitude codes and levels are laid out as bytes.

In: one row a chunk. Out: bytes whose number follows from the counts alone, and back. Codes are
packed so that no code straddles a byte, in fields of 1, 2, 4 or 8 bits: zstandard's Huffman stage
works on bytes and wins back the unused bits and the skewed frequencies of the levels. Signs are
apart because nothing compresses them. Each row starts on a byte of its own.

Never validates: every byte pattern of the right length means something; levels are checked where
they are used.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def sign_bytes(rows: int, kept: int) -> int:
    return rows * ((kept + 7) // 8)


def write_signs(values_RK: NDArray[np.float32]) -> bytes:
    """One bit a value, set where it is below zero."""
    return np.packbits(values_RK < 0, axis=1).tobytes()


def read_signs(data: bytes, rows: int, kept: int) -> NDArray[np.bool_]:
    packed = np.frombuffer(data, np.uint8).reshape(rows, -1)
    return np.unpackbits(packed, axis=1, count=kept).view(np.bool_)


def _field_bits(bits: int) -> int:
    """Width of a field for codes of `bits - 1` bits: the next power of two."""
    return 1 << (bits - 2).bit_length()


def code_bytes(rows: int, kept: int, bits: int) -> int:
    """Zero for one bit a value: its sign is all there is."""
    return 0 if bits == 1 else rows * -(-kept * _field_bits(bits) // 8)


def write_codes(codes_RK: NDArray[np.uint8], bits: int) -> bytes:
    if bits == 1:
        return b""
    rows, kept = codes_RK.shape
    field = _field_bits(bits)
    per_byte = 8 // field
    padded = np.zeros((rows, -(-kept // per_byte), per_byte), np.uint8)
    padded.reshape(rows, -1)[:, :kept] = codes_RK
    shifts = np.arange(0, 8, field, dtype=np.uint8)
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(padded << shifts, axis=2)
    return packed.tobytes()


def read_codes(data: bytes, rows: int, kept: int, bits: int) -> NDArray[np.uint8]:
    if bits == 1:
        return np.zeros((rows, kept), np.uint8)
    packed = np.frombuffer(data, np.uint8).reshape(rows, -1, 1)
    shifts = np.arange(0, 8, _field_bits(bits), dtype=np.uint8)
    codes = (packed >> shifts) & np.uint8((1 << (bits - 1)) - 1)
    return codes.reshape(rows, -1)[:, :kept]


def levels_per_row(bits: int) -> int:
    return 1 if bits == 1 else 2


def level_bytes(rows: int, bits: int) -> int:
    return rows * levels_per_row(bits) * 2


def write_levels(levels_RP: NDArray[np.uint16]) -> bytes:
    """Byte planes, [P, low and high, R]: neighbouring chunks have similar exponents."""
    planes = np.ascontiguousarray(levels_RP, "<u2").view(np.uint8).reshape(*levels_RP.shape, 2)
    return planes.transpose(1, 2, 0).tobytes()


def read_levels(data: bytes, rows: int, bits: int) -> NDArray[np.uint16]:
    planes = np.frombuffer(data, np.uint8).reshape(levels_per_row(bits), 2, rows)
    return np.ascontiguousarray(planes.transpose(2, 0, 1)).view("<u2")[:, :, 0].astype(np.uint16)
