"""Attention through the cache whose bits depend on nothing but the sequence itself.

The same sum in another order gives other bits, so the order is fixed: a product reads a whole
segment of the cache, masked keys weigh exactly zero, query rows are padded to multiples of the
smallest product whose rows do not depend on their number, and sums over segments run in order. So a
token's result is the same alone or in any batch, in one prefill, in chunks, or decoding (shown by
tests on the CPU).

Letters: S slots, N query rows, H heads, K head width, C keys read, T tokens of the step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gptmoe.model.experts import MIN_ROWS
from gptmoe.model.layers import wide

from .cache import KVCache, Segment
from .plan import SlotSpan

IDLE_BYTES = 1 << 20
"""Of one layer: reading so much takes about as long as the products of one more block of slots."""


@dataclass(frozen=True, slots=True)
class _Store:
    """Tokens of the step whose keys and values go to one segment."""

    segment: Segment
    rows: Tensor | slice
    slot_N: Tensor
    offset_N: Tensor


@dataclass(frozen=True, slots=True)
class _Readers:
    """Rows of the step that read the same segments: one chunk, or all decoding sequences.

    A chunk is N rows of one slot. Decoding is one row of each slot in slots.start .. slots.stop;
    where idle slots lie between, which run in vain, `place_N` has each row's place in that block.
    """

    rows: slice
    slots: slice
    num_segments: int
    bias_SHNC: Tensor
    """0 where a key is seen, -inf where not; S, H or N may be 1."""
    decoding: bool
    place_N: Tensor | None = None

    def queries(self, q_THK: Tensor) -> Tensor:
        """These rows' queries as [S, H, N, K]."""
        q_NHK = q_THK[self.rows]
        if not self.decoding:
            return q_NHK.transpose(0, 1).unsqueeze(0)
        if self.place_N is None:
            return q_NHK.unsqueeze(2)
        q_SHK = q_NHK.new_zeros(self.slots.stop - self.slots.start, *q_NHK.shape[1:])
        return q_SHK.index_copy_(0, self.place_N, q_NHK).unsqueeze(2)

    def answers(self, out_SHNK: Tensor) -> Tensor:
        """The reverse of `queries`."""
        if not self.decoding:
            return out_SHNK[0].transpose(0, 1)
        out_SHK = out_SHNK.squeeze(2)
        return out_SHK if self.place_N is None else out_SHK[self.place_N]


class CachedAttend:
    """An `Attend` for one step: tokens are flat [1, T], span after span, decoding ones first.

    Rows beyond the spans are padding: they repeat the last token, and its result.
    """

    def __init__(self, cache: KVCache, spans: Sequence[SlotSpan], num_decoding: int) -> None:
        self.cache = cache
        self.count = sum(span.count for span in spans)
        cache.begin(spans)
        end = max(span.start + span.count for span in spans)
        self.stores = _stores(cache.segments[: cache.reserve(end)], spans)
        self.readers, row = [], 0
        for run in runs(spans[:num_decoding], most_idle(cache, end)):
            self.readers.append(_decoding(cache, run, row))
            row += len(run)
        for span in spans[num_decoding:]:
            self.readers.append(_chunk(cache, span, row))
            row += span.count

    def __call__(self, layer: int, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> Tensor:
        """Store the new keys and values, then attend."""
        q_THK, k_THK, v_THK = q_BTHK[0], k_BTHK[0], v_BTHK[0]
        layer -= self.cache.layers.start
        for store in self.stores:
            keys, values = store.segment.keys[layer], store.segment.values[layer]
            keys[store.slot_N, :, store.offset_N] = k_THK[store.rows]
            values[store.slot_N, :, store.offset_N] = v_THK[store.rows]
        parts = [self._read(layer, readers, q_THK) for readers in self.readers]
        padding = len(q_THK) - self.count
        if padding:
            parts.append(parts[-1][-1:].expand(padding, -1, -1))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(0)

    def _read(self, layer: int, readers: _Readers, q_THK: Tensor) -> Tensor:
        segments = self.cache.segments[: readers.num_segments]
        keys = [segment.keys[layer, readers.slots] for segment in segments]
        values = [segment.values[layer, readers.slots] for segment in segments]
        return readers.answers(attend(readers.queries(q_THK), keys, values, readers.bias_SHNC))


def attend(
    q_SHNK: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], bias_SHNC: Tensor
) -> Tensor:
    """softmax(q k^T / sqrt(K) + bias) v, [S, H, N, K]; the softmax in at least float32.

    `keys` and `values` are [S, H, C, K] each, one after the other. `bias` may have extra rows N.
    """
    slots, heads, rows, width = q_SHNK.shape
    multiple = MIN_ROWS.get(q_SHNK.dtype, 1)
    if rows == 1:
        q_SHNK = q_SHNK.expand(-1, -1, multiple, -1)
    elif rows % multiple:
        q_SHNK = F.pad(q_SHNK, (0, 0, 0, -rows % multiple))
    q_BNK = q_SHNK.flatten(0, 1)
    parts = [torch.bmm(q_BNK, k.flatten(0, 1).transpose(1, 2)) for k in keys]
    scores_BNC = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    scores_SHNC = torch.add(bias_SHNC, scores_BNC.unflatten(0, (slots, heads)), alpha=width**-0.5)
    weight_BNC = scores_SHNC.softmax(-1).to(q_SHNK.dtype).flatten(0, 1)
    weights = weight_BNC.split([k.shape[2] for k in keys], -1)
    out_BNK = torch.bmm(weights[0], values[0].flatten(0, 1))
    for weight, v in zip(weights[1:], values[1:], strict=True):
        out_BNK = torch.baddbmm(out_BNK, weight, v.flatten(0, 1))
    return out_BNK.unflatten(0, (slots, heads))[:, :, :rows]


def _stores(segments: Sequence[Segment], spans: Sequence[SlotSpan]) -> list[_Store]:
    """Where each token of the step goes, segment by segment."""
    places = [(span.slot, position) for span in spans for position in range(span.start, _end(span))]
    stores = []
    for segment in segments:
        inside = range(segment.first, segment.first + segment.size)
        rows = [row for row, (_, position) in enumerate(places) if position in inside]
        if rows:
            device = segment.keys.device
            slots = torch.tensor([places[row][0] for row in rows], device=device)
            offsets = torch.tensor([places[row][1] - segment.first for row in rows], device=device)
            whole = len(rows) == len(places)
            which = slice(0, len(places)) if whole else torch.tensor(rows, device=device)
            stores.append(_Store(segment, which, slots, offsets))
    return stores


def runs(spans: Sequence[SlotSpan], most_idle: int) -> list[list[SlotSpan]]:
    """Spans by slot, cut where more than `most_idle` slots lie between two of them."""
    found: list[list[SlotSpan]] = []
    for span in spans:
        if found and span.slot - found[-1][-1].slot - 1 <= most_idle:
            found[-1].append(span)
        else:
            found.append([span])
    return found


def most_idle(cache: KVCache, tokens: int) -> int:
    """Idle slots whose keys and values are faster read in vain than left out."""
    head_bytes = 2 * cache.spec.head_dim * cache.dtype.itemsize
    return IDLE_BYTES // (tokens * cache.num_heads * head_bytes)


def _decoding(cache: KVCache, spans: Sequence[SlotSpan], row: int) -> _Readers:
    slots = [span.slot for span in spans]
    first, end = min(slots), max(slots) + 1
    place_N = [slot - first for slot in slots]
    positions = [0] * (end - first)
    for place, span in zip(place_N, spans, strict=True):
        positions[place] = span.start
    num_segments = cache.reserve(max(positions) + 1)
    position_S111 = torch.tensor(positions, device=cache.device).view(-1, 1, 1, 1)
    dense = place_N == list(range(end - first))
    return _Readers(
        rows=slice(row, row + len(spans)),
        slots=slice(first, end),
        num_segments=num_segments,
        bias_SHNC=_bias(cache, num_segments, position_S111),
        decoding=True,
        place_N=None if dense else torch.tensor(place_N, device=cache.device),
    )


def _chunk(cache: KVCache, span: SlotSpan, row: int) -> _Readers:
    num_segments = cache.reserve(_end(span))
    rows = span.count + -span.count % MIN_ROWS.get(cache.dtype, 1)
    position_N1 = torch.arange(span.start, span.start + rows, device=cache.device).unsqueeze(-1)
    return _Readers(
        rows=slice(row, row + span.count),
        slots=slice(span.slot, span.slot + 1),
        num_segments=num_segments,
        bias_SHNC=_bias(cache, num_segments, position_N1[None, None]),
        decoding=False,
    )


def _bias(cache: KVCache, num_segments: int, position: Tensor) -> Tensor:
    last = cache.segments[num_segments - 1]
    key_C = torch.arange(last.first + last.size, device=cache.device)
    bias = torch.zeros((), dtype=wide(cache.dtype), device=cache.device)
    return torch.where(key_C <= position, bias, -math.inf)


def _end(span: SlotSpan) -> int:
    return span.start + span.count
