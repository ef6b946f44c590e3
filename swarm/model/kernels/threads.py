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


def on_threads(
    alone: Callable[..., Any], in_parts: Callable[..., Any], arguments: Sequence[Any], *, splits: bool
) -> None:
    """Call `in_parts` with the arguments and as many parts as torch has threads; `alone` where that is one, or where
    the work is not worth splitting."""
    threads = min(torch.get_num_threads(), int(numba.config.NUMBA_NUM_THREADS)) if splits else 1
    if threads == 1:
        alone(*arguments)
        return
    with _one_at_a_time:
        numba.set_num_threads(threads)
        in_parts(*arguments, threads)
