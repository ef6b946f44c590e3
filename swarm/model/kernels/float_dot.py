"""The innermost loop of `float_rows`: some rows of values times two rows of weights.

In: within numba-compiled code, `dot[n](values, first, weights, start, count)`: flat float32 arrays, where n rows of
`count` values follow one another from position `first` on, and two rows of `count` weights from `start` on. Out: 2 n
float32 sums, the two of the first row first. Nothing is checked.

Written out for three things numba's own loop does not do: two rows of weights are two streams, which memory
delivers faster than one; every line is asked for ahead of its use; and a sum has as many parts as a vector is
wide, added in an order that depends on the processor and `count` alone, so that a row has the same bits in every batch.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from swarm.model.kernels.emit import call, element, f32, has_feature, i32, load, prefetch

OUTPUTS = 2
_WIDE = 16 if has_feature("avx512f") else 8
"""Values a turn: with four rows the sums of a turn must fit the registers."""
_AHEAD = 1024
"""Weights between the line that is multiplied and the one that is asked for: 4 KiB."""


def _sum(builder: ir.IRBuilder, vector: Any) -> Any:
    """Of all elements: halves are added until one is left."""
    width = _WIDE
    while width > 1:
        width //= 2
        parts = [
            builder.shuffle_vector(
                vector,
                ir.Constant(vector.type, ir.Undefined),
                ir.Constant(ir.VectorType(i32, width), list(range(first, first + width))),
            )
            for first in (0, width)
        ]
        vector = builder.fadd(*parts)
    return builder.extract_element(vector, i32(0))


def _make(rows: int) -> Any:
    pairs = [(row, output) for row in range(rows) for output in range(OUTPUTS)]

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        values_array, first, weights_array, start, count = arguments
        values = element(context, builder, signature.args[0], values_array, first)
        weights = element(context, builder, signature.args[2], weights_array, start)
        word, wide = count.type, ir.VectorType(f32, _WIDE)
        zeros = ir.Constant(wide, [0.0] * _WIDE)
        row_values = [builder.gep(values, [builder.mul(count, ir.Constant(word, row))]) for row in range(rows)]
        row_weights = [builder.gep(weights, [builder.mul(count, ir.Constant(word, o))]) for o in range(OUTPUTS)]
        whole = builder.and_(count, ir.Constant(word, -_WIDE))

        before, loop, after = builder.block, builder.append_basic_block("turn"), builder.append_basic_block("done")
        builder.cbranch(builder.icmp_signed(">", whole, ir.Constant(word, 0)), loop, after)
        builder.position_at_end(loop)
        at, sums = builder.phi(word), [builder.phi(wide) for _ in pairs]
        loaded = []
        for pointer in row_weights:
            prefetch(builder, pointer, builder.add(at, ir.Constant(word, _AHEAD)))
            loaded.append(load(builder, pointer, at, f32, _WIDE, align=4))
        inputs = [load(builder, pointer, at, f32, _WIDE, align=4) for pointer in row_values]
        grown = [
            call(builder, f"llvm.fmuladd.v{_WIDE}f32", wide, inputs[row], loaded[output], known)
            for (row, output), known in zip(pairs, sums, strict=True)
        ]
        following = builder.add(at, ir.Constant(word, _WIDE))
        at.add_incoming(ir.Constant(word, 0), before)
        at.add_incoming(following, loop)
        for known, more in zip(sums, grown, strict=True):
            known.add_incoming(zeros, before)
            known.add_incoming(more, loop)
        builder.cbranch(builder.icmp_signed("<", following, whole), loop, after)

        builder.position_at_end(after)
        ends = [builder.phi(wide) for _ in pairs]
        for end, more in zip(ends, grown, strict=True):
            end.add_incoming(zeros, before)
            end.add_incoming(more, loop)
        totals = [cgutils.alloca_once_value(builder, _sum(builder, end)) for end in ends]
        with cgutils.for_range_slice(builder, whole, count, ir.Constant(word, 1), intp=word) as (index, _):
            for total, (row, output) in zip(totals, pairs, strict=True):
                value, weight = (
                    builder.load(builder.gep(pointer, [index])) for pointer in (row_values[row], row_weights[output])
                )
                builder.store(builder.fadd(builder.load(total), builder.fmul(value, weight)), total)
        return context.make_tuple(builder, signature.return_type, [builder.load(total) for total in totals])

    @intrinsic  # type: ignore[untyped-decorator]
    def dot(_typing: Any, values: Any, first: Any, weights: Any, start: Any, count: Any) -> Any:
        kinds = (values, types.intp, weights, types.intp, types.intp)
        return types.UniTuple(types.float32, len(pairs))(*kinds), generate

    return dot


dot1, dot4 = _make(1), _make(4)
