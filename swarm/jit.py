"""How loops that torch and numpy are slow at are compiled: numba, without the GIL, kept on disk.

In: a function over numpy arrays and numbers. Out: the same function as machine code, compiled at its first
call with each combination of types and read from the cache of this machine in later processes. A
machine where nothing can be written compiles anew each time. The cache knows the file of the function itself, not
those it takes other compiled functions from: touch it after a change there. Imported only by modules that are
themselves imported at their first use, since numba takes 0.2 s to load.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

Function = TypeVar("Function", bound=Callable[..., Any])


def jit(function: Function, **options: Any) -> Function:
    """Compile for speed. The caller answers for every index: none is checked."""
    try:
        compiled = numba.njit(function, nogil=True, boundscheck=False, cache=True, **options)
    except RuntimeError:  # numba found no folder to write to: neither beside the source nor the user's own
        compiled = numba.njit(function, nogil=True, boundscheck=False, **options)
    result: Function = compiled
    return result


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(_typing: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of `array[index]`; beyond the array's end it asks for nothing and does no harm."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        ask = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        at = builder.bitcast(builder.gep(data, [arguments[1]]), byte)
        builder.call(ask, [at, word(0), word(3), word(1)])  # to read, into every cache, data
        return context.get_dummy_value()

    return types.void(array, types.intp), generate
