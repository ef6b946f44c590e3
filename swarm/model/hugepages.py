"""Where frozen weights lie on a CPU.

Decoding reads every weight of a span once a token, one after the other. As a checkpoint file's tensors come,
they lie in 4 KiB pages of the page cache; copied one behind the other into memory that Linux may back
with 2 MiB pages, the same blocks take 4 % less time. (30 blocks of SmolLM2-135M, fp32, one token,
one thread, median of 12 alternating runs: 46.3 → 44.4 ms; fresh 4 KiB pages alone: 45.7.)
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from contextlib import suppress

import torch

_HUGE_PAGE_BYTES = 2 * 1024 * 1024
_ALIGNMENT_BYTES = 64


def in_huge_pages(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of CPU tensors, in their order, in one piece of memory that lives as long as any of them.

    Where the kernel has no huge pages they are copies and nothing more.
    """
    sizes = {name: _rounded(tensor.nbytes, _ALIGNMENT_BYTES) for name, tensor in tensors.items()}
    area = mmap.mmap(-1, _rounded(sum(sizes.values()), _HUGE_PAGE_BYTES) + _HUGE_PAGE_BYTES)
    with suppress(AttributeError, OSError):  # another system than Linux; a kernel built without them
        area.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(area, dtype=torch.uint8)
    offset = -memory.data_ptr() % _HUGE_PAGE_BYTES
    copies = {}
    for name, tensor in tensors.items():
        place = memory[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        copies[name] = place.copy_(tensor)
        offset += sizes[name]
    return copies


def _rounded(size: int, unit: int) -> int:
    return -(-size // unit) * unit
