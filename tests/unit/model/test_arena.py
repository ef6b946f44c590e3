"""The arena keeps values as they are, side by side, and holds no memory that no tensor needs."""

from __future__ import annotations

import mmap
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from swarm.errors import OutOfMemory
from swarm.model.arena import Arena


def test_values_shapes_and_dtypes_stay() -> None:
    arena = Arena()
    tensors = [
        torch.randn(7, 5),
        torch.randn(3, 4).to(torch.bfloat16),
        torch.arange(11, dtype=torch.int8),
        torch.tensor(2.5),
        torch.empty(0, 3),
        torch.randn(6, 8).t(),
    ]
    for tensor, placed in [(tensor, arena.place(tensor)) for tensor in tensors]:
        assert placed.dtype == tensor.dtype
        assert torch.equal(placed, tensor)
        assert placed.is_contiguous()


def test_tensors_lie_side_by_side_and_aligned() -> None:
    arena = Arena()
    placed = [arena.place(torch.randn(100)) for _ in range(5)]
    steps = {after.data_ptr() - before.data_ptr() for before, after in pairwise(placed)}
    assert steps == {448}
    assert placed[0].data_ptr() % 64 == 0


def test_one_larger_than_a_slab_gets_its_own() -> None:
    arena = Arena()
    large = torch.ones(80 * 1024**2, dtype=torch.uint8)
    assert torch.equal(arena.place(large), large)


def test_no_memory_is_a_typed_error() -> None:
    class Huge:
        """What the arena looks at of a tensor that no machine holds."""

        device, nbytes = torch.device("cpu"), 2**62

    with pytest.raises(OutOfMemory, match="gives no"):
        Arena().place(Huge())  # type: ignore[arg-type]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_memory_goes_back_with_the_last_tensor() -> None:
    size, arena = 128 * 1024**2, Arena()
    source = torch.ones(size // 2, dtype=torch.uint8)  # made before counting: the heap may keep what it gave for it
    before = resident_bytes()
    placed = [arena.place(source) for _ in range(2)]
    assert resident_bytes() - before > 0.9 * size
    del arena
    placed.pop()
    assert resident_bytes() - before < 0.6 * size
    placed.pop()
    assert resident_bytes() - before < 0.1 * size
