"""Attention through the cache by a kernel that computes each row and head by itself.

For bfloat16 on a CPU: one pass over the keys and one over the values, sums in float32, no products
of padding and no steps between. A row's bits depend on nothing but its own sequence.

Letters: R rows (tokens of the step, span after span), H heads, K head width, G segments.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gptmoe.generate.cache import KVCache
from gptmoe.generate.plan import SlotSpan

from .library import Attention, Kernels, kernels

LANES = 16
"""Pairs of numbers of a head that the kernel takes at once, and keys."""
ROWS_A_THREAD = 16
"""To store the keys of fewer rows than these another thread is not worth waking."""


def row_kernels(cache: KVCache) -> Kernels | None:
    """The kernels, if there are some for such a cache."""
    fits = cache.spec.head_dim % (2 * LANES) == 0
    if cache.device.type == "cpu" and cache.dtype == torch.bfloat16 and fits:
        return kernels()
    return None


class RowAttend:
    """An `Attend` for one step: tokens are flat [1, R], span after span.

    Rows beyond the spans are padding: they repeat the last token, and its result.
    """

    def __init__(self, cache: KVCache, spans: Sequence[SlotSpan], compiled: Kernels) -> None:
        self._compiled, self._first_layer = compiled, cache.layers.start
        places = [(s.slot, s.start + offset) for s in spans for offset in range(s.count)]
        self._place_R2 = np.array(places, np.int64)
        count = cache.reserve(1 + max(position for _, position in places))
        segments = cache.segments[:count]
        self._segment_G4 = np.array(
            [(s.keys.data_ptr(), s.values.data_ptr(), s.first, s.size) for s in segments], np.int64
        )
        most_keys = segments[-1].first + segments[-1].size
        self._scratch = torch.empty(torch.get_num_threads(), most_keys + -most_keys % LANES)
        self._task = Attention(
            segments=self._segment_G4.ctypes.data,
            scratch=self._scratch.data_ptr(),
            num_segments=count,
            slots=cache.slots,
            most_keys=self._scratch.shape[1],
        )

    def __call__(self, layer: int, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> Tensor:
        """Store the new keys and values, then attend."""
        rows, heads, width = q_BTHK.shape[1:]
        if missing := rows - len(self._place_R2):
            last = self._place_R2[-1:].repeat(missing, 0)
            self._place_R2 = np.concatenate([self._place_R2, last])
        strides = q_BTHK.stride()
        assert strides == k_BTHK.stride() == v_BTHK.stride()
        assert strides[2:] == (width, 1)
        out_RHK = q_BTHK.new_empty(rows, heads, width)
        task = self._task
        task.q, task.keys, task.values = (x.data_ptr() for x in (q_BTHK, k_BTHK, v_BTHK))
        task.out, task.places = out_RHK.data_ptr(), self._place_R2.ctypes.data
        task.layer, task.stride = layer - self._first_layer, strides[1]
        task.rows, task.heads, task.width, task.threads = rows, heads, width, 0
        self._compiled.run("store", task, most_threads=1 + rows // ROWS_A_THREAD)
        self._compiled.run("attend", task)
        return out_RHK.unsqueeze(0)
