"""Where frozen weights lie on a CPU: side by side in large pages.

Decoding reads every weight once a token, in the order of the blocks. In pages of 4 KiB the processor looks up an
address every 4 KiB and stops fetching ahead there: one core of a Xeon reads 13 GB/s, in pages of 2 MiB 17 to 18
(docs/experiments.md, "Few rows in float32"). The system gives large pages to memory that asks for them and is private
to the process; a mapped file and torch's own blocks of a few MiB have none.

In: tensors as they were loaded. Out: the same values in the arena, or the tensor itself where there is nothing to
gain (not on a CPU). Memory is asked for in slabs and taken as tensors are placed; it goes back when the last tensor of
a slab is gone. Where the system has no large pages the tensors lie in ordinary ones.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch

from swarm.errors import OutOfMemory

_PAGE = 2 * 1024**2
_SLAB = 64 * 1024**2
_ALIGN = 64
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)


class Arena:
    """For tensors that are never written to again."""

    def __init__(self) -> None:
        self._slab = torch.empty(0, dtype=torch.uint8)

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same values, contiguous. Raises OutOfMemory."""
        if tensor.device.type != "cpu" or not tensor.nbytes:
            return tensor
        taken = tensor.nbytes + -tensor.nbytes % _ALIGN
        if taken > self._slab.numel():
            self._slab = _slab(max(taken, _SLAB))
        piece, self._slab = self._slab[: tensor.nbytes], self._slab[taken:]
        return piece.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _slab(size: int) -> torch.Tensor:
    """At least `size` bytes that begin with a page."""
    if _ADVICE is None:
        return torch.empty(size, dtype=torch.uint8)
    try:
        memory = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise OutOfMemory(f"the system gives no {size} bytes for weights: {error.strerror}") from error
    with suppress(OSError):  # a kernel without large pages refuses the advice
        memory.madvise(_ADVICE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return whole[-whole.data_ptr() % _PAGE :][:size]
