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

from .library import Kernels, kernels
from .tasks import Attention

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
        self.cache, self.compiled = cache, compiled
        places = [(s.slot, s.start + offset) for s in spans for offset in range(s.count)]
        self._place_R2 = np.array(places, np.int64)
        count = cache.reserve(1 + max(position for _, position in places))
        segments = cache.segments[:count]
        self._segment_G4 = np.array(
            [(s.keys.data_ptr(), s.values.data_ptr(), s.first, s.size) for s in segments], np.int64
        )
        most_keys = segments[-1].first + segments[-1].size
        self._scratch = torch.empty(torch.get_num_threads(), most_keys + -most_keys % LANES)
        self._num_segments, self._most_keys = count, self._scratch.shape[1]
        self._places, self._segments = (
            array.ctypes.data for array in (self._place_R2, self._segment_G4)
        )

    def __call__(self, layer: int, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> Tensor:
        """Store the new keys and values, then attend."""
        rows, heads, width = q_BTHK.shape[1:]
        if missing := rows - len(self._place_R2):
            last = self._place_R2[-1:].repeat(missing, 0)
            self._place_R2 = np.concatenate([self._place_R2, last])
            self._places = self._place_R2.ctypes.data
        out_RHK = q_BTHK.new_empty(rows, heads, width)
        task = self.task(q_BTHK[0], k_BTHK[0], v_BTHK[0], out_RHK)
        self.tell(task, layer)
        self.compiled.run("store", task, most_threads=1 + rows // ROWS_A_THREAD)
        self.compiled.run("attend", task)
        return out_RHK.unsqueeze(0)

    @property
    def rows(self) -> int:
        """Tokens of the step."""
        return len(self._place_R2)

    def task(self, q_RHK: Tensor, k_RHK: Tensor, v_RHK: Tensor, out_RHK: Tensor) -> Attention:
        """What is the same in all steps."""
        rows, heads, width = q_RHK.shape
        strides = q_RHK.stride()
        assert strides == k_RHK.stride() == v_RHK.stride()
        assert strides[1:] == (width, 1)
        q, keys, values, out = (x.data_ptr() for x in (q_RHK, k_RHK, v_RHK, out_RHK))
        return Attention(
            q=q,
            keys=keys,
            values=values,
            out=out,
            rows=rows,
            heads=heads,
            width=width,
            stride=strides[0],
            slots=self.cache.slots,
        )

    def tell(self, task: Attention, layer: int) -> None:
        """Where the rows of this step are in the cache."""
        task.layer = layer - self.cache.layers.start
        task.places, task.segments = self._places, self._segments
        task.scratch, task.most_keys = self._scratch.data_ptr(), self._most_keys
        task.num_segments = self._num_segments
