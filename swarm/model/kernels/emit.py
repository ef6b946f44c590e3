"""Pieces of LLVM's intermediate code that the kernels' innermost loops are written in, and memory by its address.

In: an `IRBuilder` and values of one function under construction. Out: values. Nothing is checked.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

i8, i16, i32, i64, f32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


def has_feature(name: str) -> bool:
    """Of the processor this process runs on, as LLVM names it: avx2, avx512f."""
    return bool(binding.get_host_cpu_features().get(name, False))


def call(builder: ir.IRBuilder, name: str, result: Any, *arguments: Any) -> Any:
    """One of LLVM's own functions."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    known = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(known, arguments)


def element(context: Any, builder: ir.IRBuilder, kind: Any, array: Any, index: Any) -> Any:
    """A pointer to array[index] of a flat array."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


def load(builder: ir.IRBuilder, pointer: Any, index: Any, kind: Any, width: int, align: int) -> Any:
    """A vector of `width` elements from pointer[index] on."""
    at = builder.bitcast(builder.gep(pointer, [index]), ir.VectorType(kind, width).as_pointer())
    return builder.load(at, align=align)


def prefetch(builder: ir.IRBuilder, pointer: Any, index: Any) -> None:
    """Ask for the cache line of pointer[index]; beyond what is mapped it asks for nothing and does no harm."""
    byte = i8.as_pointer()
    ask = builder.module.declare_intrinsic(
        "llvm.prefetch", [byte], ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
    )
    at = builder.bitcast(builder.gep(pointer, [index]), byte)
    builder.call(ask, [at, i32(0), i32(1), i32(1)])  # to read, into every cache, data


@intrinsic  # type: ignore[untyped-decorator]
def float32_at(_typing: Any, address: Any) -> Any:
    """Within compiled code: a float32 pointer for `numba.carray`. To hand over a tensor by its `data_ptr` takes
    half of the 4 µs that its view as an array takes; the caller keeps it alive and knows its shape."""
    pointer = types.CPointer(types.float32)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return pointer(types.int64), generate
