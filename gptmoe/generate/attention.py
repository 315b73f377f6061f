"""Attention through the cache whose bits depend on nothing but the sequence itself.

The same sum in another order gives other bits, so the order is fixed: keys are read in whole
blocks, masked ones weigh exactly zero, query rows are padded to the smallest product whose rows do
not depend on their number, and in float32 the weighted sum of values runs over blocks of one size.
So a token's result is the same alone or in any batch, in one prefill, in chunks, or decoding (shown
by tests on the CPU).

Letters: S slots, N query rows, H heads, K head width, C keys read.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptmoe.model.experts import MIN_ROWS
from gptmoe.model.layers import wide

from .cache import BLOCK_TOKENS, KVCache
from .scheduler import Span


@dataclass(frozen=True, slots=True)
class _Decoding:
    """The decoding spans as one block of slots first .. end-1; idle ones between run in vain."""

    first: int
    end: int
    slot_N: Tensor
    start_N: Tensor
    position_S: Tensor
    keys: int


class CachedAttend:
    """An `Attend` for one step: tokens are flat [1, T], span after span, decoding ones first."""

    def __init__(self, cache: KVCache, spans: Sequence[Span], num_decoding: int) -> None:
        self.cache = cache
        self.chunks = spans[num_decoding:]
        self.decoding = (
            _decoding_block(spans[:num_decoding], cache.keys[0].device) if num_decoding else None
        )

    def __call__(self, layer: int, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> Tensor:
        """Store the new keys and values, then attend. Rows beyond the spans (padding) give zero."""
        q, k, v = q_BTHK[0], k_BTHK[0], v_BTHK[0]
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        out = torch.zeros_like(q)
        row = 0
        if self.decoding is not None:
            row = len(self.decoding.slot_N)
            out[:row] = _decode(self.decoding, keys, values, q[:row], k[:row], v[:row])
        for span in self.chunks:
            rows = slice(row, row + span.count)
            out[rows] = _prefill(span, keys, values, q[rows], k[rows], v[rows])
            row += span.count
        return out.unsqueeze(0)


def _decoding_block(spans: Sequence[Span], device: torch.device) -> _Decoding:
    slots = torch.tensor([span.slot for span in spans], device=device)
    starts = torch.tensor([span.start for span in spans], device=device)
    first, end = int(slots.min()), int(slots.max()) + 1
    position_S = torch.zeros(end - first, dtype=torch.long, device=device)
    position_S[slots - first] = starts
    return _Decoding(first, end, slots, starts, position_S, _whole_blocks(int(starts.max()) + 1))


def _decode(
    block: _Decoding, keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """One new token for each of several sequences, [N, H, K]."""
    keys[block.slot_N, :, block.start_N] = k
    values[block.slot_N, :, block.start_N] = v
    seen_keys, seen_values = (x[block.first : block.end, :, : block.keys] for x in (keys, values))
    q_SHK = q.new_zeros(block.end - block.first, *q.shape[1:])
    q_SHK[block.slot_N - block.first] = q
    q_SHNK = q_SHK.unsqueeze(2).expand(-1, -1, MIN_ROWS.get(q.dtype, 1), -1)
    visible = torch.arange(block.keys, device=q.device) <= block.position_S.view(-1, 1, 1, 1)
    return _attend(q_SHNK, seen_keys, seen_values, visible)[block.slot_N - block.first, :, 0]


def _prefill(span: Span, keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Several new tokens of one sequence, [N, H, K]."""
    end = span.start + span.count
    keys[span.slot, :, span.start : end] = k.transpose(0, 1)
    values[span.slot, :, span.start : end] = v.transpose(0, 1)
    length = _whole_blocks(end)
    padding = max(0, MIN_ROWS.get(q.dtype, 1) - span.count)
    q_HNK = torch.nn.functional.pad(q, (0, 0, 0, 0, 0, padding)).transpose(0, 1)
    position_N = torch.arange(span.start, end + padding, device=q.device)
    visible = torch.arange(length, device=q.device) <= position_N.unsqueeze(-1)
    out_HNK = _attend(q_HNK, keys[span.slot, :, :length], values[span.slot, :, :length], visible)
    return out_HNK.transpose(0, 1)[: span.count]


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v over the visible keys, [..., N, K]; softmax in float32."""
    scores = (q @ k.transpose(-1, -2)).to(wide(q.dtype)) / math.sqrt(q.shape[-1])
    weight = scores.masked_fill(~visible, -math.inf).softmax(-1).to(q.dtype)
    if q.dtype == torch.bfloat16:
        return weight @ v  # this kernel's order does not depend on the number of keys
    blocks = zip(weight.split(BLOCK_TOKENS, -1), v.split(BLOCK_TOKENS, -2), strict=True)
    total: Tensor = sum(
        (w @ block for w, block in blocks), torch.zeros((), dtype=q.dtype, device=q.device)
    )
    return total


def _whole_blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS
