"""Compiled products on as many threads as torch may use.

In: a function that numba compiled with `parallel=True` and that takes the number of its parts last. One call at a
time runs in parts, whatever the kernel: numba's work queue takes work from one thread only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numba
import torch

numba.config.THREADING_LAYER = "workqueue"  # its threads sleep while there is nothing to do
_one_at_a_time = threading.Lock()


def threads_of_torch() -> int:
    """What torch is set to, as far as numba has threads."""
    return min(torch.get_num_threads(), int(numba.config.NUMBA_NUM_THREADS))


def in_parts(compiled: Callable[..., Any], arrays: Sequence[Any], threads: int) -> None:
    """Call it with the arrays and as many parts as threads."""
    with _one_at_a_time:
        numba.set_num_threads(threads)
        compiled(*arrays, threads)
