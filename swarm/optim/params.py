"""Hashes and layout of a job's parameters, the same on coordinator and nodes. Pure numpy.

The reference parameters of a job are the fp32 sum of decoded updates; every published update
carries the hashes made here, so that a node that drifted notices and fetches a snapshot.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from swarm.errors import CorruptData
from swarm.ids import block_of, block_order, key_order

Shape = tuple[int, ...]


def by_block(keys: Iterable[str]) -> dict[str, list[str]]:
    """Parameter keys grouped by block: blocks in block order, keys in key order."""
    grouped: dict[str, list[str]] = {}
    for key in sorted(keys, key=key_order):
        grouped.setdefault(block_of(key), []).append(key)
    return grouped


def raw_bytes(array: NDArray[np.float32]) -> bytes:
    """Little-endian float32 in C order."""
    return np.ascontiguousarray(array, dtype="<f4").tobytes()


def block_hash(params: Mapping[str, NDArray[np.float32]]) -> bytes:
    """SHA-256 over the keys, shapes and bytes of one block's parameters, in key order.

    Each part is preceded by its length, so that no two different blocks give the same text.
    """
    digest = hashlib.sha256()
    for key in sorted(params, key=key_order):
        array = params[key]
        header = f"{key}\x1f{','.join(str(size) for size in array.shape)}".encode()
        digest.update(len(header).to_bytes(4, "little"))
        digest.update(header)
        digest.update(raw_bytes(array))
    return digest.digest()


def params_hash(block_hashes: Mapping[str, bytes]) -> bytes:
    """SHA-256 over the names and hashes of all blocks, in block order."""
    digest = hashlib.sha256()
    for block in sorted(block_hashes, key=block_order):
        digest.update(f"{block}\x1f".encode())
        digest.update(block_hashes[block])
    return digest.digest()


def hash_all(params: Mapping[str, NDArray[np.float32]]) -> bytes:
    """`params_hash` of a whole set of parameters."""
    return params_hash(
        {block: block_hash({key: params[key] for key in keys}) for block, keys in by_block(params).items()}
    )


def pack_block(params: Mapping[str, NDArray[np.float32]]) -> bytes:
    """One block as a snapshot holds it: raw values, keys in key order, nothing between them."""
    return b"".join(raw_bytes(params[key]) for key in sorted(params, key=key_order))


def unpack_block(data: bytes, shapes: Mapping[str, Shape]) -> dict[str, NDArray[np.float32]]:
    """Inverse of `pack_block`; `shapes` are those of exactly the block's keys. Raises CorruptData."""
    expected = 4 * sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes.values())
    if len(data) != expected:
        raise CorruptData(f"a block's snapshot has {len(data)} bytes instead of {expected}", "fetch it again")
    params: dict[str, NDArray[np.float32]] = {}
    offset = 0
    for key in sorted(shapes, key=key_order):
        count = int(np.prod(shapes[key], dtype=np.int64))
        values = np.frombuffer(data, dtype="<f4", count=count, offset=offset)
        params[key] = values.astype(np.float32).reshape(shapes[key])
        offset += 4 * count
    return params
