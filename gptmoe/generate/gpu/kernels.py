"""Kernels for a GPU, in Triton; its interpreter runs them on a CPU in tests.

Each computes a row by itself, in an order that depends on nothing but the row's own place: so a
row's bits are the same alone and in any batch. Sums are in float32.

Arguments that are tensors come as pointers to their first number. The compiler takes no other
annotation than constexpr. A kernel is compiled once, not for some numbers of rows again.

Letters: R rows, H heads, K head width, X pages of a slot, C keys taken at once, P parts of a
sequence's keys, D model width, M rows of a tile, N outputs of a tile, I inputs, O outputs.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize_on_alignment=["slot_R", "position_R"])
def store(
    keys,
    values,
    k,
    v,
    slot_R,
    position_R,
    table_SX,
    stride,
    most_pages,
    num_heads,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write a row's key and value of one head to its page. `stride`: from row to row of k, v."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot, position = tl.load(slot_R + row), tl.load(position_R + row)
    page = tl.load(table_SX + slot * most_pages + position // BLOCK).to(tl.int64)
    place = ((page * num_heads + head) * BLOCK + position % BLOCK) * WIDTH
    lane_K = tl.arange(0, LANES)
    inside_K = lane_K < WIDTH
    source = row * stride + head * WIDTH + lane_K
    tl.store(keys + place + lane_K, tl.load(k + source, mask=inside_K), mask=inside_K)
    tl.store(values + place + lane_K, tl.load(v + source, mask=inside_K), mask=inside_K)


@triton.jit(do_not_specialize_on_alignment=["slot_R", "position_R"])
def attend_part(
    out_RHPK,
    best_RHP,
    sum_RHP,
    q,
    keys,
    values,
    slot_R,
    position_R,
    table_SX,
    stride,
    most_pages,
    num_heads,
    num_parts,
    scale,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """One head of one row over the keys PART * part ..: their weighted values, not yet divided by
    the sum of weights, which are relative to the best score. Parts behind the row stay as they are.
    """
    row, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    slot, position = tl.load(slot_R + row), tl.load(position_R + row)
    first = part * PART
    if first <= position:
        lane_K = tl.arange(0, LANES)
        inside_K = lane_K < WIDTH
        q_K = tl.load(q + row * stride + head * WIDTH + lane_K, mask=inside_K, other=0.0)
        q_K = q_K.to(tl.float32) * scale
        best = -float("inf")
        total = 0.0
        out_K = tl.zeros([LANES], tl.float32)
        for key in range(first, tl.minimum(first + PART, position + 1), AT_ONCE):
            key_C = key + tl.arange(0, AT_ONCE)
            seen_C = key_C <= position
            page_C = tl.load(table_SX + slot * most_pages + key_C // BLOCK, mask=seen_C, other=0)
            place_C = ((page_C.to(tl.int64) * num_heads + head) * BLOCK + key_C % BLOCK) * WIDTH
            place_CK = place_C[:, None] + lane_K[None, :]
            there_CK = seen_C[:, None] & inside_K[None, :]
            k_CK = tl.load(keys + place_CK, mask=there_CK, other=0.0).to(tl.float32)
            score_C = tl.where(seen_C, tl.sum(k_CK * q_K[None, :], 1), -float("inf"))
            better = tl.maximum(best, tl.max(score_C, 0))
            weight_C = tl.exp(score_C - better)
            shrink = tl.exp(best - better)
            v_CK = tl.load(values + place_CK, mask=there_CK, other=0.0).to(tl.float32)
            out_K = out_K * shrink + tl.sum(v_CK * weight_C[:, None], 0)
            total = total * shrink + tl.sum(weight_C, 0)
            best = better
        place = (row * num_heads + head) * num_parts + part
        tl.store(out_RHPK + place * WIDTH + lane_K, out_K, mask=inside_K)
        tl.store(best_RHP + place, best)
        tl.store(sum_RHP + place, total)


@triton.jit(do_not_specialize_on_alignment=["position_R"])
def merge_parts(
    out_RHK,
    part_RHPK,
    best_RHP,
    sum_RHP,
    position_R,
    num_heads,
    num_parts,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
):
    """The parts of one head of one row as one, [K]."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part_P, lane_K = tl.arange(0, PARTS), tl.arange(0, LANES)
    inside_K = lane_K < WIDTH
    there_P = part_P * PART <= tl.load(position_R + row)
    place_P = (row * num_heads + head) * num_parts + part_P
    best_P = tl.load(best_RHP + place_P, mask=there_P, other=-float("inf"))
    weight_P = tl.exp(best_P - tl.max(best_P, 0))
    total = tl.sum(weight_P * tl.load(sum_RHP + place_P, mask=there_P, other=0.0), 0)
    there_PK = there_P[:, None] & inside_K[None, :]
    place_PK = place_P[:, None] * WIDTH + lane_K[None, :]
    part_PK = tl.load(part_RHPK + place_PK, mask=there_PK, other=0.0)
    out_K = tl.sum(part_PK * weight_P[:, None], 0) / total
    place_K = (row * num_heads + head) * WIDTH + lane_K
    tl.store(out_RHK + place_K, out_K.to(out_RHK.dtype.element_ty), mask=inside_K)


@triton.jit
def _tile(
    x,
    weight_OI,
    bias_O,
    y,
    from_M,
    to_M,
    mine_M,
    inputs,
    outputs,
    N: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    BIASED: tl.constexpr,
    GELU: tl.constexpr,
):
    """y[to] = x[from] W^T + b for the rows that are mine, and the N outputs of this program."""
    out_N = tl.program_id(1) * N + tl.arange(0, N).to(tl.int64)  # weights can be large
    there_N = out_N < outputs
    sum_MN = tl.zeros([from_M.shape[0], N], tl.float32)
    for start in range(0, inputs, I):
        in_I = start + tl.arange(0, I)
        there_I = in_I < inputs
        x_MI = tl.load(
            x + from_M[:, None] * inputs + in_I[None, :],
            mask=mine_M[:, None] & there_I[None, :],
            other=0.0,
        )
        weight_NI = tl.load(
            weight_OI + out_N[:, None] * inputs + in_I[None, :],
            mask=there_N[:, None] & there_I[None, :],
            other=0.0,
        )
        sum_MN = tl.dot(x_MI, tl.trans(weight_NI), sum_MN, input_precision="ieee")
    if BIASED:
        bias_N = tl.load(bias_O + out_N, mask=there_N, other=0.0).to(tl.float32)
        sum_MN = sum_MN + bias_N[None, :]
    if GELU:  # of what was rounded, as in training
        sum_MN = sum_MN.to(y.dtype.element_ty).to(tl.float32)
        inner_MN = 0.7978845608028654 * (sum_MN + 0.044715 * sum_MN * sum_MN * sum_MN)
        small_MN = tl.exp(-2.0 * tl.abs(inner_MN))  # never overflows
        tanh_MN = (1.0 - small_MN) / (1.0 + small_MN)
        sum_MN = 0.5 * sum_MN * (1.0 + tl.where(inner_MN < 0, -tanh_MN, tanh_MN))
    place_MN = to_M[:, None] * outputs + out_N[None, :]
    there_MN = mine_M[:, None] & there_N[None, :]
    tl.store(y + place_MN, sum_MN.to(y.dtype.element_ty), mask=there_MN)


@triton.jit(do_not_specialize=["rows"])
def product(
    x_RI,
    weight_OI,
    bias_O,
    y_RO,
    rows,
    inputs,
    outputs,
    M: tl.constexpr,
    N: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    BIASED: tl.constexpr,
    GELU: tl.constexpr,
):
    """y = x W^T + b, in tiles of one size whatever the number of rows."""
    row_M = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)
    mine_M = row_M < rows
    _tile(
        x_RI, weight_OI, bias_O, y_RO, row_M, row_M, mine_M, inputs, outputs,
        N=N, I=I, BIASED=BIASED, GELU=GELU,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "tokens"])
def expert_product(
    x,
    weight_EOI,
    bias_EO,
    y_RO,
    expert_R,
    rows,
    tokens,
    inputs,
    outputs,
    ROWS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    GELU: tl.constexpr,
):
    """y_r = x_t W_e^T + b_e with e the expert of row r and t = r modulo `tokens`.

    Who has the first row of an expert computes all of that expert's, and nobody else need know how
    many there are. Rows stay where they are: of each M that stand together, those of the expert are
    computed in one tile. So up to M rows read each weight that is needed once, more of them again.
    """
    first = tl.program_id(0)
    expert = tl.load(expert_R + first)
    row_R = tl.arange(0, ROWS)
    earlier_R = tl.load(expert_R + row_R, mask=row_R < first, other=-1)
    if tl.max((earlier_R == expert).to(tl.int32), 0) == 0:
        weight_OI = weight_EOI + expert * outputs * inputs
        bias_O = bias_EO + expert * outputs
        for start in range(0, rows, M):
            row_M = start + tl.arange(0, M).to(tl.int64)
            mine_M = tl.load(expert_R + row_M, mask=row_M < rows, other=-1) == expert
            if tl.max(mine_M.to(tl.int32), 0) == 1:
                _tile(
                    x, weight_OI, bias_O, y_RO, row_M % tokens, row_M, mine_M, inputs, outputs,
                    N=N, I=I, BIASED=True, GELU=GELU,
                )  # fmt: skip


@triton.jit
def norm(
    x_RD,
    weight_D,
    bias_D,
    y_RD,
    width,
    LANES: tl.constexpr,
):
    """Layer normalisation of one row, in float32."""
    row, lane_D = tl.program_id(0).to(tl.int64), tl.arange(0, LANES)
    inside_D = lane_D < width
    x_D = tl.load(x_RD + row * width + lane_D, mask=inside_D, other=0.0).to(tl.float32)
    mean = tl.sum(x_D, 0) / width
    centred_D = tl.where(inside_D, x_D - mean, 0.0)
    variance = tl.sum(centred_D * centred_D, 0) / width
    scaled_D = centred_D / tl.sqrt(variance + 1e-5)
    gain_D = tl.load(weight_D + lane_D, mask=inside_D, other=0.0).to(tl.float32)
    shift_D = tl.load(bias_D + lane_D, mask=inside_D, other=0.0).to(tl.float32)
    y_D = scaled_D * gain_D + shift_D
    tl.store(y_RD + row * width + lane_D, y_D.to(y_RD.dtype.element_ty), mask=inside_D)
