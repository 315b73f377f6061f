"""What the kernels are made of: addresses, bfloat16 numbers, sums in vector registers.

numba keeps compiled kernels beside kernels.py and compiles anew when that file changes, not this
one: after a change here remove the __pycache__ of this folder.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 64
"""Outputs of a block in the layout of oneDNN's packed weights."""
QUAD = 16
"""Pairs that are added at once: as many as fill a register."""
FLOATS = ir.VectorType(ir.FloatType(), QUAD)
NUMBERS = ir.VectorType(ir.IntType(32), QUAD)

# numba's decorators have no types.
# mypy: disable-error-code="untyped-decorator,no-untyped-call"


@intrinsic
def at(_: Any, address: Any) -> Any:
    """The memory at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@intrinsic
def take(_: Any, address: Any) -> Any:
    """The number at an address, which then is one more: no two threads get the same."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = ir.IntType(64)
        pointer = builder.inttoptr(arguments[0], number.as_pointer())
        return builder.atomic_rmw("add", pointer, number(1), "monotonic")

    return types.int64(types.int64), generate


@intrinsic
def lanes(_: Any) -> Any:
    """Room for a sum in every lane on the stack: there the compiler keeps it in registers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        room = cgutils.alloca_once(builder, ir.ArrayType(ir.FloatType(), LANES))
        return builder.bitcast(room, cgutils.voidptr_t)

    return types.voidptr(), generate


@njit(inline="always")
def odd(pair: Any) -> Any:
    """The second number of a pair as float32."""
    return np.uint32(pair & np.uint32(0xFFFF0000)).view(np.float32)


@njit(inline="always")
def even(pair: Any) -> Any:
    """The first number of a pair as float32."""
    return np.uint32(pair << np.uint32(16)).view(np.float32)


@njit(inline="always")
def rounded(number: Any) -> Any:
    """A float32 as bfloat16, ties to even."""
    bits = np.float32(number).view(np.uint32)
    return np.uint16(
        (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    )


@njit(inline="always")
def exp(x: Any) -> Any:
    """e^x for x <= 0 in float32: 2^n * 2^f with f in -0.5..0.5 by its series up to f^6."""
    scaled = max(x * np.float32(1.4426950408889634), np.float32(-126))
    whole = np.floor(scaled + np.float32(0.5))
    f = scaled - whole
    series = np.float32(1.5403530393381608e-4)
    for factor in (
        1.3333558146428443e-3,
        9.618129107628477e-3,
        5.550410866482158e-2,
        2.402265069591007e-1,
        6.931471805599453e-1,
        1.0,
    ):
        series = series * f + np.float32(factor)
    power = np.uint32((np.int32(whole) + np.int32(127)) << np.int32(23))
    return series * power.view(np.float32)


@intrinsic
def dot(_: Any, odds: Any, evens: Any, pairs: Any, quads: Any) -> Any:
    """The product of a row in float32, odd and even numbers apart, with bfloat16 pairs: addresses,
    and how many quads there are."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        odds, evens, pairs, quads = arguments
        sums = cgutils.alloca_once_value(builder, ir.Constant(FLOATS, None))
        with cgutils.for_range(builder, quads) as loop:
            offset = builder.mul(loop.index, ir.IntType(64)(QUAD * 4))
            high, low = _halves(builder, _vector(builder, pairs, offset, NUMBERS))
            total = builder.load(sums)
            total = _fma(builder, _vector(builder, odds, offset, FLOATS), high, total)
            total = _fma(builder, _vector(builder, evens, offset, FLOATS), low, total)
            builder.store(total, sums)
        return _lanes_sum(builder, builder.load(sums))

    return types.float32(types.int64, types.int64, types.int64, types.int64), generate


@intrinsic
def weighted(_: Any, weights: Any, pairs: Any, count: Any, stride: Any, sums: Any) -> Any:
    """Add weight * pair, `count` times, to two quads of sums (odd, even): addresses; `stride` bytes
    lie between the pairs of two weights."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weights, pairs, count, stride, sums = arguments
        word = ir.IntType(64)
        places = [builder.inttoptr(sums, FLOATS.as_pointer())]
        places.append(builder.gep(places[0], [word(1)]))
        totals = [cgutils.alloca_once(builder, FLOATS) for _ in places]
        for place, total in zip(places, totals, strict=True):
            builder.store(builder.load(place, align=4), total)
        first = builder.inttoptr(weights, ir.FloatType().as_pointer())
        with cgutils.for_range(builder, count) as loop:
            weight = builder.load(builder.gep(first, [loop.index]))
            undefined = ir.Constant(FLOATS, ir.Undefined)
            one = builder.insert_element(undefined, weight, ir.IntType(32)(0))
            every = ir.Constant(ir.VectorType(ir.IntType(32), QUAD), None)
            weight = builder.shuffle_vector(one, undefined, every)
            offset = builder.mul(loop.index, stride)
            halves = _halves(builder, _vector(builder, pairs, offset, NUMBERS))
            for half, total in zip(halves, totals, strict=True):
                builder.store(_fma(builder, weight, half, builder.load(total)), total)
        for place, total in zip(places, totals, strict=True):
            builder.store(builder.load(total), place, align=4)
        return context.get_dummy_value()

    arguments = (types.int64,) * 5
    return types.void(*arguments), generate


def _vector(builder: Any, address: Any, offset: Any, kind: Any) -> Any:
    pointer = builder.inttoptr(builder.add(address, offset), kind.as_pointer())
    return builder.load(pointer, align=4)


def _fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
    """x y + z, rounded once."""
    kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
    fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{QUAD}f32")
    return builder.call(fma, [x, y, z])


def _halves(builder: Any, pairs: Any) -> Any:
    """The odd and the even numbers of a quad of pairs as float32."""
    mask = ir.Constant(NUMBERS, [0xFFFF0000] * QUAD)
    shift = ir.Constant(NUMBERS, [16] * QUAD)
    high, low = builder.and_(pairs, mask), builder.shl(pairs, shift)
    return builder.bitcast(high, FLOATS), builder.bitcast(low, FLOATS)


def _lanes_sum(builder: Any, total: Any) -> Any:
    """The sum of all lanes: halves upon halves, in this order."""
    lane = ir.IntType(32)
    width = QUAD // 2
    while width:
        places = [lane(i + width if i < width else 0) for i in range(QUAD)]
        other = builder.shuffle_vector(total, total, ir.Constant(ir.VectorType(lane, QUAD), places))
        total = builder.fadd(total, other)
        width //= 2
    return builder.extract_element(total, lane(0))
