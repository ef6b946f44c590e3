"""How the codec's inner loops are compiled.

In: a function over numpy arrays and numbers. Out: the same function as machine code, kept on disk beside
its source (or in NUMBA_CACHE_DIR), which releases the GIL while it runs.

numba keys what it keeps by the function's own file. So a kernel calls only kernels of its own file and reads no
constant of another one: a change elsewhere could otherwise leave stale machine code behind.

Arithmetic is IEEE float64 and float32 in the order written and int64: no fast-math, so that every
machine computes the same bits. Importing this module imports numba, which takes a second: only code that is about to
encode or decode does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit

int64: Any = np.int64
float64: Any = np.float64
"""Widening inside kernels, where these and Python's own numbers are one type; type checkers keep them apart."""

Function = TypeVar("Function", bound=Callable[..., object])


def kernel(function: Function) -> Function:
    """Compiled at its first call for each combination of argument types."""
    options = {"nogil": True, "boundscheck": False, "error_model": "numpy"}
    try:
        return cast(Function, njit(cache=True, **options)(function))
    except RuntimeError:  # No folder to keep it in: a read-only installation without a home
        return cast(Function, njit(**options)(function))
