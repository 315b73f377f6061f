"""What numba compiles for decoding on the CPU: the product of a few rows, and attention.

Each kernel is called on every thread with the same task, an array of 64-bit numbers, and takes
pieces of it until none is left.

`product` reads the layout that oneDNN packs into (blocks of 64 outputs; in each, pairs of inputs;
of each pair, 64 times two numbers) and adds in oneDNN's order, which is that of the CPU's
instruction for pairs (VDPBF16PS): first the odd input of a pair, then the even one, each in one
fused step; a sum of its own for every `chunk` of inputs, and the sums one after the other; the bias
last.

`attend` computes each row and head by itself, in an order that depends on nothing but the number of
keys: scores, their softmax and the sum of values in float32.

Letters: B blocks of outputs, P pairs of numbers, L lanes (outputs of a block), R rows, O outputs,
G segments of the cache, C keys, H heads, K head width.
"""

from typing import Any

import numpy as np
from numba import carray, cfunc, njit

from .vectors import LANES, QUAD, at, dot, even, exp, lanes, odd, rounded, take, weighted

PRODUCT = ("weight", "x", "bias", "out", "next", "blocks", "pairs", "chunk", "outputs", "rows")
"""What a task says, as 64-bit numbers: addresses first; `next` holds the next block to be taken,
`chunk` counts pairs, `bias` is 0 where there is none."""

ATTEND = (
    *("q", "keys", "values", "out", "place", "segments", "next"),
    *("layer", "rows", "heads", "quads", "stride", "count", "slots"),
)
"""`place` [R, 2]: slot and position; `segments` [G, 4], `count` of them: addresses of the keys and
of the values [L, S, H, C, K], first position, size. `keys` and `values` are the new ones, `stride`
the numbers from row to row of q and of them; out is [R, H, K]."""
# numba's decorators have no types.
# mypy: disable-error-code="untyped-decorator,no-untyped-call"


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
            of_odd, of_even = odd(x_P[pair]), even(x_P[pair])
            for lane in range(LANES):
                weight = weight_PL[pair, lane]
                sum_L[lane] += of_odd * odd(weight)
                sum_L[lane] += of_even * even(weight)
        for lane in range(LANES):
            total_L[lane] += sum_L[lane]


@cfunc("void(voidptr)", cache=True, fastmath={"contract"})
def product(task: Any) -> None:
    """Compute blocks of a task (`PRODUCT`) until none is left: every thread calls it."""
    weight, x, bias, out, counter, blocks, pairs, chunk, outputs, rows = carray(
        task, len(PRODUCT), np.int64
    )
    weight_BPL = carray(at(weight), (blocks, pairs, LANES), np.uint32)
    x_RP = carray(at(x), (rows, pairs), np.uint32)
    bias_O = carray(at(bias), (outputs,), np.uint16)
    out_RO = carray(at(out), (rows, outputs), np.uint16)
    total_L = carray(lanes(), LANES, np.float32)
    sum_L = carray(lanes(), LANES, np.float32)
    block = take(counter)
    while block < blocks:
        first = block * LANES
        for row in range(rows):
            _block(weight_BPL[block], x_RP[row], chunk, total_L, sum_L)
            for lane in range(min(LANES, outputs - first)):
                if bias:
                    total_L[lane] += even(np.uint32(bias_O[first + lane]))
                out_RO[row, first + lane] = rounded(total_L[lane])
        block = take(counter)


@njit(fastmath={"contract", "reassoc"})
def _weights(score_C: Any, largest: Any) -> Any:
    """Turn scores into e^(score - largest); return their sum."""
    total = np.float32(0)
    for key in range(len(score_C)):
        weight = exp(score_C[key] - largest)
        score_C[key] = weight
        total += weight
    return total


@njit(inline="always")
def _head(address: Any, size: Any, piece: Any, quads: Any) -> Any:
    """Keys or values [C, Q, L] of one layer, slot and head (numbered through) of a segment."""
    return carray(at(address + piece * size * quads * QUAD * 4), (size, quads, QUAD), np.uint32)


@cfunc("void(voidptr)", cache=True)
def store(task: Any) -> None:
    """Put the new keys and values of rows into the cache (`ATTEND`)."""
    (
        _,
        keys,
        values,
        _,
        place,
        segments,
        counter,
        layer,
        rows,
        heads,
        quads,
        stride,
        count,
        slots,
    ) = carray(task, len(ATTEND), np.int64)
    place_R2 = carray(at(place), (rows, 2), np.int64)
    segment_G4 = carray(at(segments), (count, 4), np.int64)
    row = take(counter)
    while row < rows:
        slot, position = place_R2[row]
        key_HQL = carray(at(keys + row * stride * 2), (heads, quads, QUAD), np.uint32)
        value_HQL = carray(at(values + row * stride * 2), (heads, quads, QUAD), np.uint32)
        for segment in range(count):
            to_keys, to_values, first, size = segment_G4[segment]
            if first <= position < first + size:
                for head in range(heads):
                    piece = (layer * slots + slot) * heads + head
                    _head(to_keys, size, piece, quads)[position - first] = key_HQL[head]
                    _head(to_values, size, piece, quads)[position - first] = value_HQL[head]
        row = take(counter)


@cfunc("void(voidptr)", cache=True, fastmath={"contract"})
def attend(task: Any) -> None:
    """softmax(q k^T / sqrt(K)) v over the keys up to each row's position (`ATTEND`)."""
    (q, _, _, out, place, segments, counter, layer, rows, heads, quads, stride, count, slots) = (
        carray(task, len(ATTEND), np.int64)
    )
    place_R2 = carray(at(place), (rows, 2), np.int64)
    segment_G4 = carray(at(segments), (count, 4), np.int64)
    out_RHQL = carray(at(out), (rows, heads, quads, QUAD), np.uint32)
    sum_2L = np.empty((2, QUAD), np.float32)
    odd_QL, even_QL = np.empty((quads, QUAD), np.float32), np.empty((quads, QUAD), np.float32)
    score_C = np.empty(segment_G4[count - 1, 2] + segment_G4[count - 1, 3], np.float32)
    odds, evens, sums, scores = (
        odd_QL.ctypes.data,
        even_QL.ctypes.data,
        sum_2L.ctypes.data,
        score_C.ctypes.data,
    )
    scale = np.float32(1 / np.sqrt(2 * QUAD * quads))
    width = quads * QUAD * 4
    piece = take(counter)
    while piece < rows * heads:
        head, row = piece // rows, piece % rows  # rows of one head share its keys in the caches
        slot, keys = place_R2[row, 0], place_R2[row, 1] + 1
        q_HQL = carray(at(q + row * stride * 2), (heads, quads, QUAD), np.uint32)
        for quad in range(quads):
            for lane in range(QUAD):
                odd_QL[quad, lane] = odd(q_HQL[head, quad, lane]) * scale
                even_QL[quad, lane] = even(q_HQL[head, quad, lane]) * scale
        there = (layer * slots + slot) * heads + head
        largest = np.float32(-np.inf)
        for segment in range(count):
            address, _, first, size = segment_G4[segment]
            address += there * size * width
            for key in range(min(keys - first, size)):
                score = dot(odds, evens, address + key * width, quads)
                score_C[first + key] = score
                largest = max(largest, score)
        total = _weights(score_C[:keys], largest)
        for quad in range(quads):
            sum_2L[:] = 0
            for segment in range(count):
                _, address, first, size = segment_G4[segment]
                address += there * size * width + quad * QUAD * 4
                weighted(scores + first * 4, address, min(keys - first, size), width, sums)
            for lane in range(QUAD):
                high = np.uint32(rounded(sum_2L[0, lane] / total)) << np.uint32(16)
                out_RHQL[row, head, quad, lane] = high | rounded(sum_2L[1, lane] / total)
        piece = take(counter)
