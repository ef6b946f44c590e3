"""How loops that torch and numpy are slow at are compiled: numba, without the GIL, kept on disk.

In: a function over numpy arrays and numbers. Out: the same function as machine code, compiled at its first
call with each combination of types and read from the cache (beside its source, or in NUMBA_CACHE_DIR) in later
processes. A machine where nothing can be written compiles anew each time.

The cache knows the file of the function itself, not those it takes other functions or constants from: a kernel had
better need none, or its file must be touched after a change there.

Arithmetic is IEEE float64 and float32 in the order written, and int64: no fast-math, so that every machine computes
the same bits. Imported only by modules that are themselves imported at their first use, since numba takes up to
a second to load.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np

int64: Any = np.int64
float64: Any = np.float64
"""Widening inside kernels, where these and Python's own numbers are one type; type checkers keep them apart."""

Function = TypeVar("Function", bound=Callable[..., Any])


def jit(function: Function, **options: Any) -> Function:
    """Compile for speed. The caller answers for every index: none is checked."""
    options = {"nogil": True, "boundscheck": False, "error_model": "numpy", **options}
    try:
        return cast(Function, numba.njit(cache=True, **options)(function))
    except RuntimeError:  # no folder to keep it in: a read-only installation without a home
        return cast(Function, numba.njit(**options)(function))
