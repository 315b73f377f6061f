"""Attention through the cache by a kernel that computes each row and head by itself.

For bfloat16 on a CPU: one pass over the keys and one over the values, sums in float32, no products
of padding and no steps between. A row's bits depend on nothing but its own sequence.

Letters: R rows (tokens of the step, span after span), H heads, K head width, G segments.
"""

from collections.abc import Sequence
from functools import partial
from itertools import chain, repeat

import numpy as np
import torch
from torch import Tensor

from .cache import KVCache
from .on_threads import Kernels, kernels
from .plan import SlotSpan

PAIRS_AT_ONCE = 16
"""Pairs of numbers of a head that the kernel adds at once."""


def row_kernels(cache: KVCache) -> Kernels | None:
    """The kernels, if there are some for such a cache."""
    fits = cache.spec.head_dim % (2 * PAIRS_AT_ONCE) == 0
    if cache.device.type == "cpu" and cache.dtype == torch.bfloat16 and fits:
        return kernels()
    return None


class RowAttend:
    """An `Attend` for one step: tokens are flat [1, R], span after span.

    Rows beyond the spans are padding: they repeat the last token, and its result.
    """

    def __init__(self, cache: KVCache, spans: Sequence[SlotSpan], compiled: Kernels) -> None:
        self._cache = cache
        self._run = compiled.run
        self._store = compiled.compiled.store.address
        self._attend = compiled.compiled.attend.address
        places = [(s.slot, s.start + offset) for s in spans for offset in range(s.count)]
        self._places = np.array(places, np.int64)
        count = cache.reserve(1 + max(position for _, position in places))
        self._segments = np.array(
            [
                (segment.keys.data_ptr(), segment.values.data_ptr(), segment.first, segment.size)
                for segment in cache.segments[:count]
            ],
            np.int64,
        )

    def __call__(self, layer: int, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> Tensor:
        """Store the new keys and values, then attend."""
        rows, heads, width = q_BTHK.shape[1:]
        if missing := rows - len(self._places):
            last = repeat(self._places[-1:], missing)
            self._places = np.concatenate(list(chain([self._places], last)))
        stride = q_BTHK.stride(1)
        assert all(x.stride()[1:] == (stride, width, 1) for x in (q_BTHK, k_BTHK, v_BTHK))
        out_RHK = q_BTHK.new_empty(rows, heads, width)
        task = (
            q_BTHK.data_ptr(),
            k_BTHK.data_ptr(),
            v_BTHK.data_ptr(),
            out_RHK.data_ptr(),
            self._places.ctypes.data,
            self._segments.ctypes.data,
            0,
            layer - self._cache.layers.start,
            rows,
            heads,
            width // (2 * PAIRS_AT_ONCE),
            stride,
            len(self._segments),
            self._cache.slots,
        )
        run = partial(self._run, task=task, counter=6)
        run(self._store)
        run(self._attend)
        return out_RHK.unsqueeze(0)
