"""Attention through a paged cache: rows by a kernel, chunks of prompts by torch's fused one.

The kernel reads a row's keys in parts of PART, each by a program of its own, and adds the parts in
order: where they begin depends on no one else, so a row's bits do not either.

Letters: R rows (tokens of the step, span after span), H heads, K head width, C keys, P parts.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from gptmoe.generate.plan import SlotSpan
from gptmoe.generate.slots import BLOCK, blocks_of

from . import kernels
from .cache import PagedCache

PART = 256
"""Keys that one program reads: enough parts to fill a GPU with one long sequence."""
AT_ONCE = 64
"""Keys of them at once."""


class PagedAttend:
    """An `Attend` for one step: tokens are flat [1, R], span after span.

    `slot_R` and `position_R` say where each row belongs. The last rows are those of `chunks`, which
    torch attends to; those before them go through the kernel.
    """

    def __init__(
        self,
        cache: PagedCache,
        slot_R: Tensor,
        position_R: Tensor,
        chunks: Sequence[SlotSpan] = (),
    ) -> None:
        self.cache, self.slot_R, self.position_R = cache, slot_R, position_R
        self._chunks = chunks
        self._by_rows = len(slot_R) - sum(span.count for span in chunks)
        self._pages = [
            torch.tensor(cache.table.pages(span.slot), device=cache.device) for span in chunks
        ]

    def __call__(self, layer: int, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> Tensor:
        """Store the new keys and values, then attend."""
        q_RHK, k_RHK, v_RHK = q_BTHK[0], k_BTHK[0], v_BTHK[0]
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        store(keys, values, k_RHK, v_RHK, self.slot_R, self.position_R, self.cache.table_SX)
        out_RHK = q_RHK.new_empty(q_RHK.shape)
        if rows := self._by_rows:
            attend_rows(
                out_RHK[:rows],
                q_RHK[:rows],
                keys,
                values,
                self.slot_R[:rows],
                self.position_R[:rows],
                self.cache.table_SX,
            )
        ends = [rows]
        for span in self._chunks:
            ends.append(ends[-1] + span.count)
        for span, pages, (start, end) in zip(
            self._chunks, self._pages, pairwise(ends), strict=True
        ):
            out_RHK[start:end] = attend_chunk(
                q_RHK[start:end], keys, values, pages, span.start + span.count
            )
        return out_RHK.unsqueeze(0)


def store(
    keys: Tensor,
    values: Tensor,
    k_RHK: Tensor,
    v_RHK: Tensor,
    slot_R: Tensor,
    position_R: Tensor,
    table_SX: Tensor,
) -> None:
    """Write each row's key and value to its page of one layer, [P, H, BLOCK, K]."""
    rows, heads, width = k_RHK.shape
    kernels.store[(rows, heads)](
        keys,
        values,
        k_RHK,
        v_RHK,
        slot_R,
        position_R,
        table_SX,
        _row_stride(k_RHK),
        table_SX.shape[1],
        heads,
        WIDTH=width,
        LANES=triton.next_power_of_2(width),
        BLOCK=BLOCK,
    )


def attend_rows(
    out_RHK: Tensor,
    q_RHK: Tensor,
    keys: Tensor,
    values: Tensor,
    slot_R: Tensor,
    position_R: Tensor,
    table_SX: Tensor,
) -> None:
    """softmax(q k^T / sqrt(K)) v of each row over its slot's keys up to its position."""
    rows, heads, width = q_RHK.shape
    most_pages = table_SX.shape[1]
    parts = -(-most_pages * BLOCK // PART)
    part_RHPK, best_RHP, sum_RHP = (
        torch.empty(shape, dtype=torch.float32, device=q_RHK.device)
        for shape in ((rows, heads, parts, width), (rows, heads, parts), (rows, heads, parts))
    )
    lanes = triton.next_power_of_2(width)
    kernels.attend_part[(rows, heads, parts)](
        part_RHPK,
        best_RHP,
        sum_RHP,
        q_RHK,
        keys,
        values,
        slot_R,
        position_R,
        table_SX,
        _row_stride(q_RHK),
        most_pages,
        heads,
        parts,
        width**-0.5,
        WIDTH=width,
        LANES=lanes,
        BLOCK=BLOCK,
        PART=PART,
        AT_ONCE=AT_ONCE,
    )
    kernels.merge_parts[(rows, heads)](
        out_RHK,
        part_RHPK,
        best_RHP,
        sum_RHP,
        position_R,
        heads,
        parts,
        WIDTH=width,
        LANES=lanes,
        PARTS=triton.next_power_of_2(parts),
        PART=PART,
    )


def attend_chunk(q_NHK: Tensor, keys: Tensor, values: Tensor, pages: Tensor, count: int) -> Tensor:
    """The same for the last N of a sequence's `count` tokens, by torch's kernel. [N, H, K]"""
    pages = pages[: blocks_of(count)]
    k_HCK, v_HCK = (kept[pages].transpose(0, 1).flatten(1, 2)[:, :count] for kept in (keys, values))
    out_HNK = F.scaled_dot_product_attention(
        q_NHK.transpose(0, 1).unsqueeze(0),
        k_HCK.unsqueeze(0),
        v_HCK.unsqueeze(0),
        attn_mask=causal_lower_right(len(q_NHK), count),
    )[0]
    return out_HNK.transpose(0, 1)


def _row_stride(x_RHK: Tensor) -> int:
    """From row to row; heads and widths must lie densely."""
    assert x_RHK.stride()[1:] == (x_RHK.shape[2], 1)
    return x_RHK.stride(0)
