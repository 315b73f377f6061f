"""The product of a few rows with a packed bfloat16 weight, compiled by numba.

It reads the layout that oneDNN packs into (blocks of 64 outputs; in each, pairs of inputs; of each
pair, 64 times two numbers) and adds in oneDNN's order, which is that of the CPU's instruction for
pairs (VDPBF16PS): first the odd input of a pair, then the even one, each in one fused step; a sum
of its own for every `chunk` of inputs, and the sums one after the other; the bias last.

Letters: B blocks of outputs, P pairs of inputs, L lanes (outputs of a block), R rows, O outputs.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 64
FIELDS = ("weight", "x", "bias", "out", "next", "blocks", "pairs", "chunk", "outputs", "rows")
"""What a task says, as 64-bit numbers: addresses first; `next` holds the next block to be taken,
`chunk` counts pairs, `bias` is 0 where there is none."""

# numba's decorators have no types.
# mypy: disable-error-code="untyped-decorator,no-untyped-call"


@intrinsic
def _at(_: Any, address: Any) -> Any:
    """The memory at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@intrinsic
def _take(_: Any, address: Any) -> Any:
    """The number at an address, which then is one more: no two threads get the same."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = ir.IntType(64)
        pointer = builder.inttoptr(arguments[0], number.as_pointer())
        return builder.atomic_rmw("add", pointer, number(1), "monotonic")

    return types.int64(types.int64), generate


@intrinsic
def _lanes(_: Any) -> Any:
    """Room for a sum in every lane on the stack: there the compiler keeps it in registers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        room = cgutils.alloca_once(builder, ir.ArrayType(ir.FloatType(), LANES))
        return builder.bitcast(room, cgutils.voidptr_t)

    return types.voidptr(), generate


@njit(inline="always")
def _odd(pair: Any) -> Any:
    """The second number of a pair as float32."""
    return np.uint32(pair & np.uint32(0xFFFF0000)).view(np.float32)


@njit(inline="always")
def _even(pair: Any) -> Any:
    """The first number of a pair as float32."""
    return np.uint32(pair << np.uint32(16)).view(np.float32)


@njit(inline="always")
def _rounded(number: Any) -> Any:
    """A float32 as bfloat16, ties to even."""
    bits = np.float32(number).view(np.uint32)
    return np.uint16(
        (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    )


@njit(fastmath={"contract"}, inline="always")
def _block(weight_PL: Any, x_P: Any, chunk: Any, total_L: Any, sum_L: Any) -> None:
    """The products of one row with one block, in `total_L`."""
    pairs = weight_PL.shape[0]
    for lane in range(LANES):
        total_L[lane] = 0
    for first in range(0, pairs, chunk):
        for lane in range(LANES):
            sum_L[lane] = 0
        for pair in range(first, min(pairs, first + chunk)):
            odd, even = _odd(x_P[pair]), _even(x_P[pair])
            for lane in range(LANES):
                weight = weight_PL[pair, lane]
                sum_L[lane] += odd * _odd(weight)
                sum_L[lane] += even * _even(weight)
        for lane in range(LANES):
            total_L[lane] += sum_L[lane]


@cfunc("void(voidptr)", cache=True, fastmath={"contract"})
def work(task: Any) -> None:
    """Compute blocks of a task (`FIELDS`) until none is left: every thread calls it."""
    weight, x, bias, out, counter, blocks, pairs, chunk, outputs, rows = carray(
        task, len(FIELDS), np.int64
    )
    weight_BPL = carray(_at(weight), (blocks, pairs, LANES), np.uint32)
    x_RP = carray(_at(x), (rows, pairs), np.uint32)
    bias_O = carray(_at(bias), (outputs,), np.uint16)
    out_RO = carray(_at(out), (rows, outputs), np.uint16)
    total_L = carray(_lanes(), LANES, np.float32)
    sum_L = carray(_lanes(), LANES, np.float32)
    block = _take(counter)
    while block < blocks:
        first = block * LANES
        for row in range(rows):
            _block(weight_BPL[block], x_RP[row], chunk, total_L, sum_L)
            for lane in range(min(LANES, outputs - first)):
                if bias:
                    total_L[lane] += _even(np.uint32(bias_O[first + lane]))
                out_RO[row, first + lane] = _rounded(total_L[lane])
        block = _take(counter)
