"""The innermost loop of `int8_rows`: some rows of 16-bit values times one row of int8 codes, summed exactly.

In: within numba-compiled code, `dots[n](values, first, codes, start, count)`: flat arrays, where n rows of `count`
values follow one another from position `first` on, and `count` codes from `start` on. Out: n int64 sums.
Values must be within ±127 * 256. Nothing is checked.

numba's own loop needs four times the instructions (docs/experiments.md), so the machine-independent code is
written out here: 32 codes a turn, widened once for all rows, into two sets of 32-bit sums that are emptied into
64-bit ones before they can overflow. x86 processors with AVX2 multiply and add pairs in one instruction; others
get the same sums from plain vector code.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from swarm.model.kernels.emit import call, element, has_feature, i8, i16, i32, i64, load, prefetch

_WIDE = 16
"""Values a vector of 256 bits holds."""
_TURN = 2 * _WIDE
_BLOCK = 8192
"""A pair of products is at most 2 * 128 * 127 * 256, of which 258 fit a 32-bit sum; a block adds 256 to each."""

_PAIRS = _WIDE // 2
_AHEAD = 4096
"""Codes, and so bytes, between the line that is multiplied and the one that is asked for."""


def _pair_sums(builder: ir.IRBuilder, values: Any, codes: Any) -> Any:
    """[16 x i16] times [16 x i16], neighbours added: [8 x i32]."""
    if has_feature("avx2"):
        return call(builder, "llvm.x86.avx2.pmadd.wd", ir.VectorType(i32, _PAIRS), values, codes)
    wide = ir.VectorType(i32, _WIDE)
    products = builder.mul(builder.sext(values, wide), builder.sext(codes, wide))
    parts = [
        builder.shuffle_vector(
            products,
            ir.Constant(wide, ir.Undefined),
            ir.Constant(ir.VectorType(i32, _PAIRS), list(range(odd, _WIDE, 2))),
        )
        for odd in (0, 1)
    ]
    return builder.add(*parts)


def _total(builder: ir.IRBuilder, sums: list[Any]) -> Any:
    """One i64 of vectors of i32."""
    wide = ir.VectorType(i64, _PAIRS)
    total = None
    for one in sums:
        extended = builder.sext(one, wide)
        total = extended if total is None else builder.add(total, extended)
    return call(builder, f"llvm.vector.reduce.add.v{_PAIRS}i64", i64, total)


def _make(rows: int) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        values_array, first, codes_array, start, count = arguments
        values = element(context, builder, signature.args[0], values_array, first)
        codes = element(context, builder, signature.args[2], codes_array, start)
        zeros = ir.Constant(ir.VectorType(i32, _PAIRS), [0] * _PAIRS)
        word = count.type
        totals = [cgutils.alloca_once_value(builder, ir.Constant(i64, 0)) for _ in range(rows)]
        row_values = [builder.gep(values, [builder.mul(count, ir.Constant(word, row))]) for row in range(rows)]
        whole = builder.and_(count, ir.Constant(word, -_TURN))

        with cgutils.for_range_slice(builder, ir.Constant(word, 0), whole, ir.Constant(word, _BLOCK), intp=word) as (
            block,
            _,
        ):
            left = builder.sub(whole, block)
            length = builder.select(
                builder.icmp_signed("<", left, ir.Constant(word, _BLOCK)), left, ir.Constant(word, _BLOCK)
            )
            end = builder.add(block, length)
            before, loop, after = builder.block, builder.append_basic_block("turn"), builder.append_basic_block("done")
            builder.branch(loop)  # a block has at least one turn
            builder.position_at_end(loop)
            at = builder.phi(word)
            at.add_incoming(block, before)
            sums = []
            for _row in range(rows):
                for _half in range(2):
                    phi = builder.phi(zeros.type)
                    phi.add_incoming(zeros, before)
                    sums.append(phi)
            grown: list[Any] = [None] * len(sums)
            prefetch(builder, codes, builder.add(at, ir.Constant(word, _AHEAD)))
            for half in range(2):
                index = builder.add(at, ir.Constant(word, half * _WIDE))
                wide = builder.sext(load(builder, codes, index, i8, _WIDE, align=1), ir.VectorType(i16, _WIDE))
                for row in range(rows):
                    products = _pair_sums(builder, load(builder, row_values[row], index, i16, _WIDE, align=2), wide)
                    grown[2 * row + half] = builder.add(sums[2 * row + half], products)
            following = builder.add(at, ir.Constant(word, _TURN))
            at.add_incoming(following, loop)
            for phi, value in zip(sums, grown, strict=True):
                phi.add_incoming(value, loop)
            builder.cbranch(builder.icmp_signed("<", following, end), loop, after)
            builder.position_at_end(after)
            for row in range(rows):
                total = builder.add(builder.load(totals[row]), _total(builder, grown[2 * row : 2 * row + 2]))
                builder.store(total, totals[row])

        with cgutils.for_range_slice(builder, whole, count, ir.Constant(word, 1), intp=word) as (at, _):
            code = builder.sext(builder.load(builder.gep(codes, [at])), i64)
            for row in range(rows):
                value = builder.sext(builder.load(builder.gep(row_values[row], [at])), i64)
                builder.store(builder.add(builder.load(totals[row]), builder.mul(value, code)), totals[row])
        return context.make_tuple(builder, signature.return_type, [builder.load(total) for total in totals])

    @intrinsic  # type: ignore[untyped-decorator]
    def dots(_typing: Any, values: Any, first: Any, codes: Any, start: Any, count: Any) -> Any:
        return types.UniTuple(types.int64, rows)(values, types.intp, codes, types.intp, types.intp), generate

    return dots


dot1, dot4 = _make(1), _make(4)
